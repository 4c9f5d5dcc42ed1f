"""The cache of a run: one file per post, under a hash of all its numbers depend on, with a digest of what it holds.

In a redacted run that hash is keyed. The key lies in ``DIR/private``, which is nobody else's business: without it a
name cannot be compared with that of a guessed text. Nothing else in ``DIR`` holds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import warnings
from pathlib import Path
from typing import Any

from probes.errors import ProbeError, ProbeInputError, ProbeWarning
from probes.files import dump, make_dir, write_bytes
from probes.foreign import plain, read_bytes, read_json

_NAME = re.compile(r"(randomised-|swap-)?[0-9a-f]{32}(\.part-[0-9]{1,3})?\.json")
_KEY_BYTES = 32
MOST_BYTES = 256 << 20  # of a post: fifty maps of the longest


def digest(value: Any, key: bytes = b"", name: str = "") -> str:
    """32 hex digits (BLAKE2b) over a JSON value, whatever the order of its keys, and the name it is kept under."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(f"{name} {text}".encode(), digest_size=16, key=key).hexdigest()


class Cache:
    """The finished posts of one run directory.

    Raises:
        ProbeInputError: a link stands in its place.
        ProbeError: the key of a redacted run cannot be kept.
    """

    def __init__(self, out: Path, redact: bool = False) -> None:
        self.directory = out / "cache"
        if self.directory.is_symlink():
            raise ProbeInputError(f"{self.directory}: is a link, and would be written through; remove it")
        self._said: set[str] = set()
        self._key = _private_key(out / "private" / "key") if redact else b""

    def name(self, parts: Any, kind: str = "") -> str:
        """The file name for what depends on ``parts`` (JSON types); ``kind``: "", "randomised-" or "swap-"."""
        return f"{kind}{digest(parts, self._key)}.json"

    def part(self, name: str, step: int) -> str:
        """The name of what is finished of the post ``name`` while others of its maps are still to be made."""
        return f"{name.removesuffix('.json')}.part-{step}.json"

    def forget_parts(self, name: str) -> None:
        """Removes the parts of a post that is finished."""
        for path in self.directory.glob(f"{name.removesuffix('.json')}.part-*.json"):
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Removes all that is kept; what has another name is somebody else's."""
        for path in self.directory.glob("*.json"):
            if _NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """What is kept under a name; None when nothing is.

        Warns:
            ProbeWarning: it is damaged or was edited; it is then not used (None).
        """
        path = self.directory / name
        if not path.exists() and not path.is_symlink():
            return None
        try:
            return entry(self.directory, name)
        except ProbeInputError as error:
            if name not in self._said:  # a process that waits for another's post asks often
                warnings.warn(f"{error}; made again", ProbeWarning, stacklevel=2)
            self._said.add(name)
            return None

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a value; readable for its owner only.

        Raises:
            ProbeError: the file system refused.
            ProbeInputError: it is larger than what is read back.
        """
        data = (dump({"digest": digest(value, name=name), "value": value}) + "\n").encode()
        if len(data) > MOST_BYTES:
            raise ProbeInputError(f"{self.directory / name}: the maps of this post take {len(data)} bytes (at most "
                                  f"{MOST_BYTES}); ask for fewer methods, or leave the post out")  # fmt: skip
        write_bytes(self.directory / name, data, private=True)


def entry(directory: Path, name: object) -> dict[str, Any]:
    """The value kept under a name in a cache directory.

    Raises:
        ProbeInputError: the name leads elsewhere, or the entry is missing, damaged, edited, or another one's.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ProbeInputError(f"{directory.parent}/manifest.json: cache: {plain(repr(name), 80)} is no name of a post")
    path = directory / name
    if path.is_symlink():
        raise ProbeInputError(f"{path}: is a link, not a file of this run")
    stored = read_json(path, half_pairs=True, limit=MOST_BYTES)
    value = stored.get("value")
    if stored.keys() != {"digest", "value"} or not isinstance(value, dict):
        raise ProbeInputError(f"{path}: not a post of this version")
    if stored["digest"] != digest(value, name=name):
        raise ProbeInputError(f"{path}: damaged or edited since it was written")
    return value


def _private_key(path: Path) -> bytes:
    """The key of this run; made once, whoever of several processes comes first."""
    with contextlib.suppress(ProbeInputError):
        return _read_key(path)
    temporary = path.with_name(f".key.{secrets.token_hex(8)}")
    try:
        make_dir(path.parent, private=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # as a whole or not at all, and never over another's
    except OSError as error:
        raise ProbeError(f"{path}: cannot write ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    key = read_bytes(path, 1024)
    if len(key) != _KEY_BYTES:
        raise ProbeInputError(f"{path}: damaged; delete the run directory and run again")
    return key
