"""Text and table files that somebody else wrote, read row by row in bounded memory; every fault is reported with file
and line."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.quoting import QuotedRows
from mentalglm_jax.data.surrogates import whole_texts
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import MAX_DEPTH, check_json, first_line, open_file, raw_decode

_CHUNK = 1 << 20
_LONGEST_ITEM = 1 << 22  # characters: far beyond any post
_BOM = "\ufeff"
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def find_encoding(path: Path, encodings: Sequence[str]) -> str:
    """The first of ``encodings`` in which the whole file can be read; "utf-8-sig" also takes UTF-8 without a BOM.

    Raises: InputError if the file is not there, or naming the first line that fits none of them.
    """
    position = 0
    for encoding in encodings:
        fault = _first_fault(path, encoding)
        if fault is None:
            return encoding
        position = max(position, fault)
    names = " or ".join("UTF-8" if name == "utf-8-sig" else name.upper() for name in encodings)
    raise InputError(
        f"{path}:{_line_of(path, position)}: wrong encoding, not {names} (byte {position}); "
        "download the file again or save it as UTF-8"
    )


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open_file(path) as file:
            while data := file.read(_CHUNK):
                yield data
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None


class _Lines(io.TextIOWrapper):
    """Gives no line of any length to who goes through them, as `csv.reader` does."""

    def __init__(self, path: Path, encoding: str, newline: str | None):
        super().__init__(open_file(path), encoding=encoding, newline=newline)
        self._path, self._number = path, 0

    def __next__(self) -> str:
        self._number += 1
        if len(line := self.readline(_LONGEST_ITEM)) == _LONGEST_ITEM:
            raise InputError(f"{self._path}: line {self._number} has {_LONGEST_ITEM} characters or more, as no row of "
                             "a table has")  # fmt: skip
        if not line:
            raise StopIteration
        return line


def opened(path: Path, encoding: str, newline: str | None) -> io.TextIOWrapper:
    """The file as text; going through its lines raises InputError at one of ``_LONGEST_ITEM`` characters."""
    return _Lines(path, encoding, newline)


def can_decode(path: Path, encoding: str) -> bool:
    """Whether all of the file is text in ``encoding``."""
    return _first_fault(path, encoding) is None


def _first_fault(path: Path, encoding: str) -> int | None:
    """Byte position of what cannot be decoded, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0
    held = b""  # bytes of a character cut by the end of a chunk
    try:
        for data in _chunks(path):
            held = decoder.getstate()[0]
            decoder.decode(data)
            done += len(data)
        held = decoder.getstate()[0]
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return done - len(held) + error.start
    return None


def _line_of(path: Path, position: int) -> int:
    line, left = 1, position
    for data in _chunks(path):
        line += data.count(b"\n", 0, min(left, len(data)))
        left -= len(data)
        if left <= 0:
            break
    return line


def read_lines(path: Path, encodings: Sequence[str] = ("utf-8-sig",)) -> Iterator[tuple[int, str]]:
    """(line number, line without its end) of each line that is not blank; only a line feed ends a line, for a post may
    hold the other line separators of Unicode."""
    with opened(path, find_encoding(path, encodings), "\n") as file:
        number = 0
        while line := file.readline(_LONGEST_ITEM):
            number += 1
            if len(line) == _LONGEST_ITEM:
                raise InputError(f"{path}:{number}: a line of {_LONGEST_ITEM} characters or more is no post")
            if line.strip():
                yield number, line.rstrip("\r\n")


