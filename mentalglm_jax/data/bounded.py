"""Rows of a stranger's file as plain values, read in a process of its own whose memory and time are bounded.

A file of a few kilobytes can stand for gigabytes: a dictionary value in every row, a page that decompresses to what its
header says, an archive of spaces. All sizes in it are what a stranger wrote, and libraries allocate by them. So the
system sets the bound: the child that reads may hold ``MEMORY`` bytes more than its libraries, gets ``SECONDS`` of
processor time for a few rows and ``seconds_for`` for all of them, and hands them over as lines of JSON, of which there
are not many more bytes than the file has. A file that makes the library fall over ends the child only.
(Where the system does not count what a process maps, as on macOS, of memory the last bound is the only one.)
"""

import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mentalglm_jax.foreign import first_line
from mentalglm_jax.interpreter import environment, module_command

MEMORY = 1 << 30  # bytes the child may allocate
SECONDS = 60  # of processor time, for one batch
WHOLE, PER_MIB = 60, 10  # seconds of it for any file, and for each MiB of it more; tables take less than one
LONGEST_ROW = 1 << 22  # characters of its JSON: far beyond any post
GROWTH, FLOOR, ROW = 100, 64 << 20, 512  # bytes of rows for one of the file, of any file, and what a row is counted as


def handed_over(module: str, source: BinaryIO, *arguments: str) -> Iterator[Any]:
    """What ``serve`` says in a process that runs ``module`` on ``source``: values, then why there are no more (text),
    or None where that is all."""
    quiet = environment(ARROW_DEFAULT_MEMORY_POOL="system", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    command = module_command(module, *arguments)
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
    elif child.returncode == -signal.SIGXCPU:
        yield f"it takes more than {seconds_for(source)} s of processor time"
    else:
        yield f"reading it takes more than {MEMORY >> 20} MiB of memory, or breaks the reader"


def seconds_for(source: BinaryIO) -> int:
    """Seconds of processor time that all of a file may take: 700 bytes of it may stand for 200 MB, row by row."""
    return WHOLE + PER_MIB * os.fstat(source.fileno()).st_size // (1 << 20)


def bound() -> None:
    """Of this process from now on: the memory it allocates, its time, and no file that tells of a crash."""
    import resource

    taken = Path("/proc/self/statm")  # the sixth number: pages of data and stack
    most = MEMORY + (int(taken.read_text().split()[5]) * mmap.PAGESIZE if taken.exists() else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = seconds_for(sys.stdin.buffer)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def serve(batches: Iterator[Sequence[Any]], plain: Callable[[Any], Any]) -> None:
    """Says what ``batches`` gives, as the child that was started for the file at its standard input, and ends it.

    Args:
        batches: first what is known of the file, a list; then lists of rows, few at a time. It calls ``bound``.
        plain: what JSON has for a value it does not know; raises ValueError where there is none.
    """
    out = open(sys.stdout.fileno(), "wb", closefd=False)  # noqa: SIM115 - it is the process's
    reason = None
    try:
        for line in _lines(batches, plain):
            out.write(line.encode() + b"\n")
    except MemoryError:
        reason = f"reading it takes more than {MEMORY >> 20} MiB of memory"
    except BrokenPipeError:
        return
    except Exception as error:  # of a library, of a decoder: all of them are about the file
        reason = re.sub(r"\b\w+(Exception|Error): ", "", first_line(error))
    out.write(json.dumps(reason).encode() + b"\n")
    out.flush()
    os._exit(0)  # nothing of the file is torn down


def _lines(batches: Iterator[Sequence[Any]], plain: Callable[[Any], Any]) -> Iterator[str]:
    number, left, first = 0, FLOOR + GROWTH * os.fstat(sys.stdin.fileno()).st_size, True
    while True:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        batch = next(batches, None)
        if batch is None:
            return
        if first:
            yield json.dumps(batch)
            first = False
            continue
        for row in batch:
            number += 1
            line = json.dumps(row, ensure_ascii=False, default=plain)
            left -= len(line) + ROW
            if len(line) > LONGEST_ROW:
                raise ValueError(f"row {number} has more than {LONGEST_ROW} characters")
            if left < 0:
                raise ValueError(f"it grows to more than {GROWTH} times its size; write its rows as JSONL")
            yield line
