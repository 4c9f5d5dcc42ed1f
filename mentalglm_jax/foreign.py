"""Reading what strangers wrote: nothing outside the directory is opened, every refusal is one line with the file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mentalglm_jax.errors import InputError

MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 100_000


def inside(directory: Path, name: str) -> Path:
    """The file ``name`` directly in ``directory``; links may lead to the Hub cache's own blobs, nowhere else.

    Raises:
        InputError: the name or its link leads outside, or there is no such file.
    """
    path = directory / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{directory}: refers to the file {name!r}, which is outside the directory")
    try:
        target, root = path.resolve(strict=True), directory.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: missing or unreadable, though the checkpoint needs it") from error
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if target.parent not in roots:
        raise InputError(f"{path}: is a link to a file outside the directory; put the file itself there")
    if not target.is_file():
        raise InputError(f"{path}: is not a file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing, outside its directory, too large, not UTF-8, not JSON, or not an object.
    """
    inside(path.parent, path.name)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes is too large for this file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_yaml(path: Path) -> tuple[dict[str, Any], bytes]:
    """A YAML mapping from a file, and the file's bytes.

    Raises:
        InputError: missing, not a file, too large, not UTF-8, not YAML, not a mapping, or without end.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file")
        if path.stat().st_size > MAX_YAML_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes is too large for this file")
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({first_line(error)})") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a mapping of keys to values, this file is {type(value).__name__}")
    return value, data


def parse_yaml(text: str, where: str) -> Any:
    """One YAML value. Aliases count as often as they are used: they can multiply without bound, or hold themselves.

    Raises: InputError naming ``where``.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML ({first_line(error)})") from None
    waiting, count = [value], 0
    while waiting:
        count += 1
        if count > MAX_YAML_VALUES:
            raise InputError(f"{where}: more than {MAX_YAML_VALUES} values; are there aliases (&, *) that multiply?")
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()][: MAX_YAML_VALUES + 1]
        elif isinstance(one, list | tuple | set):
            waiting += list(one)[: MAX_YAML_VALUES + 1]
    return value


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few of ``names`` and how many more there are."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 200 else name[:200] + "…" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
