"""Reading what strangers wrote: nothing blocks, nothing outside is opened, every refusal is one line with its place.

Every file that somebody else may have written or changed comes in through here: rows, checkpoints, adapters,
tokenizers, and our own run directories, which may have been edited or damaged since.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from probes.errors import ProbeError, ProbeInputError

# What a directory that somebody else made may hold, in numbers and names; `mentalglm_jax` has the same file.
DIRECTORY: dict[str, Any] = json.loads((Path(__file__).parent / "directory.json").read_text("utf-8"))
MAX_JSON_BYTES = 64 << 20  # of a file that is not in that list
MAX_DEPTH: int = DIRECTORY["levels"]  # of nested lists and objects; what follows may walk them recursively
MAX_INTEGER = 2**63 - 1
BOM = b"\xef\xbb\xbf"
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


def plain(text: object, limit: int = 300) -> str:
    """One line that a terminal shows as it is: control, format and line-break characters become escapes."""
    shown = "".join(
        f"\\u{ord(char):04x}" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char
        for char in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[:limit] + "…"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return plain(said.strip()) or type(error).__name__


def some(names: Iterable[object], limit: int = 4) -> str:
    """The first few of ``names`` and how many more there are."""
    found = [plain(name, 120) for name in names]
    shown = ", ".join(found[:limit])
    return shown if len(found) <= limit else f"{shown} and {len(found) - limit} more"


@contextlib.contextmanager
def foreign_code(where: object, what: str) -> Iterator[None]:
    """Turns whatever a library raises about a file into one ``ProbeInputError``.

    A panic of a Rust library is a ``BaseException`` and no ``Exception``; it is caught as well.
    """
    try:
        yield
    except (*_STOPS, ProbeError):
        raise
    except BaseException as error:
        raise ProbeInputError(f"{where}: {what} ({first_line(error)})") from error


def inside(directory: str | Path, name: str) -> Path:
    """The file ``name`` directly in ``directory``; links may lead to the Hub cache's own blobs, nowhere else.

    Raises:
        ProbeInputError: the name or its link leads outside, there is no such file, or it is not a plain file.
    """
    directory = Path(directory)
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ProbeInputError(f"{directory}: refers to the file {plain(repr(name))}, which is outside the directory")
    path = directory / name
    try:
        target, root = path.resolve(strict=True), directory.resolve()
        kind = target.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:
        raise ProbeInputError(f"{path}: missing or unreadable") from error
    # The layout of the Hub's cache: snapshots/REVISION/name is a link to ../../blobs/HASH.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if target.parent not in roots:
        raise ProbeInputError(f"{path}: is a link to a file outside the directory; put the file itself there")
    if not stat.S_ISREG(kind):
        raise ProbeInputError(f"{path}: is not a plain file")
    return path


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """The bytes of a plain file; a pipe or a device is refused, never waited for.

    Args:
        limit: None is what its name allows (``DIRECTORY``).
    Raises:
        ProbeInputError: missing, unreadable, not a plain file, or larger than ``limit`` bytes.
    """
    most: int = DIRECTORY["bytes"].get(Path(path).name, MAX_JSON_BYTES) if limit is None else limit
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            if stat.S_ISDIR(status.st_mode):
                raise ProbeInputError(f"{path}: is a directory, not a file")
            raise ProbeInputError(
                f"{path}: is a pipe, socket or device, not a file; what comes through a pipe, as <(command) does, has "
                "to be saved to a file first: the same call must be able to read it again"
            )
        if status.st_size > most:
            raise ProbeInputError(f"{path}: {status.st_size} bytes is too large for this file (at most {most})")
        with os.fdopen(descriptor, "rb") as file:
            descriptor = None
            data = file.read(min(status.st_size, most) + 1)  # not as much as it may have
            if len(data) > status.st_size:  # it has grown, or is one of the system's that state no size
                data += file.read(most + 1 - len(data))
    except (OSError, ValueError) as error:
        raise ProbeInputError(f"{path}: cannot read ({getattr(error, 'strerror', None) or error})") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
    if len(data) > most:
        raise ProbeInputError(f"{path}: more than {most} bytes is too large for this file")
    return data


def begins(path: str | Path, size: int) -> bytes:
    """The first bytes of a file that would be replaced.

    Raises:
        ProbeInputError: there is something else than a file, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ProbeInputError(f"{path}: is in the way, it is no file; give another place")
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ProbeInputError(f"{path}: cannot read ({error.strerror or error})") from error


