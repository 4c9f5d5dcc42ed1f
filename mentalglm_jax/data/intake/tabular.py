"""Tables of any common form as they are: which file is which, its columns, and its rows one by one.

CSV, TSV (``delimited.py`` finds encoding and separator), Excel (``spreadsheets.py``), JSON and JSON Lines of objects,
Parquet and Arrow, folders with one of these or with one per split, what ``Dataset.save_to_disk`` wrote, and data sets
of the Hub by their id (``datasets``). Values come as Python has them; ``as_text`` makes text of them.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from mentalglm_jax.data.arrow import SUFFIXES as ARROW
from mentalglm_jax.data.arrow import arrow_columns, arrow_rows
from mentalglm_jax.data.intake.delimited import (
    DELIMITERS,
    checked_encoding,
    guess_said,
    told_delimiter,
    told_encoding,
)
from mentalglm_jax.data.intake.spreadsheets import sheet_names, sheet_rows
from mentalglm_jax.data.records import load_datasets
from mentalglm_jax.data.roots import SPLIT_OF, split_files
from mentalglm_jax.data.surrogates import whole_texts
from mentalglm_jax.data.tables import read_json_list, read_lines, read_table
from mentalglm_jax.errors import InputError, nearest
from mentalglm_jax.foreign import first_line, open_file, parse_json, short, some

Rows = Iterator[tuple[int, dict[str, Any]]]
_TEXTS = (".csv", ".tsv")
_SHEETS = (".xlsx", ".xlsm")
_JSONS = (".jsonl", ".ndjson", ".json")
TABLES = (*_TEXTS, *_SHEETS)  # files that are never records
SUFFIXES = (*_TEXTS, *_SHEETS, *_JSONS, *ARROW)  # best last: what is there twice is read where it lost nothing
_OTHER = {".xls": "an old Excel workbook", ".ods": "an OpenDocument sheet", ".zip": "an archive", ".gz": "an archive",
          ".7z": "an archive", ".tar": "an archive", ".pkl": "a pickle", ".sav": "an SPSS file", ".txt": "plain text",
          ".docx": "a Word document", ".pdf": "a PDF document", ".db": "a database"}  # fmt: skip
_NO_DATA = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "manifest.json")
# A single word may be one of the names under which ``datasets`` keeps its own readers ("pandas" reads pickles), and
# then it looks for files in the working directory.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_PEEKED = 1000  # rows of JSON whose keys are the columns
_SHOWN = 40  # characters of a column's name


@dataclass(frozen=True)
class Table:
    """One table. ``read`` gives (row as the file counts it, value by column) for the columns it is asked for; ``split``
    is what its place says it is of; ``notes`` is what was found out about it; ``classes`` the names that stand for the
    numbers of a column, where ``datasets`` noted them; ``guessed`` what the file does not say but was taken so."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Rows]
    split: str | None = None
    notes: tuple[str, ...] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    guessed: tuple[str, ...] = ()

    def warn(self, stacklevel: int = 3) -> None:
        """A warning for each of ``guessed``, for callers that do not print ``notes``."""
        for one in self.guessed:
            warnings.warn(f"{self.name}: {one}", stacklevel=stacklevel)

    def rows(self, columns: Sequence[str]) -> Rows:
        """``read`` of these columns.

        Raises:
            InputError: the table lacks one of them (the nearest is named, all are listed), or has it twice.
        """
        for column in columns:
            if self.columns.count(column) > 1:
                raise InputError(f"{self.name}: column {column!r} stands there twice; rename one")
            if column not in self.columns:
                known = ", ".join(_short(name) for name in self.columns) or "none"
                raise InputError(
                    f"{self.name}: no column {column!r}{nearest(column, self.columns)}; there are: {known}"
                )
        return self.read(columns)


def _short(name: str) -> str:
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"


def open_tables(
    source: str | Path, columns: Sequence[str] = (), *, encoding: str | None = None, sheet: str | None = None,
    config: str | None = None
) -> list[Table]:  # fmt: skip
    """The tables that ``source`` names: one, or one per split (or shard of a split).

    Args:
        source: a file; a folder with one table, with tables named after splits, or as ``datasets`` saved it; else the
            id of a data set of the Hub.
        columns: what is looked for, by which the separator of a text is found.
        encoding: of a text; None finds it.
        sheet: of a workbook; None is the first.
        config: of a data set of the Hub that has several.

    Raises:
        InputError: nothing of the kind is there; or it is damaged, as far as one can tell before its rows are read.
    """
    path = Path(source)
    if path.is_file():
        if path.name in ("state.json", "dataset_dict.json"):
            return open_tables(path.parent, columns, encoding=encoding, sheet=sheet)
        return [_open(path, None, columns, encoding, sheet)]
    if path.is_dir():
        files = _files(path)
        tables = [_open(file, split, columns, encoding, sheet) for file, split in files]
        if aside := _aside({file for file, _ in files}):
            tables[0] = replace(tables[0], notes=(*tables[0].notes, f"not read, for they are of no split: {aside}"))
        return tables
    if path.exists():
        raise InputError(f"{path}: neither a file nor a folder, but a pipe or a device")
    text = str(source)
    if not _HUB_ID.fullmatch(text) or path.suffix.lower() in {*SUFFIXES, *_OTHER}:
        raise InputError(f"{text}: no such file or folder, nor the name of a data set of the Hub (ORG/NAME); check the "
                         "path")  # fmt: skip
    return _hub_tables(text, config, columns)


