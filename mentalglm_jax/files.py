"""Atomic output: a reader sees the old file or the new one, never half of either.

Modes: a replaced file or directory keeps its own; a new one is what the umask allows, or, where it holds posts
(``private``), the owner's alone.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.locks import held

LOCK = ".lock"
_LEFT_OVER = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.unfinished(?P<old>\.old)?")


def write_bytes(path: str | Path, data: bytes, private: bool = False) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk and renames it into place.

    Args:
        private: it holds posts: a new file is readable by its owner only, and so is its directory if it is made here.

    Raises:
        RunError: the file system refused (no space, no permission); the previous file is untouched.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        make_dir(path.parent, private)
        mode = _mode(path)
        rights = 0o600 if private or mode is not None else 0o666
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights), "wb") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot write ({error.strerror or error}); the previous file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str, private: bool = False) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"), private)


def write_json(path: str | Path, value: Any, private: bool = False) -> None:
    """``write_text`` of indented JSON, Chinese kept readable; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", private)


def make_dir(path: Path, private: bool = False) -> None:
    """``path`` and its parents, those that are missing; a private one is its owner's only."""
    if path.is_dir():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except RecursionError:  # a thousand directories in each other
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path)) from None
    path.mkdir(mode=0o700 if private else 0o777, exist_ok=True)


