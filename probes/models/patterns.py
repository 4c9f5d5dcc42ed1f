"""Which regular expressions of strangers may run, and how: none that can take longer than its text allows.

PEFT matches module names with expressions from ``adapter_config.json``. Those run in RE2, whose time is linear in the
name. A tokenizer's expressions run inside the ``tokenizers`` library on a backtracking engine and need what RE2 does
not know (look-ahead), so their form is judged instead: nothing that varies in length may be repeated as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from probes.errors import ProbeInputError
from probes.foreign import first_line, plain

MAX_PATTERN = 10_000  # characters
_MAX_STARS = 4  # unbounded repeats in one alternative: the time is that power of the text in the worst case
_MANY = 20  # {1,21} counts as unbounded
_QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}")


def linear(pattern: str, where: object) -> Any:
    """The pattern compiled by RE2, to be used with ``fullmatch``.

    Raises:
        ProbeInputError: no regular expression, or one that RE2 can not bound (look-around, back-references).
    """
    import re2

    if len(pattern) > MAX_PATTERN:
        raise ProbeInputError(f"{where}: a pattern of {len(pattern)} characters")
    try:
        re.compile(pattern)  # PEFT's engine must understand the same
    except (re.error, OverflowError, RecursionError) as error:
        raise ProbeInputError(
            f"{where}: {plain(repr(pattern), 80)} is no regular expression ({first_line(error)})"
        ) from error
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ProbeInputError(
            f"{where}: {plain(repr(pattern), 80)} can not be matched in bounded time ({first_line(error)}); "
            "list the module names instead"
        ) from error


@dataclass
class _Group:
    """A group while it is read: unbounded repeats in this alternative and in its worst; whether its length varies."""

    stars: int = 0
    worst: int = 0
    varies: bool = False


def backtracks(pattern: str) -> str | None:
    """Why a backtracking engine could take for ever on this pattern; None when its time is bounded by a low power.

    Read without compiling: escapes, classes (which may nest), groups, alternatives, quantifiers.
    """
    if len(pattern) > MAX_PATTERN:
        return f"it has {len(pattern)} characters"
    groups, at, last = [_Group()], 0, None  # last: the group just closed, or None after a single character
    while at < len(pattern):
        char, repeat = pattern[at], None
        if char == "\\":
            if pattern[at + 1 : at + 2] in set("123456789kg"):
                return "it refers back to a group"
            at, last = at + 2, None
            if pattern[at - 1 : at] in ("p", "P", "x") and pattern[at : at + 1] == "{":
                at = (pattern.find("}", at) + 1) or len(pattern)
            continue
        if char == "[":
            at, last = _class_end(pattern, at), None
            continue
        if char == "(":
            groups.append(_Group())
            at, last = at + 1, None
            if pattern[at : at + 1] == "?":  # (?: (?i: (?= (?! (?<= (?<! (?> (?<name>: none of it is a quantifier
                at += 1
                while at < len(pattern) and pattern[at] in "imxsa-<":
                    at += 1
                at += pattern[at : at + 1] in tuple(":=!>")
            continue
        if char == ")":
            if len(groups) == 1:
                return "its brackets do not match"
            last = groups.pop()
            last.worst = max(last.worst, last.stars)
            groups[-1].stars += last.worst
            groups[-1].varies |= last.varies
            at += 1
            continue
        if char == "|":
            groups[-1].worst, groups[-1].stars = max(groups[-1].worst, groups[-1].stars), 0
            groups[-1].varies = True
            at, last = at + 1, None
            continue
        if char in "*+?":
            repeat, at = (0 if char == "?" else _MANY + 1), at + 1
        elif char == "{" and (found := _QUANTIFIER.match(pattern, at)):
            low, comma, high = found.groups()
            most = int(high[:9]) if high else (_MANY + 1 if comma else 0)
            repeat = most if comma else -1
            if last is not None and last.varies and (int(low[:9] or 0) > 1 or most > 1):
                return "it repeats a group whose length varies"
            at = found.end()
        else:
            at, last = at + 1, None
            continue
        if repeat >= 0:
            groups[-1].varies = True
        if repeat > _MANY:
            if last is not None and last.varies:
                return "it repeats a group whose length varies"
            groups[-1].stars += 1
            if groups[-1].stars > _MAX_STARS:
                return f"more than {_MAX_STARS} unbounded repeats follow each other"
        if pattern[at : at + 1] in ("?", "+"):  # lazy, possessive
            at += 1
            if pattern[at : at + 1] in tuple("*+"):
                return "it repeats a repeat"
        elif pattern[at : at + 1] == "*":
            return "it repeats a repeat"
        last = None
    return None if len(groups) == 1 else "its brackets do not match"


def _class_end(pattern: str, at: int) -> int:
    """The place after the bracket class that begins at ``at``."""
    depth, begin = 0, True
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at, begin = at + 2, False
            continue
        if char == "[":
            depth, begin = depth + 1, True
        elif char == "]" and not begin:
            depth -= 1
            if depth == 0:
                return at + 1
        elif char != "^":
            begin = False
        if char == "]":
            begin = False
        at += 1
    return at


def patterns_in(value: Any) -> Iterable[str]:
    """Every ``{"Regex": pattern}`` in a tokenizer.json, wherever it stands."""
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("Regex"), str):
                yield node["Regex"]
            stack += node.values()
        elif isinstance(node, list):
            stack += node