def read_table(path: Path, encodings: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line where the row begins, cells) of each row that is not blank; cells may be quoted and hold line breaks.

    Raises: InputError as ``find_encoding``; on what is no table; at its end, if a cell was rows of the table.
    """
    with opened(path, find_encoding(path, encodings), "") as file:
        # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
        rows = QuotedRows(file, delimiter)
        reader = csv.reader(rows, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                if found := rows.swallowed():
                    raise InputError(f"{path}:{found}") from None
                return
            except csv.Error as error:
                raise InputError(
                    f"{path}:{line}: not a readable row ({error}); check the quotation marks from this line on"
                ) from None
            if line == 1 and cells:
                cells[0] = cells[0].removeprefix(_BOM)  # that of an encoding other than UTF-8
            if line == 1 and cells == ["sep=", ""]:  # Excel's line that says what separates the cells
                rows.took(line, [])
                continue
            rows.took(line, cells)
            if any(cell.strip() for cell in cells):
                yield line, cells


def read_named_rows(
    path: Path, columns: Sequence[str], delimiter: str, aliases: dict[str, str] | None = None, *,
    encoding: str = "utf-8-sig",
) -> Iterator[tuple[int, dict[str, str]]]:  # fmt: skip
    """(line, cells by column name) of a table with a header; further columns (an unnamed index) are ignored."""
    header: list[str] | None = None
    for line, cells in read_table(path, (encoding,), delimiter):
        if header is None:
            header = [(aliases or {}).get(cell.strip(), cell.strip()) for cell in cells]
            for column in columns:
                if column not in header:
                    apart = "tabs" if delimiter == "\t" else "commas"
                    raise InputError(
                        f"{path}:{line}: column {column!r} is missing; the header needs, "
                        f"separated by {apart}: {', '.join(columns)}"
                    )
                if header.count(column) > 1:
                    raise InputError(f"{path}:{line}: column {column!r} stands twice in the header; rename one")
            continue
        check_width(path, line, cells, header)
        row = dict(zip(header, cells, strict=True))
        yield line, {column: row[column] for column in columns}


def read_header(path: Path, delimiter: str) -> list[str]:
    """Column names of a UTF-8 table; empty for an empty file."""
    return [cell.strip() for cell in next(read_table(path, ("utf-8-sig",), delimiter), (0, []))[1]]


def check_width(path: Path, line: int, cells: Sequence[str], header: Sequence[str]) -> None:
    """Raises: InputError unless the row has one cell per column."""
    if len(cells) != len(header):
        raise InputError(
            f"{path}:{line}: {len(cells)} columns, expected {len(header)} ({', '.join(header)}); "
            "check the separators in this row"
        )


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """(line where it begins, item) of each item of a UTF-8 file that holds one JSON list, one item in memory at a time.

    Raises: InputError if the file is not a JSON list, or ends before its list does.
    """
    with opened(path, find_encoding(path, ("utf-8-sig",)), None) as file:
        yield from _ListReader(path, file).items()


class _ListReader:
    """A window on the file: what is before ``_at`` is done, ``_line`` is the line of ``_at``."""

    def __init__(self, path: Path, file: io.TextIOWrapper):
        self._path, self._file = path, file
        self._text, self._at, self._line = "", 0, 1

    def items(self) -> Iterator[tuple[int, Any]]:
        first = self._peek()
        if not first:
            raise InputError(f"{self._path}: holds no row; is the download complete?")
        if first != "[":
            raise InputError(f"{self._path}:{self._line}: expected a JSON list, the file begins with {first!r}")
        self._move(self._at + 1)
        if self._peek() != "]":
            while True:
                line = self._line
                yield line, self._item()
                if (mark := self._peek()) == "]":
                    break
                if mark != ",":
                    raise self._broken("expected ',' or ']'", self._line)
                self._move(self._at + 1)
                self._peek()
        self._move(self._at + 1)
        if self._peek():
            raise InputError(f"{self._path}:{self._line}: there is text after the JSON list; delete it")

    def _peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            found = _NOT_SPACE.search(self._text, self._at)
            if found:
                self._move(found.start())
                return self._text[self._at]
            self._move(len(self._text))
            if not self._more():
                return ""

    def _item(self) -> Any:
        while True:
            try:
                item, end = raw_decode(self._text, self._at)
                check_json(item, self._text[self._at : end], half_pairs=True)
            except RecursionError:
                raise self._broken(f"more than {MAX_DEPTH} levels", self._line) from None
            except json.JSONDecodeError as error:
                # It may go on in the next chunk; an item longer than any post means that a bracket is missing.
                if len(self._text) - self._at < _LONGEST_ITEM and self._more():
                    continue
                line = self._line + self._text.count("\n", self._at, error.pos)
                raise self._broken(error.msg, line) from None
            except ValueError as error:
                raise self._broken(first_line(error), self._line) from None
            raw, line = self._text[self._at : end], self._line
            self._move(end)
            return whole_texts(item, raw, f"{self._path}:{line}")

    def _more(self) -> bool:
        more = self._file.read(_CHUNK)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _move(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _broken(self, what: str, line: int) -> InputError:
        return InputError(f"{self._path}:{line}: not JSON ({what}); is the download complete?")
