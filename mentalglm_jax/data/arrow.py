"""Rows of Parquet and Arrow files as plain values, read in a process of its own whose memory is bounded.

A file of a few kilobytes can stand for gigabytes: a dictionary value in every row, a page that decompresses to what its
header says, runs of one value. All sizes in it are what a stranger wrote, and the library allocates by them. So the
system sets the bound: the child that reads may hold ``MEMORY`` bytes more than its libraries, gets ``SECONDS`` of
processor time for a few rows, and hands them over as lines of JSON, of which there are not many more bytes than the
file has. A file that makes the library fall over ends the child only. (Where the system does not count what a process
maps, as on macOS, the last bound is the only one.)

What ``datasets`` notes beside the columns is not looked at, so an image or a sound is never fetched or decoded, and
only the columns asked for are read. Needs the [data] extra.
"""

import importlib.util
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mentalglm_jax.errors import InputError, install
from mentalglm_jax.foreign import first_line, open_file, short
from mentalglm_jax.interpreter import environment, module_command

SUFFIXES = (".parquet", ".arrow")
MEMORY = 1 << 30  # bytes the child may allocate
SECONDS = 60  # of processor time, for one batch
LONGEST_ROW = 1 << 22  # characters of its JSON: far beyond any post
GROWTH, FLOOR, ROW = 100, 64 << 20, 512  # bytes of rows for one of the file, of any file, and what a row is counted as
_ROWS = 64  # of one batch
_MOST_METADATA, _MOST_NOTES = 16 << 20, 1 << 20  # bytes of a text in a Parquet footer; of what datasets notes


def arrow_rows(path: Path, columns: Sequence[str], others: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, counted from 1, values of those of ``columns`` that are there and not null) of one file.

    Args:
        path: ``.parquet``, or ``.arrow`` in either of its forms (stream, as ``datasets`` writes it, or file).
        others: let the file have other columns, which are not read.

    Raises:
        InputError: the file is missing, is neither of them, is damaged, has other columns, holds a row of more than
            ``LONGEST_ROW`` characters, grows beyond the bounds above, or the [data] extra is not installed.
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
    kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
    try:
        source = open_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: not {kind} file that can be read ({error.strerror or error})") from None
    with source:
        reason = None
        for value in _handed_over(source, path.suffix, columns):
            if isinstance(value, dict | list):
                yield value
            else:
                reason = value
    if reason is not None:
        raise InputError(f"{path}: not {kind} file that can be read ({reason}); is the download complete?")


def _handed_over(source: BinaryIO, suffix: str, columns: Sequence[str]) -> Iterator[Any]:
    """A list of column names and notes, then rows, then why there are no more (None: that is all)."""
    command = module_command("mentalglm_jax.data.arrow", suffix, *columns)
    quiet = environment(ARROW_DEFAULT_MEMORY_POOL="system", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quiet) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                value = json.loads(line)
                yield value
                if not isinstance(value, dict | list):
                    return
            child.wait()
        finally:
            child.kill()
    if child.returncode == -signal.SIGPROF:
        yield f"a few of its rows take more than {SECONDS} s of processor time"
    else:
        yield f"reading it takes more than {MEMORY >> 20} MiB of memory, or breaks the reader"


def _batches(suffix: str, columns: Sequence[str]) -> Iterator[Any]:
    """First the column names and what ``datasets`` noted about them; then batches of few rows of those columns, from
    what stands at the standard input."""
    import pyarrow
    import pyarrow.parquet

    _bound()
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


def _bound() -> None:
    """Of this process from now on: the memory it allocates, and no file that tells of a crash."""
    import resource

    taken = Path("/proc/self/statm")  # the sixth number: pages of data and stack
    most = MEMORY + (int(taken.read_text().split()[5]) * mmap.PAGESIZE if taken.exists() else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _plain(value: Any) -> Any:
    raise ValueError(f"it holds a value that is no text, number or list ({type(value).__name__})")


def _lines(suffix: str, columns: Sequence[str]) -> Iterator[str]:
    """What the child says, see ``_handed_over``."""
    batches = _batches(suffix, columns)
    yield json.dumps(next(batches))
    number, left = 0, FLOOR + GROWTH * os.fstat(sys.stdin.fileno()).st_size
    while True:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        batch = next(batches, None)
        if batch is None:
            return
        for row in batch.to_pylist():
            number += 1
            kept = {name: value for name, value in row.items() if value is not None}
            line = json.dumps(kept, ensure_ascii=False, default=_plain)
            left -= len(line) + ROW
            if len(line) > LONGEST_ROW:
                raise ValueError(f"row {number} has more than {LONGEST_ROW} characters")
            if left < 0:
                raise ValueError(f"it grows to more than {GROWTH} times its size; write its rows as JSONL")
            yield line


def _serve(suffix: str, *columns: str) -> None:
    out = open(sys.stdout.fileno(), "wb", closefd=False)  # noqa: SIM115 - it is the process's
    reason = None
    try:
        for line in _lines(suffix, columns):
            out.write(line.encode() + b"\n")
    except MemoryError:
        reason = f"reading it takes more than {MEMORY >> 20} MiB of memory"
    except BrokenPipeError:
        return
    except Exception as error:  # of pyarrow, of a decoder: all of them are about the file
        reason = re.sub(r"\b\w+(Exception|Error): ", "", first_line(error))
    out.write(json.dumps(reason).encode() + b"\n")
    out.flush()
    os._exit(0)  # nothing of the file is torn down


if __name__ == "__main__":
    _serve(*sys.argv[1:])
