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
from mentalglm_jax.evaluate.report import readings
from mentalglm_jax.foreign import short
from mentalglm_jax.text import tasks


def answers_beside(directory: Path) -> dict[str, dict[str, list[Answer]]]:
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
