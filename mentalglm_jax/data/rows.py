"""From the rows of an upstream file to records."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mentalglm_jax.data.records import Record, Span
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks


class Row(NamedTuple):
    """What a row of a file says; ``question`` None stands for the task's own."""

    line: int
    post: str
    labels: tuple[str, ...]
    explanation: str | None = None
    question: str | None = None
    rationales: tuple[Span, ...] | None = None  # in the post without white space at its ends


def make_records(
    path: Path, rows: Iterable[Row], *, source: str, task: str, language: str, split: str
) -> Iterator[Record]:
    """Records of one file, one at a time; ids count its rows. Raises: InputError on an empty post or no row at all."""
    single = tasks.TASKS[task].arity == "single"
    number = -1
    for number, row in enumerate(rows):
        if not row.post.strip():
            raise InputError(f"{path}:{row.line}: the post is empty; fill it in or delete the row")
        yield Record(
            id=f"{source}-{split}-{number:05d}",
            task=task,
            language=language,
            post=row.post.strip(),
            question=row.question or tasks.TASKS[task].question(language),
            label=row.labels[0] if single else None,
            labels=None if single else row.labels,
            explanation=row.explanation,
            source=source,
            split=split,
            rationales=row.rationales,
        )
    if number < 0:
        raise InputError(f"{path}: holds no row; is the download complete?")


def shown(value: object) -> str:
    """A label as found; anything long may be a post in the wrong column, which is not shown."""
    text = str(value).strip()
    if not text:
        return "nothing (a row with no label)"
    return repr(text) if len(text) <= 12 else f"text of {len(text)} characters"