def _files(folder: Path) -> list[tuple[Path, str | None]]:
    if found := split_files(folder, SUFFIXES[::-1]):
        return [(file.path, file.split) for file in found]
    here = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name not in _NO_DATA)
    if len(here) == 1:
        return [(here[0], None)]
    if not here:
        raise InputError(f"{folder}: holds no table ({', '.join(SUFFIXES)}); name a file, or the folder it is in")
    names = ", ".join(file.name for file in here[:4]) + (", …" if len(here) > 4 else "")
    raise InputError(f"{folder}: holds {len(here)} tables ({names}) that are not named after splits; name one of them")


def _aside(read: set[Path]) -> str:
    """The tables that stand beside those that are ``read`` for their split, but for what is there in another form."""
    stems = {file.stem.lower() for file in read}
    here = {file for folder in {file.parent for file in read} for file in folder.iterdir()}
    return some(sorted(file.name for file in here - read if file.suffix.lower() in SUFFIXES and file.is_file()
                       and file.name not in _NO_DATA and file.stem.lower() not in stems), 4)  # fmt: skip


def _open(path: Path, split: str | None, columns: Sequence[str], encoding: str | None, sheet: str | None) -> Table:
    suffix = path.suffix.lower()
    for option, given, goes in (("--encoding", encoding, _TEXTS), ("--sheet", sheet, _SHEETS)):
        if given is not None and suffix not in goes:
            raise InputError(f"{path}: {option} goes with {' or '.join(goes)} files only; leave it out")
    if suffix in _TEXTS:
        return _delimited(path, split, columns, encoding)
    if suffix in _SHEETS:
        return _sheet(path, split, sheet)
    if suffix in _JSONS:
        return _json(path, split)
    if suffix in ARROW:
        return _columnar(path, split)
    what = f"{_OTHER[suffix]}, no table" if suffix in _OTHER else "none of the tables that can be read"
    raise InputError(f"{path}: is {what}; save it as one of {', '.join(SUFFIXES)}")


def _delimited(path: Path, split: str | None, columns: Sequence[str], encoding: str | None) -> Table:
    codec = told_encoding(path) if encoding is None else checked_encoding(path, encoding)
    delimiter = told_delimiter(path, codec, columns)
    names = [cell.strip() for cell in next(read_table(path, (codec,), delimiter), (0, []))[1]]

    def read(chosen: Sequence[str]) -> Rows:
        places = {name: names.index(name) for name in chosen}
        rows = read_table(path, (codec,), delimiter)
        next(rows, None)
        for line, cells in rows:
            if len(cells) > len(names) and not any(cell.strip() for cell in cells[len(names) :]):
                cells = cells[: len(names)]
            if len(cells) != len(names):
                yield line, {"": f"{len(cells)} cells, the header has {len(names)}"}
            else:
                yield line, {name: cells[place] for name, place in places.items()}

    shown = {"utf-8-sig": "UTF-8", "utf-8": "UTF-8"}.get(codec, codec.upper())
    return Table(str(path), tuple(names), read, split, (f"{shown}, separated by {DELIMITERS[delimiter]}",),
                 guessed=guess_said(codec) if encoding is None else ())  # fmt: skip


def _sheet(path: Path, split: str | None, sheet: str | None) -> Table:
    names = sheet_names(path)
    head, cells = next(sheet_rows(path, sheet), (0, ()))
    columns = tuple("" if cell is None else as_text(cell).strip() for cell in cells)

    def read(chosen: Sequence[str]) -> Rows:
        places = {name: columns.index(name) for name in chosen}
        for number, values in sheet_rows(path, sheet):
            if number > head:
                yield number, {name: values[place] for name, place in places.items()}

    note = f"sheet {sheet or names[0]!r}" + (f" of {len(names)}" if len(names) > 1 else "")
    guessed = (f"{note} is read, the first",) if sheet is None and len(names) > 1 else ()
    return Table(str(path), columns, read, split, (note,), guessed=guessed)


