"""More than a grid: Optuna proposes the values of the next runs by the development scores of those before.

The study is a file beside the runs, so the same search goes on where it stopped; what a run found is in the run itself.
"""

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError, MentalGLMError, RunError, install
from mentalglm_jax.files import make_dir, working_on, write_json
from mentalglm_jax.foreign import first_line, some
from mentalglm_jax.pipeline.same_inputs import check_alike, check_now
from mentalglm_jax.pipeline.sweep import Point, Start, collected, is_done, make_points, split_values, sweep
from mentalglm_jax.train.recipe import load_recipe, what_it_is

JOURNAL = "optuna.journal"
_OF = "recipe"  # attribute of the study: a digest of what its scores are of
_FORM = "write it as KEY=log:LOW:HIGH, KEY=float:LOW:HIGH, KEY=int:LOW:HIGH or KEY=value,value"


def load_optuna() -> Any:
    """Raises: InputError if the [sweep] extra is not installed."""
    try:
        import optuna
    except ImportError:
        raise InputError(f"--search needs the sweep extra: {install('sweep')}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def read_spaces(texts: Sequence[str]) -> dict[str, Any]:
    """Key to Optuna distribution.

    Raises:
        InputError: none is given, one is of no known form, or a key is given twice.
    """
    if not texts:
        raise InputError(f"--search needs --space; {_FORM}")
    spaces = dict(_space(text) for text in texts)
    if len(spaces) < len(texts):
        raise InputError("--space: a key is given twice")
    return spaces


def _space(text: str) -> tuple[str, Any]:
    distributions = load_optuna().distributions
    key, equals, rest = text.partition("=")
    kind, *ends = rest.split(":")
    if not equals or not key or not rest:
        raise InputError(f"--space {key[:200]}: {_FORM}")
    if kind not in ("log", "float", "int"):
        return key, distributions.CategoricalDistribution([value.strip() for value in split_values(rest)])
    try:
        low, high = (int(end) if kind == "int" else float(end) for end in ends)
    except ValueError:
        raise InputError(f"--space {key[:200]}: {_FORM}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and (kind != "log" or low > 0)):
        raise InputError(f"--space {key[:200]}: from {low} to {high} is no {kind} range")
    if kind == "int":
        return key, distributions.IntDistribution(low, high)
    return key, distributions.FloatDistribution(low, high, log=kind == "log")


def search(
    recipe_file: Path, spaces: Mapping[str, Any], trials: int, *, seeds: int = 1, out: Path | None = None,
    overrides: Sequence[str] = (), jobs: int = 1, say: Callable[[str], None], start: Start | None = None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Carries out ``trials`` proposals of Optuna's default sampler, seeded by the recipe, one after the other.

    Args:
        recipe_file, seeds, out, overrides, jobs, say, start: as for ``sweep``; a trial's score is the mean over seeds.
        spaces: ``read_spaces``.
        trials: in all, those before an interruption included; one that fails counts.

    Returns:
        The directory, and ``sweep``'s result over all trials.

    Raises:
        InputError: the last stage has no ``eval_every``, so nothing says which values are good; what is in the
            directory is of another recipe, or of other inputs than there are now; or as ``make_points``.
        Interrupted, Preempted: the same call continues.
    """
    optuna, base = load_optuna(), load_recipe(recipe_file, overrides)
    last = base.stages[-1]
    if last.train.eval_every is None:
        raise InputError(f"--search goes by the development score of the last stage: set stages.{last.name}.train."
                         "eval_every")  # fmt: skip

    def points_of(values: Mapping[str, Any]) -> tuple[Path, list[Point]]:
        return make_points(recipe_file, [f"{key}={value}" for key, value in values.items()], seeds, out, overrides)

    where, _ = points_of(
        {key: getattr(space, "low", None) or space.to_external_repr(0) for key, space in spaces.items()}
    )
    make_dir(where, private=True)
    file = where / JOURNAL
    if file.is_symlink() or (file.exists() and not file.is_file()):  # a pipe would be waited for
        raise InputError(f"{file}: is not a file of this search but a link, a pipe or a directory; remove it")
    states, direction = optuna.trial.TrialState, "minimize" if last.train.best_by == "loss" else "maximize"
    with _journal(file):
        backend = optuna.storages.journal.JournalFileBackend(str(file), _Held())
        study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="sweep",
                                    load_if_exists=True, direction=direction)  # fmt: skip
        # Begun anew with the same seed, a sampler would draw again what it drew first.
        study.sampler = optuna.samplers.TPESampler(seed=base.seed + len(study.trials))
        # Scores of another recipe would lead the search, and its direction stays that of the first call.
        asked = json.dumps([what_it_is(base), seeds], sort_keys=True)
        mine = hashlib.sha256(asked.encode()).hexdigest()
        if (theirs := study.user_attrs.get(_OF)) is None:
            study.set_user_attr(_OF, mine)
    if theirs not in (None, mine):
        raise InputError(f"{file}: is of another search, its recipe or --seeds were others; choose another --out")
    if foreign := sorted({key for one in study.trials for key in one.params} - spaces.keys()):
        raise InputError(f"{file}: is of another search, it has values of {some(foreign)}; choose another --out")
    every: dict[str, Point] = {}
    for one in study.trials:
        with contextlib.suppress(InputError):
            every |= {point.label: point for point in points_of(one.params)[1]}
    check_now([point.recipe for point in every.values()], where)
    while True:
        with _journal(file):
            under_way = [one for one in study.trials if one.state == states.RUNNING]
            if not under_way and len(study.trials) >= trials:
                break
            # One that was under way when the search was stopped goes first, with the values it had.
            trial = under_way[0] if under_way else study.ask(dict(spaces))
        scores: list[float] = []
        try:
            _, points = points_of(trial.params)
        except InputError as error:  # values that do not go together are no good ones
            shown, points = f"failed: {error}", []
        else:
            found = sweep(recipe_file, where, points, jobs=jobs, say=say, start=start)["points"]
            every |= {point.label: point for point in points}
            check_alike([point.recipe for point in every.values()])  # before the study learns what this one scored
            scores = [score for row in found for score in (row["development"] or {}).values()]
            shown = f"development {last.train.best_by} {statistics.fmean(scores):.4f}" if scores else "failed"
        with _journal(file):
            if scores and len(scores) == len(points):
                study.tell(trial.number, statistics.fmean(scores))
            else:
                # The sampler forgets a trial called failed, and proposes the like again; this is the worst there is.
                study.tell(trial.number, state=states.PRUNED)
        say(f"trial {trial.number + 1} of {trials}: {shown}")
    check_alike([point.recipe for point in every.values()])
    points = list(every.values())
    result = collected(points, {point.label: "failed; its log stands beside it" for point in points
                                if not is_done(point)})  # fmt: skip
    write_json(where / "sweep.json", result)
    return where, result


class _Held:
    """In place of Optuna's own lock, for which it waits for ever where a killed process, or a stranger, left one.
    ``_journal`` holds ours."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextlib.contextmanager
def _journal(file: Path) -> Iterator[None]:
    """Nobody else is at the study's file meanwhile. What goes wrong with it, in one line."""
    try:
        with working_on(file):
            yield
    except MentalGLMError:
        raise
    except OSError as error:
        raise RunError(f"{file}: cannot write ({error.strerror or error})") from error
    except Exception as error:  # Optuna raises many kinds of a file that it did not write, AssertionError among them
        raise InputError(f"{file}: is of another search, or damaged ({first_line(error)}); choose another "
                         "--out") from error  # fmt: skip
