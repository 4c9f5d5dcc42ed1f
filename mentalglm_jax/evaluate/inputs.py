"""What `mentalglm evaluate` is pointed at: finished answers, or a model and records to answer."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mentalglm_jax.data.held_out import upstream_split
from mentalglm_jax.data.intake.rows import Columns, Faults, read_rows, records_of, with_languages
from mentalglm_jax.data.intake.tabular import TABLES, open_tables
from mentalglm_jax.data.records import SPLITS, Record
from mentalglm_jax.data.roots import iter_record_files, record_files_or_sets
from mentalglm_jax.data.sources import of_task, present
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import read_generations, read_label_scores
from mentalglm_jax.evaluate.calibrated import Scaling
from mentalglm_jax.evaluate.noted import check_noted
from mentalglm_jax.evaluate.readings import score_records
from mentalglm_jax.inference.generate import generate_records, partial_file
from mentalglm_jax.model.fingerprint import model_fingerprint
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer

GENERATIONS, LABEL_SCORES = "generations.jsonl", "label_scores.jsonl"


@dataclass(frozen=True)
class Answers:
    """One system's answers in both readings; either list may be empty."""

    generations: list[dict[str, Any]]
    label_scores: list[dict[str, Any]]

    def of_task(self, task: str | None) -> "Answers":
        """Only the rows of ``task`` (None is all). Raises: InputError if there are none."""
        if task is None:
            return self
        tasks.get_task(task)
        parts = (self.generations, self.label_scores)
        kept = Answers(*([row for row in rows if row["task"] == task] for rows in parts))
        if not kept.generations and not kept.label_scores:
            raise InputError(f"no answer to task {task!r}; there are: {', '.join(self.tasks())}")
        return kept

    def tasks(self) -> list[str]:
        """Names of the tasks that are answered."""
        return list(dict.fromkeys(row["task"] for row in (*self.generations, *self.label_scores)))


def finished(path: Path) -> bool:
    """Whether ``path`` is answers (a ``.jsonl`` file or a directory with one), not a model."""
    return path.suffix == ".jsonl" or any((path / name).is_file() for name in (GENERATIONS, LABEL_SCORES))


def shown_name(model: str) -> str:
    """How a page that others will read calls ``model``: a Hub id as it is, of a path only its end."""
    path = Path(model)
    if not path.exists():
        return path.name if path.is_absolute() else model
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.is_file() else path.name


def read_answers(path: str | Path) -> Answers:
    """The answers in a run directory, in a directory written by `mentalglm evaluate --out`, or in one file; beside a
    ``generations.jsonl``, a ``label_scores.jsonl`` is read too.

    Raises:
        InputError: nothing of the kind is there, a file is damaged, or is not what the run of its directory left.
    """
    path = Path(path)
    if path.suffix != ".jsonl" or path.name in (GENERATIONS, LABEL_SCORES):
        check_noted(path.parent if path.suffix == ".jsonl" else path)
    if path.suffix == ".jsonl":
        if path.name == LABEL_SCORES:
            return Answers([], read_label_scores(path))
        beside = path.with_name(LABEL_SCORES)
        return Answers(read_generations(path), read_label_scores(beside) if beside.is_file() else [])
    if not finished(path):
        raise InputError(f"{path}: neither a .jsonl file nor a directory with {GENERATIONS} or {LABEL_SCORES}")
    texts, values = path / GENERATIONS, path / LABEL_SCORES
    return Answers(read_generations(texts) if texts.is_file() else [],
                   read_label_scores(values) if values.is_file() else [])  # fmt: skip


def answer_records(
    model: Glm, tokenizer: GlmTokenizer, records: Sequence[Record], out: Path, *, max_new_tokens: int | None = None,
    batch_size: int = 32, system: str | None = None, scalings: Mapping[str, Scaling] | None = None,
    progress: Callable[[str], Callable[..., None]] | None = None,
) -> Answers:  # fmt: skip
    """Both readings of ``records`` by ``model``, also written to ``out``; after an interruption the same call has the
    answers generated so far from there (and scores all labels anew, which takes a fraction of the time). The caller
    says when it has done all it wants them for (``forget_partial``): then they are finished, and not written over.

    Labels are scored after the model's own explanations if more than half of its answers begin with one.

    Args:
        system: a system turn before every post; None is the one of its task, if it has one.
        scalings: of tasks; not where ``records`` are those they were fitted on.
        progress: starts a stage and returns its ``progress(done, total)``.

    Raises:
        InputError, RunError: as ``generate_records`` and ``score_records``.
    """
    stage, fingerprint = progress if progress is not None else lambda name: None, model_fingerprint(model)
    rows = generate_records(model, tokenizer, records, out_path=out / GENERATIONS, max_new_tokens=max_new_tokens,
                            batch_size=batch_size, system=system, keep_partial=True, replace=False,
                            fingerprint=fingerprint, progress=stage("generate"))  # fmt: skip
    first = sum(tasks.explains_first(row["task"], row["language"], row["output_text"]) for row in rows)
    values = score_records(model, tokenizer, records, written=rows if 2 * first > len(rows) else None,
                           out_path=out / LABEL_SCORES, batch_size=batch_size, system=system, scalings=scalings,
                           fingerprint=fingerprint, progress=stage("label log-probabilities"))  # fmt: skip
    return Answers(rows, values)


