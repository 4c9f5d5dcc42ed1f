"""One process at a time works on a directory or replaces a target.

The lock is the kernel's (``flock``, by the ``filelock`` package): it ends with the process that holds it, however that
process ends. On a network file system it is the server's. Where there is none, ``filelock`` goes by whether the file is
there, and takes over what a dead process of this machine left. The file says who holds it and is removed on release.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from mentalglm_jax.errors import RunError

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_UNKNOWN = "another process"


@contextlib.contextmanager
def held(file: Path, subject: Path) -> Iterator[None]:
    """Holds the lock ``file`` meanwhile; never waits for it.

    Args:
        subject: what is protected, for the message.

    Raises:
        RunError: another process (or another thread of this one) holds it: says which, on which host; something else
            has the lock's name; or the file system refused.
    """
    lock = FileLock(file, timeout=0)
    try:
        if _in_the_way(file):
            raise RunError(f"{subject}: {file} is a link, a pipe or a directory, not the lock of a process; delete it")
        lock.acquire(blocking=False)
        if not isinstance(lock, SoftFileLock):
            _sign(file)
    except Timeout:
        raise RunError(f"{subject}: {_holder(file)} works on it; wait until that has ended") from None
    except OSError as error:
        _release(lock, file)
        raise RunError(f"{subject}: cannot lock it ({error.strerror or error})") from error
    try:
        yield
    finally:
        _release(lock, file)


def _release(lock: BaseFileLock, file: Path) -> None:
    if not lock.is_locked:
        return
    # Removed while it is held: who has opened this file meanwhile sees that it has no name, and starts over.
    with contextlib.suppress(OSError):
        file.unlink()
    with contextlib.suppress(OSError):
        lock.release()


def _in_the_way(file: Path) -> bool:
    """Whether another file would be emptied in place of the lock: the one behind a link, also a hard one.

    A lock that goes by its file (``SoftFileLock``) has two names while it is held; it is signed.
    """
    try:
        found = os.lstat(file)
    except OSError:
        return False
    foreign = found.st_nlink > 1 and found.st_size > 0 and _holder(file) == _UNKNOWN
    return not stat.S_ISREG(found.st_mode) or foreign


def _sign(file: Path) -> None:
    """In the form of ``SoftFileLock``, which signs by itself."""
    with open(file, "w", encoding="utf-8", opener=lambda name, _: os.open(name, os.O_WRONLY | NO_LINK)) as signed:
        signed.write(f"{os.getpid()}\n{socket.gethostname()}\n")


def _holder(file: Path) -> str:
    """Who holds ``file``, by what it says; its content is a stranger's."""
    try:
        with file.open("rb") as opened:
            process, host, *_ = opened.read(400).decode().splitlines()
    except (OSError, ValueError):
        return _UNKNOWN
    if not (process.isdecimal() and len(process) < 20 and host.isprintable()):
        return _UNKNOWN
    if host == socket.gethostname():
        return f"process {process} on {host}"
    return f"process {process} on {host} (another machine: if it is gone, delete {file})"
