"""Atomic output: a reader sees the old file or the new one, never half of either."""

import contextlib
import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import RunError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk and renames it into place.

    Raises:
        RunError: the file system refused (no space, no permission); the previous file is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot write ({error.strerror or error}); the previous file is unchanged") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str | Path, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """``write_text`` of indented JSON, Chinese kept readable; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def replace_dir(path: str | Path) -> Iterator[Path]:
    """Yields an empty directory beside ``path`` that takes its place on success and vanishes on failure.

    Raises:
        RunError: the file system refused (no space, no permission); an existing ``path`` is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o755)
        yield temporary
        if not (path.exists() and _exchange(temporary, path)):
            _replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot write ({error.strerror or error}); what was there is unchanged") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step, where the system can (Linux; not every file system): no moment without either."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace(new: Path, path: Path) -> None:
    """Two renames; the first is taken back when the second does not happen."""
    old = new.with_name(new.name + ".old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
