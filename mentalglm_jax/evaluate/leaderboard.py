"""One table over several evaluated runs: seeds together, tests between recipes, floors and published figures beside."""

import csv
import io
import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.data.cells import to_cell
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.evaluate.metrics import METRICS, indicator, positive_place
from mentalglm_jax.evaluate.noted import final_adapter
from mentalglm_jax.evaluate.published import figures_beside
from mentalglm_jax.evaluate.report import readings
from mentalglm_jax.evaluate.scores import aligned
from mentalglm_jax.evaluate.stated import EVALUATION, read_stated
from mentalglm_jax.evaluate.statistics import DRAWS, holm, paired_bootstrap
from mentalglm_jax.foreign import read_json
from mentalglm_jax.markdown import escaped, seen
from mentalglm_jax.text import tasks

FORMATS = ("markdown", "csv", "latex", "json")
_SEED = re.compile(r"[-_.=, ]*(?:seed|s)?[-_.=, ]*\d*$", re.IGNORECASE)


@dataclass(frozen=True)
class _Run:
    directory: Path  # of the run, where it is one's
    result: Mapping[str, Any]
    recipe: Mapping[str, Any] | None  # of the run that answered
    answers: Mapping[str, Mapping[str, list[Answer]]]

    @property
    def seed(self) -> Any:
        return None if self.recipe is None else self.recipe.get("seed")


def leaderboard_rows(paths: Sequence[str | Path], draws: int = DRAWS) -> list[dict[str, Any]]:
    """One row per task, reading and system, best weighted F1 first, then the task's floors and the figures that others
    published on the records of a run.

    Run directories whose recipes differ only in ``seed`` are one system: its scores are means over the runs.

    Args:
        paths: ``evaluation.json`` files, or directories that hold one.
        draws: bootstrap samples of a test.

    Returns:
        Rows with task, system, kind ("run", "floor", "published"), reading, n, weighted_f1, micro_f1, macro_f1, ci95
        (of a single run: over posts), runs, seeds, sd (standard deviation of each score over several runs, n - 1), and
        ``against_best``: how far below the best system of the same task and reading, by the paired bootstrap over
        posts, with ``p_holm`` corrected over all tests in the table; the runs of a system are averaged in each sample,
        not resampled. None where answers are missing, or are to other records. Published rows have metric, value and
        source instead.

    Raises:
        InputError: a file is missing or not an evaluation, or answers beside it are damaged or have other scores.
    """
    systems = _systems([_read(Path(path)) for path in paths])
    boards: dict[str, list[dict[str, Any]]] = {}
    floors: dict[str, list[dict[str, Any]]] = {}
    members: dict[int, Sequence[_Run]] = {}
    for name, runs in systems.items():
        for task in dict.fromkeys(task for run in runs for task in run.result):
            found: dict[str, list[tuple[_Run, Mapping[str, Any]]]] = {}
            for run in runs:
                for reading, scores in readings(run.result[task]) if task in run.result else ():
                    found.setdefault(reading, []).append((run, scores))
                for floor, scores in run.result[task]["floors"].items() if task in run.result else ():
                    row = _row(task, floor, "floor", "", [scores])
                    if row not in floors.setdefault(task, []):
                        floors[task].append(row)
            for reading, parts in found.items():
                row = _row(task, name, "run", reading, [scores for _, scores in parts])
                seeds = [run.seed for run, _ in parts]
                row |= {"runs": len(parts), "seeds": None if None in seeds else seeds, "against_best": None}
                members[id(row)] = [run for run, _ in parts]
                boards.setdefault(task, []).append(row)
    rows = []
    for task in (name for name in tasks.TASKS if name in boards):
        rows += sorted(boards[task], key=lambda row: -row["weighted_f1"])
        rows += floors.get(task, [])
        sets = {run.result[task].get("data_set") for runs in systems.values() for run in runs if task in run.result}
        beside = [figure for known in sorted(map(str, sets)) for figure in figures_beside(task, known)]
        rows += [{"task": task, "kind": "published"} | figure for figure in beside]
    _test(rows, members, draws)
    return rows


