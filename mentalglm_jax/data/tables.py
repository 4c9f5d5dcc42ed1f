"""Text and table files that somebody else wrote: every fault is reported with file and line."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from mentalglm_jax.errors import InputError


def read_text(path: Path, encodings: Sequence[str]) -> str:
    """The file in the first of ``encodings`` that fits; "utf-8-sig" also takes UTF-8 without a BOM."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None
    position = 0
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            position = max(position, error.start)
    names = " or ".join("UTF-8" if name == "utf-8-sig" else name.upper() for name in encodings)
    line = data.count(b"\n", 0, position) + 1
    raise InputError(
        f"{path}:{line}: wrong encoding, not {names} (byte {position}); download the file again or save it as UTF-8"
    )


def read_table(path: Path, encodings: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line where the row begins, cells) of each row that is not blank; cells may be quoted and hold line breaks."""
    # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    reader = csv.reader(io.StringIO(read_text(path, encodings), newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path}:{line}: not a readable row ({error}); check the quotation marks from this line on"
            ) from None
        if any(cell.strip() for cell in cells):
            yield line, cells


def read_named_rows(
    path: Path, columns: Sequence[str], delimiter: str, aliases: dict[str, str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column name) of a UTF-8 table with a header; further columns (an unnamed index) are ignored."""
    header: list[str] | None = None
    for line, cells in read_table(path, ("utf-8-sig",), delimiter):
        if header is None:
            header = [(aliases or {}).get(cell.strip(), cell.strip()) for cell in cells]
            for column in columns:
                if column not in header:
                    apart = "tabs" if delimiter == "\t" else "commas"
                    raise InputError(
                        f"{path}:{line}: column {column!r} is missing; the header needs, "
                        f"separated by {apart}: {', '.join(columns)}"
                    )
            continue
        check_width(path, line, cells, header)
        row = dict(zip(header, cells, strict=True))
        yield line, {column: row[column] for column in columns}


def check_width(path: Path, line: int, cells: Sequence[str], header: Sequence[str]) -> None:
    if len(cells) != len(header):
        raise InputError(
            f"{path}:{line}: {len(cells)} columns, expected {len(header)} ({', '.join(header)}); "
            "check the separators in this row"
        )
