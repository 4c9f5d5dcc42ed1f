"""From files of answers to (gold, predicted) pairs that cannot lose alignment.

Gold label and answer stand in one row and rows are told apart by id; an answer that could not be read, or is not there,
is a wrong answer, never a dropped one.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.surrogates import whole_texts
from mentalglm_jax.data.tables import read_lines
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.calibrated import scaling_of
from mentalglm_jax.foreign import Fields, parse_json
from mentalglm_jax.text import tasks

# The label log-probability reading of a multi-label task takes the most probable label and all others from here on.
THRESHOLD = 0.25


@dataclass(frozen=True)
class Answer:
    """One row as far as scores need it. ``labels`` is None when the answer could not be read or is missing.

    ``probabilities`` (of the task's labels, in label-table order, summing to 1) are known in the label
    log-probability reading only; ``calibrated`` are those after the scaling that the row says (``calibrated.py``).
    ``by`` is the fingerprint of the model that answered, where the row says it.
    """

    record: Record
    labels: tuple[str, ...] | None
    explanation: str | None
    status: str
    probabilities: tuple[float, ...] | None = None
    calibrated: tuple[float, ...] | None = None
    by: str | None = None


def read_generations(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``generations.jsonl``; blank lines are skipped.

    Raises:
        InputError: the file is missing, not UTF-8, empty, or a line is not a row; the message names file and line.
    """
    return _read_rows(Path(path), "generations.jsonl", generated)


def read_label_scores(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``label_scores.jsonl``. Raises: InputError as ``read_generations``."""
    return _read_rows(Path(path), "label_scores.jsonl", scored)


def _read_rows(path: Path, kind: str, check: Callable[[Mapping[str, Any]], Answer]) -> list[dict[str, Any]]:
    if not path.exists():
        raise InputError(f"{path}: no such file; make it with `mentalglm generate`")
    tasks.add_tasks_beside(path)
    rows = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        hint = f"make this {kind} again: its record is to be answered, too"
        row = whole_texts(parse_json(line, where, hint, half_pairs=True), line, where)
        try:
            if not isinstance(row, dict):
                raise InputError(f"expected a JSON object, got {type(row).__name__}")
            check(row)
        except InputError as error:
            named = str(error).startswith(f"{path}:{number}")
            raise InputError(f"{error}" if named else f"{path}:{number}: {error}") from None
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no row; make it with `mentalglm generate`")
    return rows


def generated(row: Mapping[str, Any]) -> Answer:
    """What a row of ``generations.jsonl`` says: the parsed text reading. Raises: InputError."""
    record = Record.from_dict(row, allow_extra=True)
    if "parsed_label" not in row:
        raise InputError(
            f"record {record.id!r}: field 'parsed_label' is missing; make the file with `mentalglm generate`"
        )
    label, task = row["parsed_label"], tasks.get_task(record.task)
    if label is not None and not isinstance(label, str if task.arity == "single" else list):
        wanted = "one label or null" if task.arity == "single" else "a list of labels or null"
        raise InputError(f"record {record.id!r}: parsed_label {label!r} is not {wanted}")
    try:
        labels = None if label is None else task.ordered([label] if isinstance(label, str) else label)
    except InputError as error:
        raise InputError(f"record {record.id!r}: parsed_label: {error}") from None
    explanation = row.get("parsed_explanation")
    if explanation is not None and not isinstance(explanation, str):
        raise InputError(f"record {record.id!r}: parsed_explanation is {type(explanation).__name__}, not text or null")
    return Answer(record, labels, explanation, str(row.get("parse_status", "")), by=_by(row))


def _by(row: Mapping[str, Any]) -> str | None:
    """Raises: InputError."""
    return Fields(row, f"record {row.get('id')!r}").text("answered_by", None, 80)


def scored(row: Mapping[str, Any], threshold: float = THRESHOLD) -> Answer:
    """What a row of ``label_scores.jsonl`` says: the label log-probability reading.

    ``label_logprobs`` has the log-probability of every label's sentence as the answer. Their softmax over the label set
    gives probabilities; the most probable label is the answer, for multi-label tasks with all others of at least
    ``threshold``.

    Raises:
        InputError: not a record, log-probabilities that are not one finite number for each label of the task, or a
            scaling that is none.
    """
    record = Record.from_dict(row, allow_extra=True)
    task, given = tasks.get_task(record.task), row.get("label_logprobs")
    if not isinstance(given, Mapping) or set(given) != set(task.keys):
        raise InputError(
            f"record {record.id!r}: label_logprobs must have one number for each of {', '.join(task.keys)}; "
            "make the file with `mentalglm evaluate MODEL --out DIR`"
        )
    if not all(type(value) in (int, float) and math.isfinite(value) for value in given.values()):
        raise InputError(f"record {record.id!r}: label_logprobs: a value is not a finite number")
    values = np.asarray([given[key] for key in task.keys], float)
    probabilities, scaling = softmax(values), scaling_of(row)
    best = int(probabilities.argmax())
    chosen = [key for place, key in enumerate(task.keys)
              if place == best or (task.arity == "multi" and probabilities[place] >= threshold)]  # fmt: skip
    calibrated = None if scaling is None else tuple(scaling.probabilities(values).tolist())
    return Answer(record, tuple(chosen), None, "scored", tuple(probabilities.tolist()), calibrated, _by(row))


def softmax(scores: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """Probabilities proportional to exp(scores)."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def expected_records(*readings: Iterable[Answer]) -> list[Record]:
    """The records answered in any reading of one system, each once: what is not in one of them is missing there.

    Raises:
        InputError: two readings state different tasks, posts or gold labels for one id, or are of two models.
    """
    found: dict[str, Record] = {}
    models: dict[str, str] = {}
    for answer in itertools.chain(*readings):
        one, other = found.setdefault(answer.record.id, answer.record), answer.record
        if answer.by is not None and models.setdefault(one.id, answer.by) != answer.by:
            raise InputError(f"record {one.id!r}: its parsed answer is of another model than its label-scored one "
                             f"({models[one.id]} and {answer.by}); make both with one `mentalglm evaluate MODEL --out "
                             "DIR`")  # fmt: skip
        if (one.task, one.post, one.gold) != (other.task, other.post, other.gold):
            raise InputError(f"record {one.id!r}: its parsed and its label-scored answer have different tasks, posts "
                             "or gold labels; make both with one `mentalglm evaluate MODEL --out DIR`")  # fmt: skip
    return list(found.values())


def by_task(answers: Iterable[Answer], records: Iterable[Record] | None = None) -> dict[str, list[Answer]]:
    """Answers by task, one per record: ids met twice or not asked for are refused, records without row are failures.

    Args:
        answers: in any order.
        records: what should have been answered; default: the answers' own records.

    Raises:
        InputError: an id occurs twice, is not among ``records``, or has another task or post there.
    """
    found: dict[str, Answer] = {}
    for answer in answers:
        if answer.record.id in found:
            raise InputError(f"record {answer.record.id!r} is answered twice; ids must differ")
        found[answer.record.id] = answer
    if records is not None:
        expected: dict[str, Record] = {}
        for record in records:
            if expected.setdefault(record.id, record) is not record:
                raise InputError(f"record {record.id!r} is given twice; ids must differ")
        if extra := [i for i in found if i not in expected]:
            raise InputError(f"record {extra[0]!r} is answered but not among the records to evaluate on")
        for i, answer in found.items():
            if (answer.record.task, answer.record.post) != (expected[i].task, expected[i].post):
                raise InputError(f"record {i!r}: the answer is to another task or post than the record to evaluate on")
        found = {
            i: replace(found[i], record=record) if i in found else Answer(record, None, None, "missing")
            for i, record in expected.items()
        }
    groups: dict[str, list[Answer]] = {}
    for answer in found.values():
        groups.setdefault(answer.record.task, []).append(answer)
    return {name: groups[name] for name in tasks.TASKS if name in groups}