def _read(path: Path) -> _Run:
    directory, file = (path.parent, path) if path.suffix == ".json" else (path, path / EVALUATION)
    result, answers = read_stated(file)
    for place in (directory, directory.absolute().parent):
        if (place / "run.json").is_file():
            if (recipe := _recipe_of(place, result, own=place == directory)) is not None:
                return _Run(place, result, recipe, answers)
            break
    return _Run(directory, result, None, answers)


def _recipe_of(place: Path, result: Mapping[str, Any], own: bool) -> dict[str, Any] | None:
    """The recipe of the run in ``place``, if it was this run that answered: in a folder below (not ``own``) may stand
    what another model said to the same records, such as its base."""
    noted = read_json(place / "run.json")
    recipe, stages = noted.get("recipe"), noted.get("stages")
    if not isinstance(recipe, dict) or not isinstance(stages, dict):
        return None
    adapter = final_adapter(stages)
    its = adapter is not None and all(entry.get("adapter") == adapter for entry in result.values())
    return recipe if its or (own and "generate" in stages) else None


def _systems(runs: Sequence[_Run]) -> dict[str, list[_Run]]:
    """The runs by the name of their system, in the order given."""
    groups: dict[str, list[_Run]] = {}
    for number, run in enumerate(runs):
        key = f"run {number}"
        if run.recipe is not None:
            sizes = {task: [scores["n"] for _, scores in readings(entry)] for task, entry in run.result.items()}
            recipe = {name: value for name, value in run.recipe.items() if name != "seed"}
            key = json.dumps([recipe, sizes], sort_keys=True)
            while any(_no_other_seed(run, other) for other in groups.get(key, ())):
                key += "again"
        groups.setdefault(key, []).append(run)
    named: dict[str, list[_Run]] = {}
    for group in groups.values():
        name = _name([run.directory for run in group])
        if name in named and _other_tasks(named[name], group):
            named[name] = [*named[name], *group]
            continue
        if name in named:
            name = f"{group[0].directory.absolute().parent.name}/{name}"
        while name in named:
            name += "+"
        named[name] = group
    return named


def _no_other_seed(run: _Run, other: _Run) -> bool:
    """Whether a run of the same recipe is none with another seed: the same one again, answers of the same model under
    another name, or answers to other records (what ``data.root`` names may be another since)."""
    mine, theirs = ({(reading, task): said for reading, by in one.answers.items() for task, said in by.items()}
                    for one in (run, other))  # fmt: skip
    models = [{answer.by for said in answered.values() for answer in said} - {None} for answered in (mine, theirs)]
    asked = [[sorted((a.record.id, a.record.post, a.record.gold) for a in answered[key])
              for key in sorted(mine.keys() & theirs.keys())] for answered in (mine, theirs)]  # fmt: skip
    return run.seed == other.seed or bool(models[0] & models[1]) or asked[0] != asked[1]


def _other_tasks(runs: Sequence[_Run], group: Sequence[_Run]) -> bool:
    """Whether ``group`` is of the same runs, asked something else."""
    return {run.directory for run in runs} >= {run.directory for run in group} and not (
        {task for run in runs for task in run.result} & {task for run in group for task in run.result}
    )


def _name(directories: Sequence[Path]) -> str:
    """What several directories have in common, numbers of seeds left out: ``a-s0`` and ``a-s1`` are ``a``, and so are
    ``a/seed-0`` and ``a/seed-1``."""
    names = [directory.absolute().name for directory in directories]
    if len(names) == 1 and not re.fullmatch(r"(?:seed|s)?[-_.=, ]*\d+", names[0], re.IGNORECASE):
        return names[0]
    shared = len([None for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*names, strict=False))])
    return _SEED.sub("", names[0][:shared]) or directories[0].absolute().parent.name


def _row(task: str, system: str, kind: str, reading: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task, "system": system, "kind": kind, "reading": reading, "n": scores[0]["n"]}
    row |= {metric: statistics.fmean(one[metric] for one in scores) for metric in METRICS}
    alone = len(scores) == 1
    low, high = scores[0]["ci95"]
    row["ci95"] = [low, high] if alone else None
    row["sd"] = None if alone else {metric: statistics.stdev(one[metric] for one in scores) for metric in METRICS}
    return row


