"""Rows of an Excel workbook (.xlsx), read as values: nothing in it is calculated, no link is followed, no macro runs.

A workbook is a zip archive of XML; what it says of its own sizes is not believed, and it is unpacked in a process of
its own (``bounded.py``). Needs the [data] extra (openpyxl).
"""

import datetime
import importlib.util
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.bounded import bound, handed_over, serve
from mentalglm_jax.errors import InputError, install, nearest
from mentalglm_jax.foreign import open_file

MOST_BYTES = 256 << 20  # of all parts of the archive, unpacked
SMALL, RATIO = 8 << 20, 100  # bytes of parts of any archive, and for one of its own; a real one packs 10 to 20
MOST_ROWS, MOST_COLUMNS = 1 << 20, 512  # Excel's own rows; far more columns than a table of posts has
LONGEST_CELL = 32_767  # characters, Excel's own; a few bytes may name a text that stands elsewhere
_MOST_PARTS, _MOST_EMPTY = 10_000, 100_000
_ROWS = 64  # of one batch
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")  # a character that XML does not keep; of a text that looks so, its "_"


def sheet_names(path: Path) -> list[str]:
    """The names of its sheets with cells, in order. Raises: InputError as ``sheet_rows``."""
    return next(_opened(path))


def sheet_rows(path: Path, sheet: str | None = None) -> Iterator[tuple[int, Sequence[Any]]]:
    """(row as the sheet counts it, values) of each row that is not blank, of one sheet: the first, or the one named.
    The first of these rows says how many columns are read. Of a formula it is the value that was saved with it, None
    where none was. Dates are in ISO's form.

    Raises:
        InputError: not there, no workbook, damaged, larger than the bounds above, or it has no such sheet.
    """
    found = _opened(path)
    names = next(found)
    if not names:
        raise InputError(f"{path}: holds no sheet with cells")
    if sheet is not None and sheet not in names:
        raise InputError(f"{path}: no sheet {sheet!r}{nearest(sheet, names)}; there are: {', '.join(names)}")
    if sheet is not None and names.index(sheet):
        found = _opened(path, str(names.index(sheet)))
        next(found)
    yield from ((number, cells) for number, cells in found)


def _opened(path: Path, place: str = "0") -> Iterator[Any]:
    """The names of the sheets, then the rows of one. Raises: InputError as ``sheet_rows``."""
    if importlib.util.find_spec("openpyxl") is None:
        raise InputError(f"Excel files need the data extra: {install('data')}")
    try:
        source = open_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror or error})") from None
    with source:
        reason = None
        for value in handed_over("mentalglm_jax.data.intake.spreadsheets", source, place):
            if isinstance(value, list):
                yield value
            else:
                reason = value
    if reason is not None:
        known = reason.removeprefix(_OURS)
        what = f"{known}; save it as CSV" if known != reason else (
            f"not an Excel workbook that can be read ({reason}); save it as .xlsx or CSV")  # fmt: skip
        raise InputError(f"{path}: {what}")


# --- in the process of its own ---

_OURS = "a table of posts: "  # before what is said of a workbook that is one, and too much


def _batches(place: int) -> Iterator[Sequence[Any]]:
    """The names of the sheets, then lists of (row, values) of the one at ``place``."""
    import openpyxl

    bound()
    file = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 - it is the process's
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    most = min(MOST_BYTES, SMALL + RATIO * os.fstat(file.fileno()).st_size)
    if (size := sum(part.file_size for part in parts)) > most or len(parts) > _MOST_PARTS:
        raise ValueError(f"{_OURS}{size} bytes in {len(parts)} parts once unpacked are too much for a table")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that only matter to who writes the file again
        book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
        sheets = book.worksheets
        yield [one.title for one in sheets]
        rows = []
        for row in _rows(sheets[place]):
            rows.append(row)
            if len(rows) == _ROWS:
                yield rows
                rows = []
        yield rows


def _rows(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    sheet.reset_dimensions()  # what the file says they are may be anything
    head, width = 0, 0
    for head, cells in enumerate(sheet.iter_rows(max_col=MOST_COLUMNS + 1, values_only=True), start=1):
        if head > _MOST_EMPTY:
            raise ValueError(f"{_OURS}its first {_MOST_EMPTY} rows are empty, delete them")
        if cells.count(None) == len(cells):
            continue
        if width := max((place for place, value in enumerate(cells, start=1) if _filled(value)), default=0):
            if width > MOST_COLUMNS:
                raise ValueError(f"{_OURS}row {head} has more than {MOST_COLUMNS} columns")
            yield head, _checked(head, cells[:width])
            break
    if not width:
        return
    rows, last = sheet.iter_rows(min_row=head + 1, max_col=width, values_only=True), head
    for number, cells in enumerate(rows, start=head + 1):
        if number > MOST_ROWS or number - last > _MOST_EMPTY:
            raise ValueError(f"{_OURS}more than {MOST_ROWS} rows, or {_MOST_EMPTY} empty ones on end from row "
                             f"{last + 1}; delete those, or import it in parts")  # fmt: skip
        if any(map(_filled, cells)):
            last = number
            yield number, _checked(number, cells)


def _checked(number: int, cells: Sequence[Any]) -> Sequence[Any]:
    if any(isinstance(value, str) and len(value) > LONGEST_CELL for value in cells):
        raise ValueError(f"{_OURS}row {number} has a cell of more than {LONGEST_CELL} characters, as none in Excel has")
    return [_ESCAPED.sub(_character, value) if isinstance(value, str) else value for value in cells]


def _character(found: re.Match[str]) -> str:
    code = int(found[1], 16)
    return found[0] if not code or 0xD800 <= code < 0xE000 else chr(code)  # neither NUL nor half a character


def _filled(value: Any) -> bool:
    return value is not None and bool(str(value).strip())


def _plain(value: Any) -> str:
    """A value of a cell that JSON does not have as text: dates in ISO's form."""
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ") if value.time() != datetime.time() else value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


if __name__ == "__main__":
    serve(_batches(int(sys.argv[1])), _plain)
