"""Rows of Arrow and Parquet files as plain values. What ``datasets`` notes beside the columns is not looked at, so an
image or sound column is never decoded, and only the columns asked for are read. Needs the [data] extra."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError

_ROWS = 1024  # read at once


def arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, counted from 1, values of those of ``columns`` that are there and not null) of one file.

    Args:
        path: ``.parquet``, or ``.arrow`` in either of its forms (stream, as ``datasets`` writes it, or file).

    Raises:
        InputError: the file is missing, is neither of them, is damaged, or the [data] extra is not installed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        import pyarrow
    except ImportError:
        raise InputError("Parquet and Arrow need the data extra: pip install 'mentalglm-jax[data]'") from None
    number = 0
    try:
        for batch in _batches(path, columns):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        reason = str(error).partition("\n")[0][:300]
        raise InputError(f"{path}: not {kind} file that can be read ({reason}); is the download complete?") from None


def _batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow

    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            yield from file.iter_batches(_ROWS, columns=there)
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            reader = (file.get_batch(number) for number in range(file.num_record_batches))
        for batch in reader:
            chosen = batch.select([name for name in columns if name in batch.schema.names])
            for start in range(0, chosen.num_rows, _ROWS):
                yield chosen.slice(start, _ROWS)
