"""Half a UTF-16 surrogate pair in a JSON text, as scrapers leave it that cut posts at UTF-16 units.

JSON can write such a half (``\\ud83d``), UTF-8 and every tokenizer cannot, so it is refused where it is read, with
file, row and field, or replaced by U+FFFD inside ``replacing_surrogates``.
"""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from mentalglm_jax.errors import InputError

REPLACEMENT = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_replaced: ContextVar[bool] = ContextVar("replace_surrogates", default=False)


@contextlib.contextmanager
def replacing_surrogates(replace: bool = True) -> Iterator[None]:
    """Texts that are read inside have U+FFFD where half a pair stood, as many characters as before."""
    token = _replaced.set(replace)
    try:
        yield
    finally:
        _replaced.reset(token)


def half_pair(text: str) -> int | None:
    """The place of the first half of a pair, or None."""
    found = _HALF.search(text)
    return found.start() if found else None


def whole_texts(value: Any, raw: str, where: str) -> Any:
    """The JSON ``value`` that was written as ``raw``, without halves of pairs.

    Raises:
        InputError: it has one, and this is not inside ``replacing_surrogates``; ``where`` and the field are named.
    """
    return _whole(value, where, "") if _ESCAPE.search(raw) else value


def _whole(value: Any, where: str, field: str) -> Any:
    if isinstance(value, str):
        place = half_pair(value)
        if place is None:
            return value
        if _replaced.get():
            return _HALF.sub(REPLACEMENT, value)
        raise InputError(
            f"{where}, field {field!r}: character {place + 1} is half of a UTF-16 surrogate pair (cut there); "
            "mend it, or have U+FFFD in its place: --replace-surrogates, in a recipe data.replace_surrogates: true"
        )
    if isinstance(value, list):
        return [_whole(one, where, f"{field}[{number}]") for number, one in enumerate(value)]
    if isinstance(value, dict):
        return {_whole(key, where, "a name"): _whole(one, where, f"{field}.{key}".lstrip("."))
                for key, one in value.items()}  # fmt: skip
    return value
