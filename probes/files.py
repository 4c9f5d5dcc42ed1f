"""Atomic output: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probes.errors import ProbeError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk and renames it into place.

    Raises:
        ProbeError: the file system refused (no space, no permission); the previous file is untouched.
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
        raise ProbeError(f"{path}: cannot write ({error.strerror or error}); the previous file is unchanged") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str | Path, text: str) -> None:
    """``write_bytes`` of UTF-8; a lone surrogate, which UTF-8 can not hold, becomes U+FFFD."""
    write_bytes(path, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON; NaN and infinity are refused (they are not JSON). Lone surrogates survive as escapes."""
    write_bytes(path, (_dump(value, indent=2) + "\n").encode("utf-8"))


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line."""
    write_bytes(path, "".join(_dump(row) + "\n" for row in rows).encode("utf-8"))


def _dump(value: Any, indent: int | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate somewhere: escape everything that is not ASCII
        text = json.dumps(value, ensure_ascii=True, allow_nan=False, indent=indent)
    return text
