"""Rows of Parquet and Arrow files as plain values, read in a process of its own (``bounded.py``).

What ``datasets`` notes beside the columns is not looked at, so an image or a sound is never fetched or decoded, and
only the columns asked for are read. Needs the [data] extra.
"""

import importlib.util
import mmap
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.bounded import bound, handed_over, serve
from mentalglm_jax.errors import InputError, install
from mentalglm_jax.foreign import open_file, short

SUFFIXES = (".parquet", ".arrow")
_ROWS = 64  # of one batch
_MOST_METADATA, _MOST_NOTES = 16 << 20, 1 << 20  # bytes of a text in a Parquet footer; of what datasets notes


def arrow_rows(path: Path, columns: Sequence[str], others: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, counted from 1, values of those of ``columns`` that are there and not null) of one file.

    Args:
        path: ``.parquet``, or ``.arrow`` in either of its forms (stream, as ``datasets`` writes it, or file).
        others: let the file have other columns, which are not read.

    Raises:
        InputError: the file is missing, is neither of them, is damaged, has other columns, holds a row of more than
            ``LONGEST_ROW`` characters, grows beyond the bounds of ``bounded.py``, or the [data] extra is not installed.
    """
    found = _opened(path, columns)
    names, _ = next(found)
    if unknown := [name for name in names if name not in columns and not others]:
        raise InputError(f"{path}: unknown column {short(unknown[0])}; known: {', '.join(columns)}")
    yield from enumerate(found, start=1)


def arrow_columns(path: Path) -> tuple[tuple[str, ...], str]:
    """The names of the columns of a file, and what ``datasets`` noted about them (JSON; empty if it did not).

    Raises:
        InputError: as ``arrow_rows``.
    """
    names, noted = next(_opened(path, ()))
    return tuple(names), noted


def _opened(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Column names and notes, then rows. Raises: InputError as ``arrow_rows``."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"Parquet and Arrow need the data extra: {install('data')}")
    kind = "a Parquet" if path.suffix.lower() == ".parquet" else "an Arrow"
    try:
        source = open_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: not {kind} file that can be read ({error.strerror or error})") from None
    with source:
        reason = None
        for value in handed_over("mentalglm_jax.data.arrow", source, path.suffix.lower(), *columns):
            if isinstance(value, dict | list):
                yield value
            else:
                reason = value
    if reason is not None:
        raise InputError(f"{path}: not {kind} file that can be read ({reason}); is the download complete?")


def _batches(suffix: str, columns: Sequence[str]) -> Iterator[Any]:
    """First the column names and what ``datasets`` noted about them; then batches of few rows of those columns, from
    what stands at the standard input."""
    import pyarrow
    import pyarrow.parquet

    bound()
    data = pyarrow.BufferReader(pyarrow.py_buffer(mmap.mmap(sys.stdin.fileno(), 0, access=mmap.ACCESS_READ)))
    if suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(
            data, thrift_string_size_limit=_MOST_METADATA, thrift_container_size_limit=1_000_000
        )
        there, found = file.schema_arrow.names, file.iter_batches
        yield there, _noted(file.schema_arrow)
        _refuse_twice(there, columns)
        yield from found(_ROWS, columns=[name for name in columns if name in there], use_threads=False)
        return
    try:
        reader = pyarrow.ipc.open_stream(data)
        schema, batches = reader.schema, iter(reader)
    except pyarrow.ArrowInvalid:
        data.seek(0)
        file = pyarrow.ipc.open_file(data)
        schema, batches = file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    there = schema.names
    yield there, _noted(schema)
    _refuse_twice(there, columns)
    for batch in batches:
        chosen = batch.select([name for name in columns if name in there])
        chosen.validate(full=True)  # the reader has not looked whether offsets stay inside
        for start in range(0, chosen.num_rows, _ROWS):
            yield chosen.slice(start, _ROWS)


def _noted(schema: Any) -> str:
    noted = (schema.metadata or {}).get(b"huggingface", b"")
    return noted.decode("utf-8", "replace") if len(noted) <= _MOST_NOTES else ""


def _refuse_twice(there: Sequence[str], columns: Sequence[str]) -> None:
    if twice := [name for name in columns if there.count(name) > 1]:
        raise ValueError(f"column {twice[0]!r} stands more than once")


def _plain(value: Any) -> Any:
    raise ValueError(f"it holds a value that is no text, number or list ({type(value).__name__})")


def _known(suffix: str, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    """What the child says: column names and notes, then rows without their nulls."""
    batches = _batches(suffix, columns)
    yield next(batches)
    for batch in batches:
        yield [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]


if __name__ == "__main__":
    serve(_known(sys.argv[1], sys.argv[2:]), _plain)
