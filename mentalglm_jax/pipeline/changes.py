"""What a run does about a recipe that is not the one it was begun with (``--allow-changed``)."""

from collections.abc import Callable, Mapping
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.train.checkpoint import differences, few
from mentalglm_jax.train.recipe import EarlyStopping, Recipe, StageSection, what_it_is

# What a stage that is done again makes out of date.
_AFTER_TRAINING = ("train control", "export", "verify", "generate", "evaluate", "probe", "summary")
_OUTDATED = {
    "train control": ("probe", "summary"), "export": ("verify", "probe", "summary"), "verify": ("summary",),
    "generate": ("evaluate", "probe", "summary"), "evaluate": ("summary",), "probe": ("summary",), "summary": (),
}  # fmt: skip


def outdated(stage: str) -> tuple[str, ...]:
    """The stages whose results rest on that of ``stage``; what was trained on from it is left to ``reopened``."""
    return _OUTDATED.get(stage, _AFTER_TRAINING)


def reopened(
    old: Recipe, new: Recipe, finished: Mapping[str, Mapping[str, Any]], begun: Callable[[str], bool]
) -> list[str]:
    """The finished stages that ``new`` asks more of than ``old`` did: they are no longer finished.

    A training stage is one if it is longer now, and nothing stands on it yet. All others stay as they were made.

    Args:
        old: the recipe of the run so far.
        new: the recipe it is to go on with.
        finished: what each finished stage found.
        begun: whether a training stage has left anything.

    Raises:
        InputError: a stage cannot be made longer; or the stages that have begun are not the first ones any more.
    """
    names = [stage.name for stage in old.stages if begun(stage.name)]
    if [stage.name for stage in new.stages][: len(names)] != names:
        raise InputError(
            f"stages: {', '.join(names)} began, each from the adapter of the one before, so the recipe must go on with "
            "them first; add new stages after them, or choose another run_dir"
        )
    again = []
    for place, (before, stage) in enumerate(zip(old.stages, new.stages, strict=False)):
        result = finished.get(f"train {stage.name}")
        if result is None or before.name != stage.name:
            continue
        if _asks_more(before, stage, result):
            if follower := next((later.name for later in new.stages[place + 1 :] if begun(later.name)), None):
                raise InputError(f"stages.{stage.name} is finished, and stage {follower} began from its adapter, so it "
                                 "cannot be longer now; make the last stage longer, add one, or choose another "
                                 "run_dir")  # fmt: skip
            again.append(f"train {stage.name}")
    if old.probe.control != new.probe.control:
        again.append("train control")
    if old.generate.model_copy(update={"label_scores": True}) != new.generate.model_copy(update={"label_scores": True}):
        again.append("generate")
    if old.generate != new.generate:
        again.append("evaluate")
    if what_it_is(old)["probe"] != what_it_is(new)["probe"]:
        again.append("probe")
    return [name for name in again if name in finished]


def _asks_more(before: StageSection, stage: StageSection, result: Mapping[str, Any]) -> bool:
    old, new, where = before.train, stage.train, f"stages.{stage.name}.train"
    if (old.steps is None) != (new.steps is None):
        unit = "epochs" if old.steps is None else "steps"
        raise InputError(f"{where}: the stage is finished; say in {unit}, as before, how long it is to be now")
    lengths = [(x.steps if x.steps is not None else x.epochs) or 0 for x in (old, new)]
    longer = lengths[1] > lengths[0]
    if _number(result, "steps") < _number(result, "planned"):  # the rest of its schedule is still to come
        if _more_patience(old.early_stopping, new.early_stopping):
            return True
        if longer:
            raise InputError(f"{where}: early stopping ended this stage at step {result['steps']} of "
                             f"{result['planned']}; raise early_stopping.patience to train on")  # fmt: skip
        return False
    if longer and (old.schedule, new.schedule) != ("constant", "constant"):
        raise InputError(
            f"{where}: the stage has ended, and its {old.schedule} schedule with it (learning rate 0), so it cannot be "
            "longer now. Add a stage after it, which starts from its adapter with a schedule of its own, or choose "
            "another run_dir; schedule: constant can be made longer"
        )
    return longer


def _number(result: Mapping[str, Any], name: str) -> float:
    value = result.get(name, 0)  # run.json is there to be edited
    return float(value) if isinstance(value, int | float) else 0.0


def _more_patience(old: EarlyStopping | None, new: EarlyStopping | None) -> bool:
    return old is not None and (new is None or new.patience > old.patience)


def nothing_left(old: Recipe, new: Recipe) -> InputError:
    """The refusal of a recipe whose changes reach nothing that is still to be done."""
    changed = differences(what_it_is(old), what_it_is(new))
    return InputError(
        f"{new.run_dir}: nothing was done: every stage is finished, and stays as it is ({few(changed, 3)}). "
        "A last stage can be made longer and stages added (docs/training.md); for all else choose another run_dir, or "
        "--restart"
    )
