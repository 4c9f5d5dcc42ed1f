"""Atomic output: a reader sees the old file or the new one, never half of either.

Modes: a replaced file keeps its own; a new one is what the umask allows, or, where it holds posts (``private``), its
owner's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probes.errors import ProbeError


def write_bytes(path: str | Path, data: bytes, private: bool = False) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk and renames it into place.

    Args:
        private: it holds posts: a new file is readable by its owner only, and so is its directory if it is made here.

    Raises:
        ProbeError: the file system refused (no space, no permission); the previous file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
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
        raise ProbeError(f"{path}: cannot write ({error.strerror or error}); the previous file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str, private: bool = False) -> None:
    """``write_bytes`` of UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    write_bytes(path, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8"), private)


def write_json(path: str | Path, value: Any, private: bool = False) -> None:
    """Indented JSON; NaN and infinity are refused (they are not JSON). Lone surrogates survive as escapes."""
    write_bytes(path, (dump(value, indent=2) + "\n").encode("utf-8"), private)


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]], private: bool = False) -> None:
    """One JSON object per line."""
    write_bytes(path, "".join(dump(row) + "\n" for row in rows).encode("utf-8"), private)


def make_dir(path: Path, private: bool = False) -> None:
    """``path`` and its parents, those that are missing; a private one is its owner's only."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700 if private else 0o777, exist_ok=True)


def _mode(path: Path) -> int | None:
    """Permission bits of what is there."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:
        return None


def dump(value: Any, indent: int | None = None) -> str:
    """A JSON text; NaN and infinity are refused, lone surrogates survive as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate somewhere: escape everything that is not ASCII
        text = json.dumps(value, ensure_ascii=True, allow_nan=False, indent=indent)
    return text
