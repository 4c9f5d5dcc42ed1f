"""Many runs of one recipe: every combination of some values, each with several seeds, in one directory.

Every point is a run directory of its own, made by `mentalglm train` and `mentalglm evaluate` in processes of their own:
one that fails, or is killed for its memory, takes no other with it. The runs themselves say what is finished, so the
same sweep goes on where it stopped, also where its commands were carried out on several hosts.
"""

import contextlib
import itertools
import os
import re
import shlex
import statistics
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mentalglm_jax.devices.stopping import StopSignal
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.evaluate.stated import EVALUATION, read_stated
from mentalglm_jax.files import make_dir, working_in, write_json
from mentalglm_jax.foreign import read_json
from mentalglm_jax.interpreter import environment, module_command
from mentalglm_jax.pipeline.same_inputs import check_alike, check_now
from mentalglm_jax.train.recipe import Recipe, load_recipe, what_it_is

MOST_POINTS = 1000
_LONGEST_NAME = 100
# A log is a file of this sweep: neither what a link leads to, nor a pipe that is waited for.
_OWN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class Point:
    """One run: the values it has of the grid, its seed, and the recipe that comes of them."""

    name: str
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def directory(self) -> Path:
        return self.recipe.run_dir

    @property
    def label(self) -> str:
        return f"{self.name}/seed-{self.seed}"

    def commands(self, recipe_file: Path) -> list[list[str]]:
        """What carries it out, as arguments of ``mentalglm``."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        return [["train", str(recipe_file), *sets], ["evaluate", str(self.directory)]]


def make_points(
    recipe_file: Path, grid: Sequence[str], seeds: int, out: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Path, list[Point]]:
    """The directory of a sweep and all its points, each with a recipe that was checked.

    Args:
        recipe_file: what all points share.
        grid: ``KEY=VALUE,VALUE`` each; keys as for ``--set``, values YAML.
        seeds: runs of each combination; they count from the recipe's own seed.
        out: None is the recipe's ``run_dir`` with ``-sweep`` at its end.
        overrides: for all points, as for ``--set``.

    Raises:
        InputError: a key without values, twice, or the sweep's own; too many points; or as ``load_recipe``, for any of
            them.
    """
    base = load_recipe(recipe_file, overrides)
    out = base.run_dir.with_name(f"{base.run_dir.name}-sweep") if out is None else out
    axes = dict(_axis(text) for text in grid)
    if len(axes) < len(grid):
        raise InputError("--grid: a key is given twice; give all its values at once")
    count = seeds
    for values in axes.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise InputError(f"--grid: {count} runs are more than {MOST_POINTS}; give fewer values")
    found = []
    for chosen in itertools.product(*axes.values()):
        values = [f"{key}={value}" for key, value in zip(axes, chosen, strict=True)]
        name = point_name(values)
        for seed in range(base.seed, base.seed + seeds):
            own = (*overrides, *values, f"seed={seed}", f"run_dir={_yaml_text(out / name / f'seed-{seed}')}")
            found.append(Point(name, seed, own, load_recipe(recipe_file, own)))
    return out, found


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, rest = text.partition("=")
    values = [value.strip() for value in split_values(rest)]
    if not equals or not key or not all(values):
        raise InputError(f"--grid {key[:200]}: write it as section.key=value,value")
    if key in ("seed", "run_dir"):
        raise InputError(f"--grid {key}: it is what the sweep itself sets; see --seeds and --out")
    return key, list(dict.fromkeys(values))


def split_values(text: str) -> list[str]:
    """At the commas outside brackets and quotation marks."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def point_name(values: Sequence[str]) -> str:
    """A directory's name that says the values, each by the end of its key."""
    text = ",".join(value.partition("=")[0].split(".")[-1] + "=" + value.partition("=")[2] for value in values)
    name = re.sub(r"[^\w.=,+-]+", "_", text).strip("._") or "recipe"
    if name != text or len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(','.join(values).encode()):08x}" if values else name
    return name


