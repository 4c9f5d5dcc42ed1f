"""Reading what strangers wrote: the one strict reader of bytes, JSON, YAML and patterns that come from outside.

Nothing outside a directory is opened, nothing that is not a file is waited for, nothing grows without bound, and every
refusal is one line that names the file and, where there is one, the key. Numbers are finite and within 64 bits, text
can be written as UTF-8, keys stand once.
"""

import functools
import json
import math
import os
import re
import reprlib
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import re2
import yaml

from mentalglm_jax.errors import InputError

# What a directory that somebody else made may hold, in numbers and names; `probes` has the same file.
DIRECTORY: dict[str, Any] = json.loads((Path(__file__).parent / "directory.json").read_text("utf-8"))
MAX_JSON_BYTES = 16 << 20  # of a file that is not in that list
MAX_DEPTH: int = DIRECTORY["levels"]
MAX_INTEGER = 2**63 - 1
NO_LIMIT = str(int(1e30))  # what transformers writes for the model_max_length of a tokenizer without one
MAX_YAML_BYTES = 256 << 10
MAX_YAML_NODES = 100_000  # aliases followed
MAX_PATTERN = 20_000  # characters
FLOAT32_MAX = 3.4028234663852886e38
_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")
_NEEDED: Any = object()


def inside(directory: Path, name: str) -> Path:
    """The file ``name`` directly in ``directory``; links may lead to the Hub cache's own blobs, nowhere else.

    Raises:
        InputError: the name or its link leads outside, or there is no such file.
    """
    path = directory / name
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name or len(name) > 255:
        raise InputError(f"{directory}: refers to the file {short(name)}, which is outside the directory")
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


def at_home(path: str | Path) -> Path:
    """``path`` with ``~`` at its beginning as the home directory; ``~name`` of a user that is not known stays."""
    return Path(os.path.expanduser(path))


def there(path: Path) -> bool:
    """Whether a directory has this name: also of a link that leads nowhere, which is refused when it is read, not
    taken for a file that is optional and absent."""
    return os.path.lexists(path)


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading; a FIFO or a device is refused at once and never waited for.

    Raises:
        InputError: not a file.
        OSError: the system refused; callers say what the file is and how to get it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{str(path)!r}: is not a name that a file can have") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise no_file(path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def no_file(path: Path) -> InputError:
    """The refusal of what has a file's place and is none."""
    return InputError(
        f"{path}: cannot be read, it is not a file but a directory, a pipe or a device; what comes through a pipe, as "
        "<(command) does, has to be saved to a file first: files are read more than once"
    )


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """All of a file of at most ``most`` bytes; None is what its name allows (``DIRECTORY``).

    Raises: InputError, OSError as ``open_file``.
    """
    allowed: int = DIRECTORY["bytes"].get(path.name, MAX_JSON_BYTES) if most is None else most
    with open_file(path) as file:
        data = file.read(allowed + 1)
    if len(data) > allowed:
        raise InputError(f"{path}: more than {allowed} bytes are too large for this file")
    return data


