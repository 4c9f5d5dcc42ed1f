"""What of a user's data may be trained on: never a post of a held-out part, under whatever name or spelling.

C-IMHI's instruction files repeat SOS-HL-1K and SocialCD-3K whole, published test posts included, so they are taken only
with the test parts at hand to leave those posts out by.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mentalglm_jax.data.c_imhi import (
    C_IMHI,
    C_IMHI_RAW,
    ORIGINALS,
    authors_tasks,
    c_imhi_raw_files,
    iter_c_imhi_raw,
)
from mentalglm_jax.data.imhi import IMHI_DEFAULT, IMHI_TASKS
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.roots import iter_record_files, record_files, record_files_or_sets
from mentalglm_jax.data.sources import find, iter_upstream, load_upstream, present
from mentalglm_jax.data.splits import dev_split, without_held_out
from mentalglm_jax.errors import InputError


@dataclass(frozen=True)
class Split:
    """Records with their sides. ``left_out``: training records that are gone, by how their posts are known from a
    held-out part ("exact": the same letters and digits; "near"). ``unknown``: data sets whose published test posts may
    be among the training records, which the user accepted."""

    records: list[Record]
    left_out: Counter[str]
    unknown: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What a reader of any result must know, one sentence each."""
        said = []
        if gone := self.left_out.total():
            said.append(f"{gone} training records are left out: their posts stand in a development or test part too "
                        f"({self.left_out['exact']} letter for letter, {self.left_out['near']} nearly)")  # fmt: skip
        if self.unknown:
            said.append(f"published test posts of {' and '.join(self.unknown)} may be among the training records: "
                        "their test parts were not at hand (accept_unknown_overlap); scores on those test parts mean "
                        "nothing")  # fmt: skip
        return said

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the records."""
        return {"left_out": {kind: self.left_out[kind] for kind in ("exact", "near")},
                "unknown_overlap": list(self.unknown)}  # fmt: skip


def upstream_split(
    root: str | Path, names: Sequence[str], fraction: float = 0.2, *, accept_unknown_overlap: bool = False
) -> Split:
    """The named data sets below ``root``, ``fraction`` of the training parts as development part.

    A training record is left out if a post of its cluster (``splits.clusters``) stands in the published test part of
    any data set below ``root``, named or not; for C-IMHI also in any held-out one of its raw parts.

    Raises:
        InputError: as ``load_upstream`` and ``dev_split``; or C-IMHI's instruction files are named, the test part of a
            data set they repeat is neither below ``root`` nor beside them, and ``accept_unknown_overlap`` is false.
    """
    records = load_upstream(root, names)
    known = {IMHI_TASKS[name] for name in IMHI_DEFAULT} if "imhi" in names else set[str]()
    others = list(iter_upstream(root, [n for n in present(root) if n not in {*names, *known}]))
    folder = find(root, C_IMHI) if C_IMHI in names else None
    unknown: list[str] = []
    if folder is not None:
        if find(root, C_IMHI_RAW) is None and c_imhi_raw_files(folder.parent / "Raw data"):
            others += iter_c_imhi_raw(folder.parent / "Raw data")
        tests = {(record.source, record.task) for record in (*records, *others) if record.split == "test"}
        unknown = [ORIGINALS[task] for task in authors_tasks(folder)
                   if not {(ORIGINALS[task], task), (C_IMHI_RAW, task)} & tests]  # fmt: skip
    if unknown and not accept_unknown_overlap:
        raise InputError(
            f"{root}: c_imhi repeats the published test posts of {' and '.join(unknown)}, and no test part is here to "
            "leave them out by; put that data set's test file or C-IMHI's `Raw data` folder there, or set "
            "data.accept_unknown_overlap=true"
        )
    # SOS-HL-1K's published test part is called "val", so what C-IMHI's raw files call so is no training data either.
    raw = C_IMHI_RAW if folder is not None and C_IMHI_RAW not in names else None
    held_out = [replace(record, split="test") for record in others if record.split == "test"
                or (record.split == "dev" and record.source == raw)]  # fmt: skip
    kept, gone = without_held_out(records, held_out)
    # The side of a post is that of its cluster over everything below root, whichever data sets are named: what one
    # command trains on, another must not evaluate.
    sides = dev_split([*kept, *(record for record in others if record.split == "train")], fraction)
    return Split(sides[: len(kept)], gone, tuple(unknown))


def data_split(
    root: str | Path, names: Sequence[str] = (), fraction: float = 0.2, *, accept_unknown_overlap: bool = False
) -> Split:
    """Whatever ``root`` holds: its record files (``records_split``), or else its upstream data sets
    (``upstream_split``), of which ``names`` are read or, without a name, all that are there.

    Raises:
        InputError: ``root`` holds neither, or has record files and ``names`` are given; or as those two.
    """
    if record_files_or_sets(root, names):
        return records_split(root)
    names = names or present(root)
    return upstream_split(root, names, fraction, accept_unknown_overlap=accept_unknown_overlap)


def records_split(root: str | Path) -> Split:
    """The record files of ``root`` (``roots.record_files``); what stands in a development or test file is of that
    split, whatever its rows say. A training record of whose cluster a post is held out is left out: ``dev_split`` would
    move it, into results that are to be on the files as they are.

    Raises:
        InputError: no record files, two records of one split with one id, or as ``iter_record_files``.
    """
    files = record_files(root)
    if not files:
        raise InputError(f"{root}: no records here; expected train.jsonl (and dev.jsonl, test.jsonl), Parquet files "
                         "of these names or what `datasets` saved; published files need source: upstream")  # fmt: skip
    records, seen = [], set[tuple[str, str]]()
    for record in iter_record_files(files):
        if (record.split, record.id) in seen:
            raise InputError(f"{root}: id {record.id!r} stands twice among the {record.split} records; ids must differ")
        seen.add((record.split, record.id))
        records.append(record)
    return Split(*without_held_out(records, splits=("dev", "test")))
