"""Rows of an Excel workbook (.xlsx), read as values: nothing in it is calculated, no link is followed, no macro runs.

A workbook is a zip archive of XML; what it says of its own sizes is not believed beyond fixed bounds. Needs the [data]
extra (openpyxl).
"""

import contextlib
import datetime
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError, install, nearest
from mentalglm_jax.foreign import first_line, open_file

MOST_BYTES = 256 << 20  # of all parts of the archive, unpacked
MOST_ROWS, MOST_COLUMNS = 1 << 20, 512  # Excel's own rows; far more columns than a table of posts has
_MOST_PARTS, _MOST_EMPTY = 10_000, 100_000


@contextlib.contextmanager
def _workbook(path: Path) -> Iterator[Any]:
    try:
        import openpyxl
    except ImportError:
        raise InputError(f"Excel files need the data extra: {install('data')}") from None
    try:
        with open_file(path) as file:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
            if (size := sum(part.file_size for part in parts)) > MOST_BYTES or len(parts) > _MOST_PARTS:
                raise InputError(f"{path}: {size} bytes in {len(parts)} parts once unpacked are too much for a table; "
                                 "save it as CSV")  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of features that only matter to who writes the file again
                book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
                try:
                    yield book
                finally:
                    book.close()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (InputError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:  # of zipfile, of the XML reader, of openpyxl: whatever a damaged workbook makes of them
        raise InputError(f"{path}: not an Excel workbook that can be read ({first_line(error)}); save it as .xlsx or "
                         "CSV") from None  # fmt: skip


def sheet_names(path: Path) -> list[str]:
    """The names of its sheets with cells, in order. Raises: InputError as ``sheet_rows``."""
    with _workbook(path) as book:
        return [sheet.title for sheet in book.worksheets]


def sheet_rows(path: Path, sheet: str | None = None) -> Iterator[tuple[int, Sequence[Any]]]:
    """(row as the sheet counts it, values) of each row that is not blank, of one sheet: the first, or the one named.
    The first of these rows says how many columns are read. Of a formula it is the value that was saved with it, None
    where none was.

    Raises:
        InputError: not there, no workbook, damaged, larger than the bounds above, or it has no such sheet.
    """
    with _workbook(path) as book:
        names = [one.title for one in book.worksheets]
        if not names:
            raise InputError(f"{path}: holds no sheet with cells")
        if sheet is not None and sheet not in names:
            raise InputError(f"{path}: no sheet {sheet!r}{nearest(sheet, names)}; there are: {', '.join(names)}")
        found = book.worksheets[names.index(sheet) if sheet is not None else 0]
        found.reset_dimensions()  # what the file says they are may be anything
        head, width = 0, 0
        for head, cells in enumerate(found.iter_rows(max_col=MOST_COLUMNS + 1, values_only=True), start=1):
            if head > _MOST_EMPTY:
                raise InputError(f"{path}: its first {_MOST_EMPTY} rows are empty; delete them")
            if cells.count(None) == len(cells):
                continue
            if width := max((place for place, value in enumerate(cells, start=1) if _filled(value)), default=0):
                if width > MOST_COLUMNS:
                    raise InputError(f"{path}: row {head} has more than {MOST_COLUMNS} columns")
                yield head, cells[:width]
                break
        if not width:
            return
        rows, last = found.iter_rows(min_row=head + 1, max_col=width, values_only=True), head
        for number, cells in enumerate(rows, start=head + 1):
            if number > MOST_ROWS or number - last > _MOST_EMPTY:
                raise InputError(f"{path}: more than {MOST_ROWS} rows, or {_MOST_EMPTY} empty ones on end from row "
                                 f"{last + 1}; delete those, or import it in parts")  # fmt: skip
            if any(map(_filled, cells)):
                last = number
                yield number, cells


def _filled(value: Any) -> bool:
    return value is not None and bool(str(value).strip())


def plain(value: Any) -> Any:
    """A value of a cell as text has it: dates in ISO's form, numbers that are whole without ".0"."""
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ") if value.time() != datetime.time() else value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value