def _test(rows: Sequence[dict[str, Any]], members: Mapping[int, Sequence[_Run]], draws: int) -> None:
    """Fills in ``against_best``."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    tests = []
    for row in rows:
        if row["kind"] != "run":
            continue
        place = row["task"], row["reading"]
        first = best.setdefault(place, row)
        if first is row:
            continue
        sides = [[run.answers.get(row["reading"], {}).get(row["task"]) for run in members[id(side)]]
                 for side in (row, first)]  # fmt: skip
        if (found := _difference(row["task"], sides[0], sides[1], draws)) is not None:
            row["against_best"] = found
            tests.append(found)
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted


def _difference(
    name: str, system: Sequence[list[Answer] | None], other: Sequence[list[Answer] | None], draws: int
) -> dict[str, Any] | None:
    task, together = tasks.get_task(name), [*system, *other]
    if not system or system[0] is None:
        return None
    try:
        whole = [aligned(system[0], side)[1] for side in together if side is not None]
    except InputError:  # answers to other records
        return None
    if len(whole) < len(together):
        return None
    gold = indicator(task, [answer.record.gold for answer in system[0]])
    said = np.stack([indicator(task, [answer.labels for answer in side]) for side in whole])
    posts = [answer.record.post for answer in system[0]]
    mine, theirs = said[: len(system)], said[len(system) :]
    return paired_bootstrap(task.arity, posts, gold, mine, theirs, draws, positive=positive_place(task))[METRICS[0]]


def formatted(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """``leaderboard_rows`` as one of ``FORMATS``."""
    if form == "json":
        return json.dumps(list(rows), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    return {"markdown": leaderboard_markdown, "csv": _csv, "latex": _latex}[form](rows)


_HEAD = ("task", "system", "reading", "n", "weighted F1", "micro F1", "macro F1", "against the best")


def _cells(row: Mapping[str, Any]) -> list[str]:
    """One row for people, without any mark-up."""
    if row["kind"] == "published":
        figure = f"{row['metric']} {row['value'] / 100:.3f}"
        return [row["task"], f"published: {row['system']}", row["source"], "", figure, "", "", ""]
    name = row["system"] if row["kind"] == "run" else f"floor: {row['system']}"
    shown = [f"{row[metric]:.3f}" for metric in METRICS]
    if row["sd"] is not None:
        shown = [f"{text} ± {row['sd'][metric]:.3f}" for text, metric in zip(shown, METRICS, strict=True)]
        name = f"{name} ({row['runs']} seeds)"
    else:
        shown[0] += f" ({row['ci95'][0]:.3f}–{row['ci95'][1]:.3f})"
    test = row.get("against_best")
    below = "" if test is None else f"{test['difference']:+.3f}, p {test['p_holm']:.2g}"
    return [row["task"], name, row["reading"], str(row["n"]), *shown, below]


def leaderboard_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; published figures stand in italics and are not comparable."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        task, *cells = _cells(row)
        if row["kind"] == "published":
            cells = [f"*{cell}*" if cell else "" for cell in cells]
        else:
            cells = [escaped(cell) for cell in cells]  # a directory may be called anything
        lines.append(f"| {' | '.join([task, *cells])} |")
    return "\n".join(lines) + "\n"


_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}  # fmt: skip


def _latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """A ``tabular`` for the booktabs package; published figures stand in italics."""
    lines = [r"\begin{tabular}{lllrrrrr}", r"\toprule", f"{' & '.join(_HEAD)} \\\\", r"\midrule"]
    for row in rows:
        cells = ["".join(_LATEX.get(c, c) for c in " ".join(seen(cell).split())) for cell in _cells(row)]
        if row["kind"] == "published":
            cells = [cells[0], *(rf"\textit{{{cell}}}" if cell else "" for cell in cells[1:])]
        lines.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_NUMBERS = ("n", "runs", *(f"{metric}{part}" for metric in METRICS for part in ("", "_sd")), "ci95_low", "ci95_high",
            "difference", "p", "p_holm")  # fmt: skip
_COLUMNS = ("task", "system", "kind", "reading", *_NUMBERS, "metric", "value", "source")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every number in a column of its own."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        low, high = row.get("ci95") or (None, None)
        cells = {key: to_cell(value) if isinstance(value, str) else value for key, value in row.items()}
        spread = {f"{metric}_sd": value for metric, value in (row.get("sd") or {}).items()}
        writer.writerow({**cells, **spread, "ci95_low": low, "ci95_high": high, **(row.get("against_best") or {})})
    return out.getvalue()
