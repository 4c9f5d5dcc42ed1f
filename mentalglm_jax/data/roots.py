"""What the folder or file that a user names holds: record files in any layout, or upstream data sets.

Record files are ``{train,dev,test}.jsonl`` (or ``.parquet``, or numbered shards as ``datasets`` and the Hub name them)
in the folder or in its ``records`` or ``data``, what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote, or
one file. A row is a record whatever the layout is.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mentalglm_jax.data.chinese import SOS_CHAT_FILES
from mentalglm_jax.data.records import SPLITS, Record, iter_records
from mentalglm_jax.data.sources import iter_upstream, present
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import inside, no_file, read_json
from mentalglm_jax.text.tasks import add_tasks_beside

SPLIT_OF = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
_KINDS = (".jsonl", ".parquet", ".arrow")  # of records
_NAMED = re.compile(rf"({'|'.join(SPLIT_OF)})(?:-\d{{5}}-of-(\d{{5}}))?", re.IGNORECASE)
_BEGUN = re.compile(rf"({'|'.join(SPLIT_OF)})(ing|set|elopment)?(?![^\W\d_])", re.IGNORECASE)  # test2, training
_BUILDER = re.compile(r"^\w+-(?=[a-z])")  # what a cache of `datasets` puts before the split: json-train.arrow
_PLACES = ("", "records", "data")
_DATASET, _DATASETS = "state.json", "dataset_dict.json"


class RecordFile(NamedTuple):
    """A file with records, and the split its place says they are of (None: the rows say it)."""

    path: Path
    split: str | None


def record_files(root: str | Path) -> list[RecordFile]:
    """The record files of ``root``, in the order of the splits; empty if it holds none. Tasks of a ``tasks.yaml`` there
    become known.

    Raises:
        InputError: a layout of ``datasets`` that lacks one of its files, or a task file that is wrong.
    """
    root = Path(root)
    add_tasks_beside(root)
    if root.is_file():
        if root.name in (_DATASET, _DATASETS):
            return record_files(root.parent)
        return [RecordFile(root, None)] if root.suffix.lower() in _KINDS and root.name not in SOS_CHAT_FILES else []
    return split_files(root, _KINDS)


def split_files(root: Path, kinds: Sequence[str]) -> list[RecordFile]:
    """The files of the folder ``root`` whose places say of which split they are, or that ``datasets`` saved.

    Args:
        kinds: suffixes of the files that are looked for by name, best first, where a split is there in several.

    Raises:
        InputError: a layout of ``datasets`` that lacks one of its files, or a link that leads out of ``root``.
    """
    if (root / _DATASETS).is_file():
        return _dataset_dict(root)
    if (root / _DATASET).is_file():
        return _dataset(root, None)
    for place in _PLACES:
        if (root / place).is_dir() and (found := _named_files(root / place, kinds)):
            for file in found:
                _check_place(root, file.path)
            return found
    return []


def iter_record_files(files: Sequence[RecordFile], *, allow_extra: bool = False) -> Iterator[Record]:
    """Their records, in bounded memory. Where the place says "dev" or "test", that is what its rows are.

    Args:
        allow_extra: of JSONL, ignore other fields (``generations.jsonl`` has more).

    Raises:
        InputError: a file is damaged or a row is no record; the message names file and row.
    """
    for path, split in files:
        extra = allow_extra or path.suffix.lower() != ".jsonl"  # other columns of a table are not read
        for record in iter_records(path, allow_extra=extra):
            yield record if split is None or split in ("train", record.split) else replace(record, split=split)


def record_files_or_sets(root: str | Path, sets: Sequence[str] = ()) -> list[RecordFile]:
    """The record files of ``root``; empty where its upstream data sets are to be read, all of them or ``sets``.

    Raises:
        InputError: ``root`` is not there, or has record files and ``sets`` are named.
    """
    root = Path(root)
    if not root.exists():
        raise InputError(f"{root}: no such file or folder; check the path")
    if not (root.is_dir() or root.is_file()):
        raise no_file(root)
    files = record_files(root)
    if files and sets:
        raise InputError(f"{root}: holds records ({files[0].path.name}), not upstream files; leave out the names of "
                         "data sets")  # fmt: skip
    return files


def iter_root(root: str | Path, sets: Sequence[str] = ()) -> Iterator[Record]:
    """All records below ``root``: of its record files, or of its upstream data sets (``sets`` names them, else all).

    Raises:
        InputError: ``root`` holds neither, or has record files and ``sets`` are named; or as ``iter_record_files`` and
            ``iter_upstream``.
    """
    files = record_files_or_sets(root, sets)
    return iter_record_files(files) if files else iter_upstream(root, sets or present(root))


def _dataset_dict(root: Path) -> list[RecordFile]:
    names = read_json(root / _DATASETS).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{root / _DATASETS}: expected a list 'splits' of names; save the data set again")
    if unknown := [name for name in names if name not in SPLIT_OF]:
        raise InputError(f"{root / _DATASETS}: split {unknown[0]!r} is none of {', '.join(SPLIT_OF)}; rename it")
    found = []
    for split in SPLITS:
        for name in (name for name in names if SPLIT_OF[name] == split):
            if not (root / name / _DATASET).is_file():
                raise InputError(f"{root}: split {name!r} is missing ({name}/{_DATASET}); is the copy complete?")
            found += _dataset(root / name, split)
    return found


def _dataset(folder: Path, split: str | None) -> list[RecordFile]:
    state = read_json(folder / _DATASET)
    files = state.get("_data_files")
    names = [one.get("filename") for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder / _DATASET}: names no data file; save the data set again with save_to_disk")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(f"{folder}: a selection of rows is kept apart from them; save it after flatten_indices()")
    said = state.get("_split")
    split = split or (SPLIT_OF.get(said) if isinstance(said, str) else None)
    return [RecordFile(inside(folder, str(name)), split) for name in names]


def _check_place(root: Path, file: Path) -> None:
    """Raises: InputError if ``file``, found by its name below ``root``, is a link to what is neither there nor among
    the blobs of the Hub's cache, where a downloaded snapshot's files are."""
    above = [root.resolve(), *root.resolve().parents]
    blobs = [folder.parent / "blobs" for folder in above if folder.name == "snapshots"]
    target = file.resolve()
    if not any(target.is_relative_to(place) for place in (above[0], *blobs)):
        raise InputError(f"{file}: is a link to a file outside {root}; put the file itself there, or name it alone")


def _named_files(folder: Path, kinds: Sequence[str]) -> list[RecordFile]:
    """Files or folders of files named after splits."""
    found: dict[tuple[str, str], list[tuple[Path, str | None]]] = {}
    aside = []
    for path in sorted(folder.iterdir()):
        kind, split = path.suffix.lower(), path.name.lower()
        stem = _BUILDER.sub("", path.stem) if kind == ".arrow" else path.stem
        if kind in kinds and path.is_file() and (name := _NAMED.fullmatch(stem)):
            found.setdefault((SPLIT_OF[name[1].lower()], kind), []).append((path, name[2]))
        elif kind in kinds and path.is_file() and _BEGUN.match(stem):
            aside.append(path.name)
        elif split in SPLIT_OF and path.is_dir():
            for file in sorted(path.iterdir()):
                if file.is_file() and file.suffix.lower() in kinds:
                    found.setdefault((SPLIT_OF[split], file.suffix.lower()), []).append((file, None))
    if found and aside:
        raise InputError(f"{folder}: {aside[0]} begins as a split's name, and only {', '.join(SPLIT_OF)} are read; "
                         "put its rows into the file of its split, or the file elsewhere")  # fmt: skip
    files = []
    for split in SPLITS:
        kind = next((kind for kind in kinds if (split, kind) in found), None)
        if kind is None:
            continue
        shards = found[split, kind]
        total = next((int(of) for _, of in shards if of), None)
        if total is not None and len(shards) != total:
            raise InputError(f"{folder}: {len(shards)} of {total} files of split {split!r} are here "
                             f"({shards[0][0].name}, …); is the download complete?")  # fmt: skip
        files += [RecordFile(path, split) for path, _ in shards]
    return files
