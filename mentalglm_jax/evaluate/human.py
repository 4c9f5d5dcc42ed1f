"""What people said about a model's explanations: an imported review form, beside the automatic scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.explain.review import form_id
from mentalglm_jax.data.records import read_records
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.foreign import parse_json, read_text


def human_ratings(folder: str | Path, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """The ratings of these answers per task, as `mentalglm data review import` left them in ``folder``; a form may ask
    about other tasks, too.

    Args:
        answers: the parsed text reading of the run that was rated.

    Returns:
        Task to ``raters`` (number), ``items``, ``rated``, ``accepted`` and ``agreement``: per scale mean, Fleiss'
        kappa, Krippendorff's ordinal alpha (``data.review.agreement``).

    Raises:
        InputError: nothing was imported there, or of another form, or what was rated is not what these answers say.
    """
    folder = Path(folder)
    file = folder / "agreement.json"
    try:
        found = parse_json(read_text(file), str(file), "run `mentalglm data review import` again")
    except OSError as error:
        raise InputError(f"{file}: cannot read ({error.strerror}); run `mentalglm data review import {folder} FILES` "
                         "first") from None  # fmt: skip
    if not _is_whole(found):
        raise InputError(f"{file}: not what `mentalglm data review import` writes; run it again")
    raters, by_task = len(found["raters"]), found["tasks"]
    said, asked = {answer.record.id: answer for answer in answers}, {answer.record.task for answer in answers}
    sample = read_records(folder / "sample.jsonl")
    if found.get("form") != form_id(sample):
        raise InputError(f"{file}: is of another form than sample.jsonl beside it; run `mentalglm data review import "
                         f"{folder} FILES` again")  # fmt: skip
    if not asked & {record.task for record in sample}:
        raise InputError(f"{folder}: nothing was rated of {', '.join(sorted(asked)) or 'these answers'}; export the "
                         "form from this run's generations.jsonl")  # fmt: skip
    for record in (record for record in sample if record.task in asked):
        answer = said.get(record.id)
        if answer is None or (answer.labels, answer.explanation) != (record.gold, record.explanation):
            raise InputError(f"{folder}: record {record.id!r} was rated with another answer than this run gives; "
                             "export the form from this run's generations.jsonl")  # fmt: skip
    return {task: {"raters": raters, **entry} for task, entry in by_task.items() if task in asked}


def _is_whole(found: Any) -> bool:
    """Whether all is there that a page shows: numbers, or null where a figure is undefined."""

    def counted(value: Any) -> bool:
        return type(value) is int and value >= 0

    def figures(scale: Any) -> bool:
        return isinstance(scale, dict) and counted(scale.get("ratings")) and all(
            scale.get(name) is None or type(scale[name]) in (int, float)
            for name in ("mean", "fleiss_kappa", "krippendorff_alpha")
        )  # fmt: skip

    def entry(one: Any) -> bool:
        numbers = isinstance(one, dict) and all(counted(one.get(name)) for name in ("items", "rated", "accepted"))
        found = one.get("agreement") if numbers else None
        return isinstance(found, dict) and all(map(figures, found.values()))

    return (isinstance(found, dict) and isinstance(found.get("raters"), list)
            and isinstance(found.get("tasks"), dict) and all(map(entry, found["tasks"].values())))  # fmt: skip