def _yaml_text(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def printed_commands(points: Sequence[Point], recipe_file: Path) -> Iterator[str]:
    """One line of a shell per point, to be carried out anywhere the directories are seen."""
    for point in points:
        yield " && ".join(shlex.join(["mentalglm", *command]) for command in point.commands(recipe_file))


def is_done(point: Point) -> bool:
    """Whether the run is finished, evaluation included, and of this very recipe."""
    try:
        found = read_json(point.directory / "run.json")
        return found["recipe"] == what_it_is(point.recipe) and {"generate", "evaluate"} <= set(found["stages"])
    except (InputError, KeyError, TypeError):
        return False


Start = Callable[[Sequence[str], Path, Callable[[], int | None]], int]


def sweep(
    recipe_file: Path, out: Path, points: Sequence[Point], *, jobs: int = 1, say: Callable[[str], None],
    start: Start | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Carries out what of ``points`` is not finished, ``jobs`` at a time; a point that fails stops no other.

    Args:
        recipe_file: as for ``make_points``.
        out: holds all; ``sweep.json`` there is the result.
        points: the runs.
        jobs: processes at a time. Each takes all devices it sees.
        say: gets a line for every point.
        start: runs one command of ``mentalglm`` (arguments, log file, the signal it is to be stopped by, once there is
            one) and returns its exit code; None is in a process of its own.

    Returns:
        ``points`` (name, seed, values, directory, log, state "done" or "failed", reason, development, weighted_f1) and
        ``table``, see ``table``.

    Raises:
        InputError: some of the runs were made of other inputs than there are now, or than others of them.
        Interrupted, Preempted: a signal; the runs under way were told and have saved.
    """
    start = start or _child
    states: dict[str, str] = {}
    recipes = [point.recipe for point in points]
    with working_in(out), StopSignal() as stop, ThreadPoolExecutor(jobs) as pool:
        check_alike(recipes)
        check_now(recipes, out)

        def work(point: Point) -> str:
            """Empty, or why it failed."""
            log = point.directory.with_name(f"{point.directory.name}.log")
            for command in point.commands(recipe_file):
                if stop.requested:
                    return "stopped"
                if code := start(command, log, lambda: stop.number):
                    return _reason(log, code)
            return ""

        todo = []
        for point in points:
            if is_done(point):
                states[point.label] = ""
            else:
                todo.append(point)
        say(f"{len(points)} runs in {out}, {len(points) - len(todo)} of them finished")
        queue: dict[Future[str], Point] = {pool.submit(work, point): point for point in todo}
        while queue:
            ended, _ = wait(queue, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in ended:
                point = queue.pop(future)
                states[point.label] = reason = future.result()
                if not stop.requested:
                    done = f"{len(points) - len(queue)}/{len(points)} {point.label}"
                    say(f"{done}: {'failed: ' + reason if reason else 'done'}")
        if stop.requested:
            raise stop.error(f"interrupted; what was finished is in {out}, the same command continues from there")
        check_alike(recipes)  # inputs may have been changed meanwhile
        result = collected(points, states)
        write_json(out / "sweep.json", result)
        return result


def _child(arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]) -> int:
    try:
        make_dir(log.parent, private=True)
        file = os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _OWN, 0o600), "ab")
    except OSError as error:
        raise RunError(f"{log}: cannot write ({error.strerror or error})") from error
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once; twice would cost the run what
    # it has not saved.
    with file, subprocess.Popen(module_command("mentalglm_jax", *arguments), stdin=subprocess.DEVNULL, stdout=file,
                                stderr=file, env=environment(), start_new_session=True) as process:  # fmt: skip
        told = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.2)
            if not told and (number := stopped()) is not None:
                process.send_signal(number)
                told = True


def _reason(log: Path, code: int) -> str:
    """The last reason a command gave, by its log."""
    with contextlib.suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        said = [line.removeprefix("mentalglm: ") for line in lines if line.startswith("mentalglm: ")]
        if said and code >= 0:
            return f"{said[-1]} (exit code {code})"
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{killed}; {log} holds what it said"


def collected(points: Sequence[Point], failed: Mapping[str, str]) -> dict[str, Any]:
    """What ``sweep`` returns, read from the run directories."""
    rows = []
    for point in points:
        reason = failed.get(point.label, "")
        row: dict[str, Any] = {"name": point.name, "seed": point.seed, "values": list(point.overrides[:-1]),
                               "directory": str(point.directory), "state": "failed" if reason else "done",
                               "reason": reason, "development": None, "split": None, "weighted_f1": {}}  # fmt: skip
        if not reason:
            row |= _found(point)
        rows.append(row)
    return {"points": rows, "table": table(rows)}


def _found(point: Point) -> dict[str, Any]:
    file = point.directory / "run.json"
    try:
        last = read_json(file)["stages"][f"train {point.recipe.stages[-1].name}"]
        scores, _ = read_stated(point.directory / EVALUATION)
        best = {name: float(value) for name, value in last.get("best", {}).items() if name != "step"}
        return {"development": best or None,
                "weighted_f1": {task: float((entry if entry["n"] else entry["label_reading"])["weighted_f1"])
                                for task, entry in scores.items()}}  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{file}: is damaged; delete {point.directory} and sweep again") from None


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per combination of values: ``name``, ``runs``, ``failed``, ``development`` and ``weighted_f1``, each
    score as [mean, standard deviation (None of one run)]. Best development score first."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        done = [row for row in rows if row["name"] == name and row["state"] == "done"]
        measures = sorted({key for row in done for key in row["development"] or ()})
        tasks = dict.fromkeys(task for row in done for task in row["weighted_f1"])
        found.append({
            "name": name, "runs": len(done), "failed": sum(row["name"] == name for row in rows) - len(done),
            "development": {key: _spread([row["development"][key] for row in done if row["development"]])
                            for key in measures},
            "weighted_f1": {task: _spread([row["weighted_f1"][task] for row in done if task in row["weighted_f1"]])
                            for task in tasks},
        })  # fmt: skip
    if any(row["development"] for row in found):
        found.sort(key=_rank)
    return found


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Lower is better; what has no development score comes last."""
    for name, (mean, _) in row["development"].items():
        return False, mean if name == "loss" else -mean
    return True, 0.0


def _spread(values: Sequence[float]) -> list[float | None]:
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