def _json(path: Path, split: str | None) -> Table:
    with open_file(path) as file:
        first = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]

    def items() -> Iterator[tuple[int, Any]]:
        if first == b"[":  # all of it may stand in one line
            yield from ((number, item) for number, (_, item) in enumerate(read_json_list(path), start=1))
            return
        for line, text in read_lines(path):
            where = f"{path}:{line}"
            yield line, whole_texts(parse_json(text, where, "expected one object a line, or a list", True), text, where)

    def read(chosen: Sequence[str]) -> Rows:
        for line, item in items():
            if isinstance(item, dict):
                yield line, {name: item.get(name) for name in chosen}
            else:
                yield line, {"": "not an object"}

    columns: dict[str, None] = {}
    for _, (_, item) in zip(range(_PEEKED), items(), strict=False):
        columns.update(dict.fromkeys(item) if isinstance(item, dict) else {})
    return Table(str(path), tuple(columns), read, split)


def _columnar(path: Path, split: str | None) -> Table:
    names, noted = arrow_columns(path)

    def read(chosen: Sequence[str]) -> Rows:
        for number, row in arrow_rows(path, chosen):
            yield number, {name: row.get(name) for name in chosen}

    return Table(str(path), names, read, split, (), _class_names(noted))


def _class_names(noted: str) -> dict[str, tuple[str, ...]]:
    """The names that stand for the numbers of a column, as ``datasets`` notes them; none if it notes anything else."""
    try:
        features = parse_json(noted, "huggingface")["info"]["features"]
        kinds = {column: _of_each(kind) for column, kind in features.items()}
        return {str(column): tuple(str(name) for name in kind["names"]) for column, kind in kinds.items()
                if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"}  # fmt: skip
    except (InputError, KeyError, TypeError, AttributeError):
        return {}


def _of_each(kind: Any) -> Any:
    """What a list's values are, as ``datasets`` has noted it over the years: List, Sequence or a list of one."""
    if isinstance(kind, dict) and kind.get("_type") in ("List", "LargeList", "Sequence"):
        return kind.get("feature")
    return kind[0] if isinstance(kind, list) and len(kind) == 1 else kind


def _hub_tables(name: str, config: str | None, columns: Sequence[str]) -> list[Table]:
    """The tables of a data set of the Hub: ``datasets`` says which files are of which split, and they are fetched and
    read as anybody's files are."""
    datasets = load_datasets()
    try:
        builder = datasets.load_dataset_builder(name, config)
        found = {str(split): [*map(str, files)] for split, files in (builder.config.data_files or {}).items()}
    except Exception as error:  # of the Hub, of the network, of the files: datasets raises whatever it meets
        if config is None and len(names := _configurations(datasets, name)) > 1:
            raise InputError(f"{name}: is several data sets; name one with --config: {some(names, 20)}") from None
        raise _not_had(name, error) from None
    known = {split: files for split, files in found.items() if split.lower() in SPLIT_OF} or found
    left = ", ".join(split for split in found if split not in known)
    notes = (f"split {left} is left out",) if left else ()
    features = builder.info.features or {}
    kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    classes = {column: tuple(kind.names) for column, kind in kinds.items() if hasattr(kind, "int2str")}
    tables = []
    for split, files in known.items():
        for file in files:
            table = _open(_fetched(name, file), SPLIT_OF.get(split.lower()), columns, None, None)
            tables.append(replace(table, name=f"{name} ({split})", notes=(*table.notes, *notes),
                                  classes={**classes, **table.classes}))  # fmt: skip
    if not tables:
        raise InputError(f"{name}: holds no table ({', '.join(SUFFIXES)})")
    return tables


def _fetched(name: str, address: str) -> Path:
    """A file of the data set, from the Hub or its cache. Raises: InputError: it is another's, or cannot be had."""
    from huggingface_hub import hf_hub_download

    start = f"hf://datasets/{name}@"
    revision, _, place = address.removeprefix(start).partition("/")
    if not address.startswith(start) or not place:
        raise InputError(f"{name}: names the file {short(address)}, which is none of its own")
    if PurePath(place).suffix.lower() not in SUFFIXES:
        raise InputError(f"{name}: {place} is none of the tables that can be read ({', '.join(SUFFIXES)})")
    try:
        return Path(hf_hub_download(name, place, repo_type="dataset", revision=revision))
    except Exception as error:  # the client and its transport raise many unrelated types
        raise _not_had(name, error) from None


def _not_had(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: no such file or folder, and as a data set of the Hub it cannot be had "
                      f"({first_line(error)})")  # fmt: skip


def _configurations(datasets: Any, name: str) -> list[str]:
    try:
        return datasets.get_dataset_config_names(name)
    except Exception:  # as above; what is wrong is known already
        return []


def as_text(value: Any) -> str:
    """A plain value as people write it: nothing for None, no ".0" behind a whole number.

    Raises:
        ValueError: a list or an object.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"holds {type(value).__name__}, not text")