@contextlib.contextmanager
def replace_dir(path: str | Path, check: Callable[[Path], None], private: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside ``path`` that takes its place on success and vanishes on failure.

    One process at a time does that for one ``path``; what a killed one left beside it is removed first. What others put
    into ``path`` meanwhile is not lost: ``check`` judges it before the work, before the exchange and, as the old
    directory that is about to be deleted, after it.

    Args:
        check: refuses a directory (also one that is not there) that must not be replaced, see ``check_owned``.
        private: as in ``write_bytes``.

    Raises:
        InputError: of ``check``, or ``path`` is a link; an existing ``path`` is untouched, as it is if there is a
        RunError: another process is at it; or the file system refused (no space, no permission).
    """
    path = Path(path)
    temporary = None
    try:
        make_dir(path.parent)
        with held(path.with_name(f".{path.name}{LOCK}"), path):
            _remove_left_over(path)
            if path.is_symlink():
                raise InputError(f"{path}: is a link and would be replaced; name the directory itself")
            check(path)
            mode = _mode(path)
            temporary = _beside(path)
            temporary.mkdir(mode=0o777 if mode is None and not private else 0o700)
            yield temporary
            if mode is not None:
                _keep_modes(path, temporary)
                temporary.chmod(mode)
            check(path)
            if path.exists() and _exchange(temporary, path):
                try:
                    _check_old(temporary, path, check)
                except BaseException:
                    _exchange(temporary, path)
                    raise
            else:
                _replace(temporary, path, check)
    except OSError as error:
        raise RunError(f"{path}: cannot write ({error.strerror or error}); what was there is unchanged") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_owned(directory: Path, owned: Callable[[str], object]) -> None:
    """Refuses to replace a directory that holds anything but files we would have written.

    Args:
        owned: whether a file of this path below it ("params/x/0") is one of those.

    Raises:
        InputError: ``directory`` is no directory, or holds others.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; give a directory to write")
    others = []
    for root, folders, names in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in (*names, *links):
            path = Path(root, name).relative_to(directory)
            meant = path.with_name(left_over_of(name) or name)
            if name in links or not owned(meant.as_posix()):
                others.append(path.as_posix())
    if others:
        shown = ", ".join(name if len(name) <= 200 else name[:200] + "…" for name in sorted(others)[:4])
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise InputError(f"{directory}: would be replaced but holds other files ({shown}{more}); choose another place")


_LONGEST_PAGE = 1 << 22  # bytes; what is longer is not ours
_SEAL = "<!-- as mentalglm-jax wrote it: {} -->\n"  # the last line of a page that people go on with


def sealed(text: str) -> str:
    """A page of Markdown with a last line, not shown, by which ``check_unedited`` tells that nobody went on with it."""
    return f"{text}\n{_SEAL.format(hashlib.sha256(text.encode()).hexdigest()[:16])}"


def check_unedited(path: Path, instead: str = "") -> None:
    """Raises: InputError if there is a page that is not as ``sealed`` made it: writing it anew would lose what a person
    wrote. ``instead``: what else may be done with it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: would be replaced and cannot be read ({error.strerror or error})") from None
    try:  # not waited for: a pipe or a device may have the name
        text = "no file"
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with open(descriptor, "rb", closefd=False) as file:
                text = file.read(_LONGEST_PAGE).decode("utf-8", "replace")
    finally:
        os.close(descriptor)
    if text.strip() and text != sealed(text[: -len(_SEAL.format("0" * 16)) - 1]):
        raise InputError(f"{path}: was changed since it was written (or comes of an earlier version), and would be "
                         f"lost; move it, or choose another place{instead and f'; {instead}'}")  # fmt: skip


def write_card(path: Path, text: str) -> None:
    """Writes a page as ``sealed``. One that a person went on with meanwhile stays, and a warning says so: what the work
    took is not lost for it."""
    try:
        check_unedited(path)
    except InputError:
        warnings.warn(f"{path}: was changed since it was written and is left as it is", stacklevel=2)
    else:
        write_text(path, sealed(text))


def refuse_inputs(out: Path, read: Mapping[str, str | Path | None]) -> None:
    """Whether a directory that will be replaced whole is, or holds, what is read.

    Args:
        read: what names it, for the message, and where it is; what is not there is no matter.

    Raises:
        InputError: it does.
    """
    for name, given in read.items():
        path = Path(os.path.expanduser(given)) if given is not None else None
        if path is not None and path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out}: would be replaced, and {'holds' if path.is_file() else 'is or holds'} {given}, "
                             f"which is read ({name}); name another place")  # fmt: skip


@contextlib.contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """Keeps other processes out of ``directory`` meanwhile; it holds posts, so it is private if it is made here.

    Unfinished files that a killed process left in it, not below it, are removed.

    Raises:
        RunError: another process is at work there, or the file system refused.
    """
    try:
        make_dir(directory, private=True)
    except OSError as error:
        raise RunError(f"{directory}: cannot make this directory ({error.strerror or error})") from error
    with held(directory / LOCK, directory):
        for name in os.listdir(directory):
            if (found := _LEFT_OVER.fullmatch(name)) is not None:
                _remove_left_over(directory / found["target"])
        yield


@contextlib.contextmanager
def working_on(file: Path) -> Iterator[None]:
    """Keeps other processes away from a file that is written over some time; ``working_in`` for one file."""
    try:
        make_dir(file.parent)
    except OSError as error:
        raise RunError(f"{file}: cannot make its directory ({error.strerror or error})") from error
    with held(file.with_name(f".{file.name}{LOCK}"), file):
        _remove_left_over(file)
        yield


def left_over_of(name: str) -> str | None:
    """The target of which ``name`` is what ``write_bytes`` or ``replace_dir`` call it while it is not finished."""
    found = _LEFT_OVER.fullmatch(name)
    return found and found["target"]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")


def _mode(path: Path) -> int | None:
    """Permission bits of what is there."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:
        return None


def _keep_modes(old: Path, new: Path) -> None:
    """Gives every file and directory below ``new`` the mode of its counterpart below ``old``."""
    for path in new.rglob("*"):
        if not path.is_symlink() and (mode := _mode(old / path.relative_to(new))) is not None:
            path.chmod(mode)


def _remove_left_over(path: Path) -> None:
    """What a killed process left beside ``path`` on the way to it; nobody else is at it."""
    for entry in list(os.scandir(path.parent)):
        found = _LEFT_OVER.fullmatch(entry.name)
        if found is None or found["target"] != path.name or entry.is_symlink():
            continue
        if found["old"] and not path.exists():  # killed between two renames: this is the only whole one
            os.rename(entry.path, path)
        elif entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step, where the system can (Linux; not every file system): no moment without either."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace(new: Path, path: Path, check: Callable[[Path], None]) -> None:
    """Two renames; the first is taken back when the second does not happen."""
    old = new.with_name(new.name + ".old")
    if path.exists():
        path.rename(old)
    try:
        _check_old(old, path, check)
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_old(old: Path, path: Path, check: Callable[[Path], None]) -> None:
    """``check`` of what is about to be deleted; its message names ``path``, whose place was taken."""
    try:
        check(old)
    except InputError as error:
        raise InputError(str(error).replace(str(old), str(path))) from None
