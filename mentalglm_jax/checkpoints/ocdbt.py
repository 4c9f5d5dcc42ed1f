"""Looks through the database that Orbax keeps a tree in (OCDBT), in a process of its own, before this one opens it.

Its manifest and its nodes are compressed and say themselves how many files and entries they name: 24 kilobytes become
4 GB of table and a minute and a half of work, and TensorStore sets no bound. So the system does, for a child that reads
all of them once and says nothing but whether that went well. What it can read this process can, for little more.
"""

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.interpreter import environment, module_command

MANIFEST = "manifest.ocdbt"
MEMORY = 128 << 20  # bytes the child may allocate; a tree of ten thousand chunks takes a few of them
SECONDS = 2.0  # of processor time; that tree takes a hundredth


def check_databases(params: Path) -> None:
    """Whether the databases of a tree, if it is kept in any, can be read within these bounds; what they hold is not
    looked at.

    Args:
        params: the directory of the tree, which has been seen to hold files and directories only.

    Raises:
        InputError: one cannot, or is damaged.
        RunError: no process can be started to look.
    """
    found = sorted(file.parent for file in params.rglob(MANIFEST))
    if not found:
        return
    try:
        done = subprocess.run(
            module_command("mentalglm_jax.checkpoints.ocdbt", *found), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), check=False,
        )  # fmt: skip
    except OSError as error:
        raise RunError(f"no process can be started to read {params} ({error.strerror or error})") from error
    if done.returncode == 0:
        return
    what = done.stdout.decode(errors="replace")
    if done.returncode == -signal.SIGPROF:
        what = f"it takes more than {SECONDS:g} s of processor time"
    what = what or f"it takes more than {MEMORY >> 20} MiB of memory, or breaks the reader"
    raise InputError(f"{params}: not a readable Orbax checkpoint ({MANIFEST}: {what})")


def _read(directories: Sequence[str]) -> None:
    """In the child."""
    import resource

    import tensorstore

    taken = Path("/proc/self/statm")  # the sixth number: pages of data and stack
    most = MEMORY + (int(taken.read_text().split()[5]) * mmap.PAGESIZE if taken.exists() else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
    few = {"limit": 1}  # threads: their stacks count as memory, and there would be one for each core
    context = tensorstore.Context({"file_io_concurrency": few, "data_copy_concurrency": few})
    for directory in directories:
        spec = {"driver": "ocdbt", "base": f"file://{directory}/"}
        store = tensorstore.KvStore.open(spec, context=context).result()
        store.list().result()


if __name__ == "__main__":
    try:
        _read(sys.argv[1:])
    except Exception as error:  # TensorStore: ValueError and others
        if not isinstance(error, MemoryError):
            os.write(1, " ".join(str(error).split())[:160].encode())
        os._exit(1)
    os._exit(0)