def parse_json(data: bytes, where: object, half_pairs: bool = False) -> Any:
    """Strict JSON: UTF-8, finite numbers, integers of 64 bits, each key once, ``MAX_DEPTH`` levels.

    Args:
        where: what it is, for the message. A file's name may allow integers of more digits (transformers writes 10^30
            for "no limit").
        half_pairs: whether strings may hold one half of a surrogate pair (a post of ours may; no file can as UTF-8).
    Raises:
        ProbeInputError: ``where: reason``.
    """

    def refuse(reason: str) -> NoReturn:
        raise ProbeInputError(f"{where}: {reason}")

    digits = DIRECTORY["integer_digits"].get(Path(str(where)).name, 0)

    def integer(text: str) -> int:
        if len(text) <= digits or (len(text) <= 20 and abs(int(text)) <= MAX_INTEGER):
            return int(text)
        return refuse(f"not usable: an integer of {len(text)} digits")

    def real(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(f"not usable: the number {plain(text, 40)} is infinite")

    def constant(name: str) -> NoReturn:
        refuse(f"not JSON: {name} is no number that JSON knows")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(value := dict(pairs)) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            refuse(f"not usable: the key {plain(repr(twice), 80)} stands more than once")
        return value

    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_int=integer, parse_float=real, parse_constant=constant, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise ProbeInputError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except RecursionError as error:
        raise ProbeInputError(f"{where}: not usable: nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:
        raise ProbeInputError(f"{where}: not JSON ({first_line(error)})") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for node in level if isinstance(node, (dict, list)) for child in _children(node)]
        if not level:
            break
    else:
        refuse(f"not usable: nested more than {MAX_DEPTH} levels deep")
    if not half_pairs and _HALF_PAIR.search(data) and (key := _half_pair(value)) is not None:
        refuse(f"{key} holds half a surrogate pair, which is no character; repair the text it comes from")
    return value


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def _half_pair(value: Any, key: str = "the text") -> str | None:
    """Where a string is that UTF-8 cannot hold."""
    if isinstance(value, str):
        return key if any("\ud800" <= char <= "\udfff" for char in value) else None
    if isinstance(value, dict):
        if any(_half_pair(name) for name in value):
            return "a key"
        return next((k for name, one in value.items() if (k := _half_pair(one, f"key {plain(name, 40)!r}"))), None)
    if isinstance(value, list):
        return next((k for one in value if (k := _half_pair(one, key))), None)
    return None


def read_json(path: str | Path, half_pairs: bool = False, limit: int | None = None) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit`` bytes; None: its name says how large it may be.

    Raises:
        ProbeInputError: see ``read_bytes`` and ``parse_json``; or the file holds something else than an object.
    """
    value = parse_json(read_bytes(path, limit), path, half_pairs)
    if not isinstance(value, dict):
        raise ProbeInputError(f"{path}: a JSON {type(value).__name__}, not an object")
    return value


class Fields:
    """A JSON object from outside with its place. Each getter checks one key; refusals say ``where: key: reason``.

    A key that is missing or null gives ``default``.
    """

    def __init__(self, values: Mapping[str, Any], where: object) -> None:
        self.values = values
        self.where = where

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raises the ``ProbeInputError`` of a key."""
        raise ProbeInputError(f"{self.where}: {key}: {reason}, found {plain(repr(self.values.get(key)), 80)}")

    def number(
        self, key: str, low: int | float, high: int | float, default: int | float | None = None
    ) -> int | float | None:
        """A finite number in [low, high]."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.refuse(key, f"must be a number from {low:g} to {high:g}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer in [low, high]; ``4.0`` is one, too (some programs write it so)."""
        value = self.number(key, low, high, default)
        if value is not None and value != int(value):
            self.refuse(key, "must be a whole number")
        return None if value is None else int(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return default if value is None else value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "must be a string")
        return default if value is None else value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where there is none."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "must be a list of strings")
        return tuple(value)

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return value or {}
