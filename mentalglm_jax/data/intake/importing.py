"""A table that somebody made becomes records with a split, a datasheet and a recipe that trains on them.

Every row is looked at before anything is written. A row that cannot be taken (no post, no label, an unknown label, an
id that stands twice, a language the task is not asked in, cells that do not fit the header) is counted and named by its
number; such rows are refused, or left out where the user says so, never mended.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from mentalglm_jax.data.contacts import find_contacts, scrub_record
from mentalglm_jax.data.intake.new_task import make_task
from mentalglm_jax.data.intake.output import RECIPE, write_import
from mentalglm_jax.data.intake.rows import Columns, Faults, Row, read_rows, records_of, with_languages, with_own_ids
from mentalglm_jax.data.intake.tabular import open_tables
from mentalglm_jax.data.records import SPLITS, Record
from mentalglm_jax.data.splits import bare_post, clusters, grouped_split, joined, without_held_out
from mentalglm_jax.data.written import check_replaceable
from mentalglm_jax.errors import InputError, nearest
from mentalglm_jax.files import refuse_inputs
from mentalglm_jax.text import tasks

SHARES = (80.0, 10.0, 10.0)
_NO_NAME = re.compile(r"[^\w-]+")
_LEAVE_OUT = "mend them, or leave them out with --skip-bad-rows"


@dataclass(frozen=True)
class Choices:
    """How a table is taken.

    ``task``: a known one, or the name of the one that is made of the labels found. ``separator``: between several
    labels of one cell. ``language``: of all posts (None: each post's own). ``shares``: of train, dev and test, in per
    cent (None: the splits that the files name, else ``SHARES``). ``skip``: rows that cannot be taken. ``scrub``:
    contact details become placeholders. ``encoding``, ``sheet``, ``config``: as in ``open_tables``. ``model``: what the
    recipe trains.
    """

    task: str | None = None
    separator: str | None = None
    language: str | None = None
    shares: tuple[float, ...] | None = None
    seed: int = 0
    skip: bool = False
    scrub: bool = False
    encoding: str | None = None
    sheet: str | None = None
    config: str | None = None
    model: str = "zai-org/glm-4-9b-hf"


def read_shares(text: str) -> tuple[float, ...]:
    """``80/10/10`` as numbers. Raises: InputError unless they are three, of train, dev and test, and 100 together."""
    try:
        shares = tuple(float(part) for part in text.split("/"))
    except ValueError:
        shares = ()
    if len(shares) != 3 or not all(0 <= share <= 100 for share in shares) or abs(sum(shares) - 100) > 1e-6:
        raise InputError(f"--split {text!r}: write per cent of train, dev and test that make 100, e.g. 80/10/10")
    if not shares[0]:
        raise InputError(f"--split {text!r}: nothing would be left to train on")
    return shares


def import_table(source: str | Path, out: Path, columns: Columns, choices: Choices | None = None) -> dict[str, Any]:
    """Reads ``source``, writes records, recipe, datasheet and, where it is new, the task to the folder ``out``.

    Args:
        source: as in ``open_tables``.
        out: replaced if it holds an unchanged import, refused if it holds anything else.

    Returns:
        The manifest: what was found and done, JSON-ready, without a post; its ``notes`` are sentences for the user.

    Raises:
        InputError: no table, no such column, rows that cannot be taken (see above), labels that make no task, or
            ``out`` holds something else.
        RunError: ``out`` cannot be written.
    """
    choices = choices or Choices()
    if choices.separator == "":
        raise InputError("--sep: is empty; write what stands between two labels of one cell, e.g. ';'")
    if columns.text == columns.label:
        raise InputError(f"--text and --label both name column {columns.text!r}; the posts are in another one")
    if not os.fsencode(out).decode("utf-8", "replace").isprintable():
        raise InputError(f"--out {str(out)!r}: choose a name that can be printed; the recipe repeats it")
    check_replaceable(out)
    refuse_inputs(out, {"the table": source})
    tables = open_tables(source, columns.named, encoding=choices.encoding, sheet=choices.sheet, config=choices.config)
    name, faults = _name(source), Faults()
    rows = read_rows(tables, columns, choices.separator, faults)
    if not (total := len(rows) + faults.total):
        raise InputError(f"{source}: holds no row below its header; give at least one")
    notes = [f"{PurePath(table.name).name}: {', '.join(table.notes)}" for table in tables if table.notes]
    rows = with_languages(with_own_ids(rows, notes), choices.language)
    try:
        task, new = _task(choices.task, name, rows, choices.separator, str(source))
    except InputError:
        if not choices.skip:  # what is wrong with rows is said first
            faults.refuse(str(source), total, _LEAVE_OUT)
        raise
    found = records_of(rows, task, name, faults)
    if not choices.skip:
        faults.refuse(str(source), total, _LEAVE_OUT)
    if not found:
        raise InputError(f"{source}: none of its {total} rows can be taken: {faults.line()}")
    if faults.places:
        notes.append(f"{faults.total} of {total} rows are left out: {faults.line()}")
    if new and choices.task is not None and (meant := nearest(choices.task, tasks.BUILT_IN)):
        notes.append(f"task {choices.task!r} is new{meant}")
    records, gone = _split(found, choices, notes)
    contacts = sum(bool(find_contacts(record.post) or find_contacts(record.explanation or "")) for record in records)
    if contacts:
        done = "replaced by placeholders" if choices.scrub else "left as they are (--scrub-contacts replaces them)"
        notes.append(f"rows with contact details: {contacts}, {done}")
    if choices.scrub:
        records = [scrub_record(record) for record in records]
    languages = Counter(record.language for record in records)
    facts = {
        "source": {"name": name}, "columns": {key: value for key, value in vars(columns).items() if value is not None},
        "task": task.name, "own_task": task.name not in tasks.BUILT_IN, "rows": total,
        "bad_rows": {reason: len(places) for reason, places in faults.places.items()},
        "left_out": dict(gone), "languages": dict(languages.most_common()), "splits": _counts(records),
        "explanations": sum(record.explanation is not None for record in records), "contact_rows": contacts,
        "seed": choices.seed, "notes": notes,
    }  # fmt: skip
    return write_import(out, records, task, facts, model=choices.model, seed=choices.seed)


def next_steps(out: Path, own: bool) -> list[str]:
    """What to do next; ``own``: the task was made, or brought along."""
    wording = f"{out / tasks.TASKS_FILE} (question and label sentence) and " if own else ""
    return [f"look at {wording}{out / RECIPE}", f"mentalglm data inspect {out}",
            f"mentalglm plan {out / RECIPE} --topology v5e-8", f"mentalglm train {out / RECIPE}"]  # fmt: skip


def _name(source: str | Path) -> str:
    """What the records say they come from: the file's or folder's name, or the Hub id; never a path."""
    path = Path(source)
    if path.is_file() and path.name in ("state.json", "dataset_dict.json"):  # of a folder that `datasets` saved
        path = path.parent
    return (path.resolve().stem if path.exists() else str(source)) or "table"


def _task(
    wanted: str | None, name: str, rows: Sequence[Row], separator: str | None, source: str
) -> tuple[tasks.Task, bool]:  # fmt: skip
    """The task, and whether it is new."""
    if wanted is not None and wanted in tasks.TASKS:
        return tasks.get_task(wanted), False
    several = separator is not None or any(len(row.names) > 1 for row in rows)
    own = wanted or _NO_NAME.sub("_", name).strip("_-")[:64] or "posts"
    task = make_task(own, rows, several, source)
    tasks.add_tasks([task], source)
    return task, True


def _split(
    found: Sequence[tuple[Record, Row]], choices: Choices, notes: list[str]
) -> tuple[list[Record], Counter[str]]:  # fmt: skip
    """The records with their sides, and how many training records went because a held-out post is near."""
    records, rows = [record for record, _ in found], [row for _, row in found]
    near = clusters(records)
    copies = Counter(near)
    if twice := sum(count - 1 for count in copies.values()):
        notes.append(f"posts that repeat another one, or nearly: {twice}")
    by_post: dict[str, set[tuple[str, ...]]] = {}
    for record in records:
        by_post.setdefault(bare_post(record.post), set()).add(record.gold)
    if torn := sum(len(golds) > 1 for golds in by_post.values()):
        notes.append(f"posts that stand there with different labels: {torn}")
    sides = {row.split for row in rows}
    named = None not in sides and len(sides) > 1
    if named and choices.shares is None:
        records = [replace(record, split=row.split or record.split) for record, row in found]
        kept, gone = without_held_out(records, splits=("dev", "test"))
        notes.append("the files say which split their rows are of, and it is kept")
        if gone:
            notes.append(f"training posts left out, for they stand, or nearly, in dev or test too: {gone.total()}")
        if crossing := _crossing(records, rows):
            notes.append(f"users with posts in training and in a held-out part: {crossing}")
        return kept, gone
    shares: dict[str, float] = dict(zip(SPLITS, (share / 100 for share in choices.shares or SHARES), strict=True))
    groups = joined(near, [row.user for row in rows])
    strata = [[f"{record.language} {label}" for label in record.gold] for record in records]
    chosen = grouped_split(groups, strata, shares, [record.post for record in records], choices.seed)
    if empty := [side for side, share in shares.items() if share and side not in chosen]:
        notes.append(f"too few posts: none is left for {' and '.join(empty)}")
    return [replace(record, split=side) for record, side in zip(records, chosen, strict=True)], Counter()


def _crossing(records: Sequence[Record], rows: Sequence[Row]) -> int:
    sides: dict[str, set[bool]] = {}
    for record, row in zip(records, rows, strict=True):
        if row.user is not None:
            sides.setdefault(row.user, set()).add(record.split == "train")
    return sum(len(both) > 1 for both in sides.values())


def _counts(records: Sequence[Record]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for split in SPLITS:
        part = [record for record in records if record.split == split]
        if part:
            labels = Counter(label for record in part for label in record.gold)
            found[split] = {"records": len(part), "labels": dict(labels.most_common())}
    return found
