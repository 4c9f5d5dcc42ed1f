"""Whether scores that were written down are those of the answers beside them: a page of scores can be edited, or be of
answers that were made again since."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer, by_task, expected_records, generated, scored
from mentalglm_jax.evaluate.inputs import finished, read_answers
from mentalglm_jax.evaluate.metrics import METRICS, indicator, task_scores
from mentalglm_jax.evaluate.noted import check_noted
from mentalglm_jax.evaluate.report import readings
from mentalglm_jax.foreign import Fields, parse_json, read_text, short
from mentalglm_jax.text import tasks

EVALUATION = "evaluation.json"
_HINT = "make it with `mentalglm evaluate --out DIR`"
Readings = dict[str, dict[str, list[Answer]]]


def read_stated(file: Path) -> tuple[dict[str, Any], Readings]:
    """The result of ``evaluate`` that was written to ``file``, as far as tables and cards quote it, and the answers
    beside it (``answers_beside``), of which its scores are.

    Raises:
        InputError: the file is missing, is not an evaluation, or is not of these answers; or these are not what the
            stages of the run in its directory left.
    """
    check_noted(file.parent)
    try:
        tasks.add_tasks_beside(file)
        result = parse_json(read_text(file), str(file), _HINT)
    except OSError as error:
        raise InputError(f"{file}: cannot read ({error.strerror}); {_HINT}") from None
    if not isinstance(result, dict):
        raise InputError(f"{file}: not an evaluation; {_HINT}")
    for task, entry in result.items():
        tasks.get_task(task)
        try:
            _check_entry(entry, f"{file}: {task}")
        except InputError as error:
            raise InputError(f"{error}; {_HINT}") from None
    answers = answers_beside(file.parent)
    check_stated(file, result, answers)
    return result, answers


def _check_entry(entry: Any, where: str) -> None:
    """Raises: InputError unless there is all that the rows of a task need."""
    fields = _fields(entry, where)
    fields.text("data_set", None)
    for floor, scores in fields.mapping("floors").items():
        _check_scores(_fields(scores, f"{where}: floor {short(floor)}"))
    if fields.integer("n", 0, 2**53) > 0:
        _check_reading(fields)
    if entry.setdefault("label_reading", None):
        _check_reading(_fields(entry["label_reading"], f"{where}: label_reading"))


def _fields(raw: Any, where: str) -> Fields:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: not an evaluation")
    return Fields(raw, where)


def _check_reading(fields: Fields) -> None:
    _check_scores(fields)
    fields.number("parse_failure_rate", 0.0, 1.0, None)
    fields.integer("cut_off", 0, 2**53, None)


def _check_scores(fields: Fields) -> None:
    fields.integer("n", 1, 2**53)
    for metric in METRICS:
        fields.number(metric, 0.0, 1.0)
    ends = fields.raw.get("ci95")
    if not (isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)):
        raise fields.wrong("ci95", "two numbers")


def answers_beside(directory: Path) -> Readings:
    """Reading ("text", "label") to task to what is answered; empty where no answers are in ``directory``.

    Raises:
        InputError: they are damaged, or of two models.
    """
    if not finished(directory):
        return {}
    found = read_answers(directory)
    sides = list(map(generated, found.generations)), list(map(scored, found.label_scores))
    records = expected_records(*sides)
    return {name: by_task(said, records) for name, said in zip(("text", "label"), sides, strict=True) if said}


def check_stated(
    file: Path, result: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, list[Answer]]]
) -> None:
    """Whether n and the F1 of all tasks and readings are those of ``answers``, as far as these are there.

    Args:
        file: where ``result`` (of ``evaluate``) was read.
        answers: of ``answers_beside``.

    Raises:
        InputError: they are not.
    """
    for name, entry in result.items() if answers else ():
        for reading, stated in readings(entry):
            if (said := answers.get(reading, {}).get(name)) is None:
                continue
            task = tasks.get_task(name)
            gold, predicted = ([*map(of, said)] for of in (lambda one: one.record.gold, lambda one: one.labels))
            found = task_scores(task, indicator(task, gold), indicator(task, predicted))
            for metric in ("n", *METRICS):
                if not _same(stated.get(metric), found[metric]):
                    raise InputError(
                        f"{file}: {name}: {metric} is {short(stated.get(metric))} in the {reading} reading, the "
                        f"answers beside it give {found[metric]:.6g}; make it again with `mentalglm evaluate "
                        f"{file.parent} --out {file.parent}`, or keep it apart from answers that are not its own"
                    )  # fmt: skip


def _same(stated: Any, found: int | float) -> bool:
    return type(stated) in (int, float) and math.isclose(stated, found, abs_tol=1e-9)
