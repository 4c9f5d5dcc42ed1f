"""One run at a time in a run directory. The lock is the system's: it ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from probes.errors import ProbeError, ProbeInputError, ProbeWarning
from probes.files import write_json
from probes.foreign import plain, read_json

LOCK = "run.lock"
HOLDER = "run.lock.json"  # who holds it, for the message; the lock itself does not depend on it


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is made if needed.

    Warns:
        ProbeWarning: the file system knows no locks; nothing is held then.
    Raises:
        ProbeInputError: another process is at work there (named), or something else has the lock's name.
        ProbeError: the directory cannot be written.
    """
    from filelock import FileLock, Timeout

    path = out / LOCK
    if _in_the_way(path):
        raise ProbeInputError(f"{path}: is in the way (a link, pipe or directory); delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, mode=0o600)
        lock.acquire()
    except Timeout:
        raise ProbeInputError(
            f"{out}: {_holder(out)} is at work in this directory; wait for it, or give another --out"
        ) from None
    except NotImplementedError:
        said = f"{out}: this file system knows no locks; start no second run in this directory"
        warnings.warn(said, ProbeWarning, stacklevel=3)
        yield
        return
    except OSError as error:
        raise ProbeError(f"{path}: cannot write ({error.strerror or error})") from error
    try:
        write_json(out / HOLDER, {"host": socket.gethostname(), "process": os.getpid()})
        yield
    finally:
        with contextlib.suppress(OSError):
            (out / HOLDER).unlink()
        lock.release()


def _in_the_way(path: Path) -> bool:
    """Whether another file would be emptied in place of the lock: the one behind a link, also a hard one. A lock that
    goes by its file has two names while it is held, and begins with a process's number."""
    try:
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1 and found.st_size > 0:
            return re.match(rb"[0-9]{1,19}\n", path.read_bytes()[:400]) is None
    except OSError:
        return False
    return not stat.S_ISREG(found.st_mode)


def refuse_held(out: Path) -> None:
    """Says now what ``held`` would say later: another process is at work there.

    Raises:
        ProbeInputError: see ``held``.
    """
    if (out / LOCK).exists() or (out / LOCK).is_symlink():
        with held(out):
            pass


def _holder(out: Path) -> str:
    try:
        found = read_json(out / HOLDER)
    except ProbeInputError:
        return "another process"
    return f"process {plain(found.get('process'), 20)} on {plain(found.get('host'), 100)}"