def read_text(path: Path, most: int | None = None) -> str:
    """UTF-8 text, ``most`` as in ``read_bytes``.

    Raises: InputError, OSError as ``open_file``; InputError where it is not UTF-8.
    """
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: cannot be read as UTF-8 text (byte {error.start}); save it anew") from None


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """A JSON object from a file in a directory that somebody made; its name says how large it may be.

    Args:
        hint: what to do where it is missing or wrong.

    Raises:
        InputError: missing, outside its directory, not a file, too large, not UTF-8, not JSON, or not an object.
    """
    inside(path.parent, path.name)
    try:
        digits = DIRECTORY["integer_digits"].get(path.name)
        value = parse_json(read_text(path), str(path), hint, digits=digits)
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror}){hint and '; ' + hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, found {type(value).__name__}{hint and '; ' + hint}")
    return value


def parse_json(
    text: str | bytes, where: str, hint: str = "", half_pairs: bool = False, digits: int | None = None
) -> Any:
    """The value of a JSON text, with what Python's reader lets through refused: NaN and infinity, also as ``1e999``;
    integers beyond 64 bits (but for ``NO_LIMIT``); a key that stands twice; half of a surrogate pair; more than
    ``MAX_DEPTH`` levels.

    Args:
        where: file, or file and line, for the message.
        hint: what to do about it.
        half_pairs: let half of a surrogate pair pass: the caller looks for it (``data.surrogates``).
        digits: integers may have so many, also beyond 64 bits (transformers writes 10^30 for "no limit").

    Raises:
        InputError: any of these.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")  # UnicodeDecodeError is a ValueError
        decoder = _DECODER if digits is None else _decoder(digits)
        value, end = decoder.raw_decode(text, _BLANK.match(text).end())  # type: ignore[union-attr]
        end = _BLANK.match(text, end).end()  # type: ignore[union-attr]
        if end != len(text):
            raise json.JSONDecodeError("more text after the value", text, end)
        check_json(value, text, half_pairs)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg}, line {error.lineno}, column {error.colno}){hint and '; ' + hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        what = f"more than {MAX_DEPTH} levels" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{where}: not JSON ({what}){hint and '; ' + hint}") from None
    return value


def check_json(value: Any, text: str, half_pairs: bool = False) -> None:
    """The part of ``parse_json`` that needs the whole value; ``text`` is what it was read from.

    Raises:
        ValueError: half of a surrogate pair, or too many levels.
    """
    level, depth = [value], 0
    broken = not half_pairs and _SURROGATE.search(text) is not None
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        if broken:
            names = (key for node in level if isinstance(node, dict) for key in node)
            for one in (*names, *level):
                if isinstance(one, str) and any("\ud800" <= character <= "\udfff" for character in one):
                    raise ValueError("half of a surrogate pair, which is no text")
        kinds = dict | list | str if broken else dict | list
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, kinds)
        ]
        depth += 1


def _integer(text: str) -> int:
    if text == NO_LIMIT:
        return int(text)
    if len(text) > 20 or abs(value := int(text)) > MAX_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits, beyond 64 bits")
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is infinite")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {short(twice)} stands more than once")
    return value


def _decoder(digits: int | None) -> json.JSONDecoder:
    def integer(text: str) -> int:
        if digits is None or len(text) > digits:
            return _integer(text)
        return int(text)

    return json.JSONDecoder(object_pairs_hook=_once, parse_int=integer, parse_float=_number, parse_constant=_constant)


_DECODER = _decoder(None)
_BRACKETS = re.compile(r"[\[\]{}]")
_BLANK = re.compile(r"[ \t\r\n]*")
raw_decode = _DECODER.raw_decode  # for files that are read piece by piece; ``check_json`` follows


class Fields:
    """Typed access to a mapping that came from outside; null counts as absent.

    Args:
        raw: the mapping.
        where: its file, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self._where = raw, where

    def integer(self, key: str, low: int, high: int, default: Any = _NEEDED) -> Any:
        """An integer in [low, high]; ``default`` where the key is absent. Raises: InputError, as do all."""
        value = self._get(key, default)
        if value is not default and not (type(value) is int and low <= value <= high):
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX, default: Any = _NEEDED) -> Any:
        """A number in [low, high], as a float; by default what float32 holds."""
        value = self._get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise self.wrong(key, "a finite number" if low == -FLOAT32_MAX else f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = _NEEDED) -> Any:
        """true or false."""
        value = self._get(key, default)
        if value is not default and type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: Any = _NEEDED, most: int = 1 << 20) -> Any:
        """Text of at most ``most`` characters."""
        value = self._get(key, default)
        if value is not default and not (isinstance(value, str) and len(value) <= most):
            raise self.wrong(key, f"text of at most {most} characters")
        return value

    def texts(self, key: str, default: Any = _NEEDED, most: int = 10_000) -> Any:
        """A list of at most ``most`` texts."""
        value = self._get(key, default)
        if value is not default and not (
            isinstance(value, list) and len(value) <= most and all(isinstance(one, str) for one in value)
        ):
            raise self.wrong(key, f"a list of at most {most} texts")
        return value

    def mapping(self, key: str, default: Any = _NEEDED, most: int = 1_000_000) -> Any:
        """An object of at most ``most`` keys."""
        value = self._get(key, default)
        if value is not default and not (isinstance(value, Mapping) and len(value) <= most):
            raise self.wrong(key, f"an object of at most {most} keys")
        return value

    def integers(self, key: str, low: int, high: int, default: Any = _NEEDED, most: int = 10_000) -> Any:
        """One integer in [low, high] or a list of them, as a tuple."""
        value = self._get(key, default)
        if value is default:
            return value
        listed = [value] if type(value) is int else value
        if not (
            isinstance(listed, list | tuple)
            and len(listed) <= most
            and all(type(one) is int and low <= one <= high for one in listed)
        ):
            raise self.wrong(key, f"integers from {low} to {high}")
        return tuple(listed)

    def wrong(self, key: str, wanted: str) -> InputError:
        """The refusal of what stands at ``key``."""
        return InputError(f"{self._where}: {key} must be {wanted}, got {short(self.raw.get(key))}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is _NEEDED:
            raise InputError(f"{self._where}: {key} is missing")
        return default


class _Loader(yaml.SafeLoader):
    """YAML whose keys stand once and whose aliases, followed, stay small."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        seen: set[str] = set()
        for key in found:
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {short(key)} stands more than once", node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_bounded(self, node: Any) -> int:
        """An integer of at most 64 bits."""
        if len(node.value) > 100 or abs(value := super().construct_yaml_int(node)) > MAX_INTEGER:
            raise ValueError(f"an integer of {len(node.value)} digits, beyond 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_bounded)


def read_yaml(path: Path) -> tuple[dict[str, Any], bytes]:
    """A YAML mapping from a file, and the file's bytes.

    Raises:
        InputError: missing, not a file, too large, not UTF-8, or as ``parse_yaml``.
    """
    try:
        data = read_bytes(path, MAX_YAML_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror or error})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text (byte {error.start})") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a mapping of keys to values, this file is {type(value).__name__}")
    return value, data


def parse_yaml(text: str, where: str, what: str = "not valid YAML") -> Any:
    """The value of a short YAML text: a recipe, or what ``--set`` sets one of its keys to.

    Raises:
        InputError: ``what``; or too long, nested more than ``MAX_DEPTH`` deep, a key that stands twice, half of a
            surrogate pair, or aliases that multiply it beyond ``MAX_YAML_NODES``.
    """
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{where}: {len(text)} characters are too many for a recipe")
    loader = None
    try:
        depth = 0  # brackets, also of text: the library takes seconds to find out that there are too many
        for bracket in _BRACKETS.findall(text):
            depth += 1 if bracket in "[{" else -1
            if depth > 3 * MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}, ()) > MAX_YAML_NODES:
            raise ValueError(f"its aliases make more than {MAX_YAML_NODES} values of it")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{where}{line}: {what} ({problem})") from None
    except RecursionError:
        raise InputError(f"{where}: {what} (more than {MAX_DEPTH} levels)") from None
    except (ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        raise InputError(f"{where}: {what} ({first_line(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _expanded(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a YAML node is once every alias is followed."""
    if id(node) in above:
        raise ValueError("an alias that holds itself")
    if len(above) > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels")
    if id(node) not in known:
        if isinstance(node, yaml.ScalarNode):
            node.value = _whole(node.value)
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[id(node)] = 1 + sum(_expanded(child, known, (*above, id(node))) for child in children)
    return known[id(node)]


def _whole(text: str) -> str:
    """A YAML text with pairs of surrogates, which JSON's escapes write, as their characters."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None


@functools.lru_cache(maxsize=20_000)
def pattern(expression: str) -> Any:
    """A regular expression from outside for module names, with ``fullmatch`` in time linear in the name.

    It must mean in RE2, which matches it, what it means in Python's ``re``, as PEFT reads it.

    Raises:
        InputError: not a regular expression, too long, or with look-around, back references and the like, for which
            there is no bounded matching.
    """
    shown = short(expression)
    if len(expression) > MAX_PATTERN:
        raise InputError(f"{shown} is too long for a regular expression ({len(expression)} characters)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(expression)
    except (re.error, OverflowError, RecursionError, Warning, ValueError) as error:
        raise InputError(f"{shown} is not a regular expression ({first_line(error)})") from None
    options = re2.Options()
    options.log_errors = False
    options.never_nl = False
    try:
        if "{," in expression:  # up to n for Python, literal for RE2
            raise re2.error("write {0,n} for {,n}")
        if not expression.isascii() and re.search(r"\(\?[a-zA-Z-]*i", expression):  # ı is an i to Python alone
            raise re2.error("write letters beyond ASCII without (?i")
        return re2.compile(expression, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise InputError(
            f"the regular expression {shown} is not one that is matched in bounded time ({reason[:120]}); "
            "write it without look-around and back references, or list the names"
        ) from None


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few of ``names`` and how many more there are."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 200 else name[:200] + "…" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 6
_SHORT.maxlevel = 3


def short(value: Any) -> str:
    """``repr`` of a value from outside, cut: a message is a line."""
    return _SHORT.repr(value)