def check_place(out: Path, source: Path | None) -> None:
    """Whether a directory may get a model's answers, or a report on finished ones: none of another may be there.

    Args:
        source: the finished answers (``read_answers``); None: a model will give them.

    Raises: InputError.
    """
    own: set[Path] = set()
    if source is not None:
        beside = source if source.is_dir() else source.parent
        first = beside / GENERATIONS if source.is_dir() or source.name == LABEL_SCORES else source
        own = {first.resolve(), (beside / LABEL_SCORES).resolve()}
    elif partial_file(out / GENERATIONS).exists():  # it goes on
        return
    for path in (out / GENERATIONS, out / LABEL_SCORES):
        if os.path.lexists(path) and path.resolve() not in own:
            raise InputError(f"{path}: is there already, and would be written over, or stand beside scores that are "
                             "not its own; name another --out, or delete it")  # fmt: skip


def read_data(
    path: Path, task: str | None, split: str | None = None, language: str | None = None, sets: Sequence[str] = ()
) -> list[Record]:
    """Records to evaluate on.

    Args:
        path: whatever ``data.root`` of a recipe may name: a file of records or of answers, a folder of records or what
            ``datasets`` saved, a folder of upstream files; or a labelled table (columns ``post`` and ``label``).
        task: only its records; a table needs it.
        split: of upstream files "dev" (20 % of the published training part, by hash of the post; None is this), "test"
            or "train"; of records, those to take. None takes all records where there is one split, and with a warning
            "dev" where there are several. A table has none.
        language: of a table; None: of each post its own.
        sets: upstream data sets to read; without one, with ``task`` the first of ``SOURCES`` that has it, else all.

    Raises:
        InputError: the file is damaged, or holds nothing for ``task`` or in ``split``.
    """
    if split not in (None, *SPLITS):
        raise InputError(f"--split {split!r} is none of {', '.join(SPLITS)}")
    tasks.add_tasks_beside(path)
    if task is not None:
        tasks.get_task(task)
    if not sets and _is_labelled(path):
        if task is None:
            raise InputError(f"{path}: a labelled table needs --task")
        return read_labelled(path, task, language)
    files = record_files_or_sets(path, sets)
    if not files:
        names = sets or (of_task(path, task)[:1] if task is not None else present(path))
        records, split = upstream_split(path, names).records, split or "dev"
    else:
        records = list(iter_record_files(files, allow_extra=True))
        twice = Counter((record.split, record.id) for record in records)
        if repeated := [key for key, count in twice.items() if count > 1]:
            raise InputError(f"{path}: id {repeated[0][1]!r} stands twice among the {repeated[0][0]} records; ids must "
                             "differ")  # fmt: skip
    found = [record for record in records if task in (None, record.task)]
    if not found:
        known = ", ".join(sorted({record.task for record in records}))
        raise InputError(f"{path}: no record of task {task!r}; there are: {known}")
    return _of_split(path, found, split)


def _is_labelled(path: Path) -> bool:
    """Whether the file is a labelled table, or at least a table and no file of an upstream data set."""
    if path.suffix.lower() not in TABLES or not path.is_file():
        return False
    if {"post", "label"} <= {*open_tables(path, ("post", "label"))[0].columns}:
        return True
    try:
        return not present(path)
    except InputError:
        return True


def _of_split(path: Path, records: list[Record], split: str | None) -> list[Record]:
    there = Counter(record.split for record in records)
    if split is None and len(there) == 1:
        return records
    wanted, shown = split or "dev", ", ".join(f"{count} {name}" for name, count in there.items())
    if wanted not in there:
        raise InputError(f"{path}: no {wanted} record; there are: {shown}; name another file, or another --split")
    if split is None:
        warnings.warn(f"{path}: holds {shown} records; the {wanted} ones are taken, --split takes others", stacklevel=3)
    return [record for record in records if record.split == wanted]


def read_labelled(path: Path, task: str, language: str | None = None) -> list[Record]:
    """Records from a table of somebody else's posts, for a task the model was trained on elsewhere (zero-shot).

    The table is of any form that `mentalglm data import` takes, with columns ``post`` and ``label``. A label is a key
    ("high", "mental_filter"), its name in any language of the task ("高", "mental filter") or an alias
    (``Task.spellings``), whatever the language of the posts; several labels are separated by ``;``.

    Args:
        language: in which the posts are asked about; None: the task's only one, else each in the one it is told to be
            in.

    Raises:
        InputError: no table, a column is missing, or rows that cannot be taken, with their numbers.
    """
    chosen, faults = tasks.get_task(task), Faults()
    if language is None and len(chosen.languages) == 1:
        language = chosen.languages[0]
    if language is not None:
        chosen.question(language)
    tables = open_tables(path, ("post", "label"))
    for table in tables:
        table.warn()
    rows = read_rows(tables, Columns("post", "label"), ";", faults)
    if not (total := len(rows) + faults.total):
        raise InputError(f"{path}: holds no row below its header; give at least one")
    found = records_of(with_languages(rows, language), chosen, path.stem, faults)
    faults.refuse(str(path), total, "mend them or delete the rows")
    return [replace(record, split="test") for record, _ in found]
