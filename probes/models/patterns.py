"""Which regular expressions of strangers may run, and how: none that can take longer than its text allows.

PEFT matches module names with expressions from ``adapter_config.json``. Those run in RE2, whose time is linear in the
name. A tokenizer's expressions run inside the ``tokenizers`` library on a backtracking engine and need what RE2 does
not know (look-ahead), so their form is judged instead (``backtracks``), and a long text that takes too long all the
same is given up (``tokenizer.text_ids``).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from probes.errors import ProbeInputError
from probes.foreign import first_line, plain

MAX_PATTERN = 10_000  # characters
MAX_PATTERNS = 50  # in one tokenizer.json
_MAX_CHOICES = 1000  # ways to match at one place; a twentieth of it beside an unbounded repeat
_MAX_DEPTH = 50
_MANY = 20  # {1,22} counts as unbounded
_QUANTIFIER = re.compile(r"\{(?=[\d,]*\d)(\d*)(,?)(\d*)\}")
_OPENING = re.compile(r"\?[ims]*(?:-[ims]+)?:|\?[=!>]|\?<[=!]|\?<[A-Za-z_]\w*>|(?!\?)")


def linear(pattern: str, where: object) -> Any:
    """The pattern compiled by RE2, to be used with ``fullmatch``. It means in RE2 what it means to PEFT's engine.

    Raises:
        ProbeInputError: no regular expression, or one that RE2 cannot bound (look-around, back-references) or reads
            otherwise.
    """
    import re2

    if len(pattern) > MAX_PATTERN:
        raise ProbeInputError(f"{where}: a pattern of {len(pattern)} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # [[:lower:]] is a class to RE2, and seven characters and a bracket to PEFT
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ProbeInputError(
            f"{where}: {plain(repr(pattern), 80)} is no regular expression ({first_line(error)})"
        ) from error
    options = re2.Options()
    options.log_errors = False
    try:
        if "{," in pattern:  # up to n to PEFT, a text to RE2
            raise re2.error("write {0,n} for {,n}")
        if not pattern.isascii() and re.search(r"\(\?[a-zA-Z-]*i", pattern):  # PEFT's engine takes ı for an i
            raise re2.error("write letters beyond ASCII without (?i")
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ProbeInputError(
            f"{where}: {plain(repr(pattern), 80)} cannot be matched in bounded time ({first_line(error)}); "
            "list the module names instead"
        ) from error


def ending(key: str, where: object) -> Any:
    """A key of ``rank_pattern`` or ``alpha_pattern``, which PEFT puts into an expression for the end of a name. It must
    be one by itself: ``a)|(b`` would make two of it, and the first need not reach the end.

    Raises:
        ProbeInputError: as ``linear``.
    """
    linear(key, where)
    return linear(rf"(.*\.)?({key})", where)


@dataclass
class _Part:
    """A character or a class; or a group or a look at what is near, with its alternatives; and how often it may stand.

    Attributes:
        ways: the alternatives of a group. None: not a group.
        looks: it takes no character (``\\b``, ``^``, look-ahead), so that what it reads is read again.
    """

    ways: list[list[_Part]] | None = None
    looks: bool = False
    low: int = 1
    high: float = 1

    def varies(self) -> bool:
        """Whether it may be matched by texts of different lengths, or in more than one way."""
        inside = self.ways or []
        return self.low != self.high or len(inside) > 1 or any(part.varies() for way in inside for part in way)

    def fails(self) -> bool:
        """Whether it can send the engine back to what stands before it."""
        if self.ways is None or self.looks:
            return self.low > 0
        return self.low > 0 and all(any(part.fails() for part in way) for way in self.ways)

    def cost(self, after: bool) -> tuple[int, float]:
        """Unbounded repeats that may be gone back into, and the number of other choices; see ``backtracks``.

        Args:
            after: whether something that follows can fail.
        """
        repeats, choices = 0, 1.0
        if self.ways is not None:
            found = [_cost(way, after or self.looks) for way in self.ways]
            repeats, choices = max(one for one, _ in found), sum(other for _, other in found)
            if (self.low, self.high) not in ((1, 1), (0, 1)) and any(p.varies() for way in self.ways for p in way):
                raise _Refused("it repeats a group whose length varies")
            if len(self.ways) > 1 and self.high > 1:
                raise _Refused("it repeats a group whose length varies")
        if self.low > _MANY or (after and self.high - self.low > _MANY):
            repeats += 1
        elif after:
            choices += choices * (self.high - self.low) if self.high - self.low <= _MANY else 0
        return repeats, choices


class _Refused(Exception):
    pass


def _cost(way: list[_Part], after: bool) -> tuple[int, float]:
    """``_Part.cost`` of parts that follow each other: from the last, as only what can fail sends the engine back."""
    repeats, choices = 0, 1.0
    for part in reversed(way):
        more, times = part.cost(after)
        repeats, choices = repeats + more, choices * times
        after = after or part.fails()
    return repeats, choices


def backtracks(pattern: str) -> str | None:
    """Why a backtracking engine could take more than quadratic time on this pattern; None where it cannot.

    From one place of a text the engine tries all ways to match. Those are multiplied by every repeat that something
    that can fail stands behind: ``[a-z]+!`` gives back its letters one by one. One such repeat makes a place cost the
    length of the text, so the text its square; two make it a cube. All published tokenizers have at most one
    (``\\s*[\\r\\n]+``, ``\\s+(?!\\S)``) in an alternative. Whether two repeats take the same characters is not looked
    at. What does not vary may be repeated as a group, other choices (``a?``, ``(a|b)``) are counted.
    """
    if len(pattern) > MAX_PATTERN:
        return f"it has {len(pattern)} characters"
    try:
        for way in _parsed(pattern):
            repeats, choices = _cost(way, after=False)
            if repeats > 1:
                return f"{repeats} unbounded repeats follow each other and may all be tried again"
            if choices > _MAX_CHOICES / (20 if repeats else 1):
                return f"it can be matched in {choices:.3g} ways at each place"
    except _Refused as refused:
        return str(refused)
    return None


def _parsed(pattern: str) -> list[list[_Part]]:
    """The alternatives of a pattern, read without compiling: escapes, classes (which may nest), groups, quantifiers."""
    groups, at = [_Part([[]])], 0
    while at < len(pattern):
        char = pattern[at]
        ways = groups[-1].ways
        assert ways is not None
        if char == "(":
            looks, at = _opened(pattern, at + 1)
            groups.append(_Part([[]], looks))
            if len(groups) > _MAX_DEPTH:
                raise _Refused(f"its groups are more than {_MAX_DEPTH} deep")
            continue
        if char == "|":
            ways.append([])
            at += 1
            continue
        if char == ")":
            if len(groups) == 1:
                raise _Refused("its brackets do not match")
            part, at = groups.pop(), at + 1
            assert groups[-1].ways is not None
            ways = groups[-1].ways
        elif char == "\\":
            part, at = _escaped(pattern, at + 1)
        elif char == "[":
            part, at = _Part(), _class_end(pattern, at)
        elif char in "*+?" or (char == "{" and _QUANTIFIER.match(pattern, at)):
            raise _Refused("it repeats a repeat, or nothing")
        else:
            part, at = _Part(looks=char in "^$"), at + 1
        part.low, part.high, at = _repeated(pattern, at)
        ways[-1].append(part)
    if len(groups) > 1:
        raise _Refused("its brackets do not match")
    assert groups[0].ways is not None
    return groups[0].ways


def _opened(pattern: str, at: int) -> tuple[bool, int]:
    """Whether the group whose bracket stands before ``at`` looks only, and where its content begins."""
    found = _OPENING.match(pattern, at)
    if found is None:
        raise _Refused(f"a group begins with {plain(pattern[at : at + 4], 20)!r}")
    return found[0] in ("?=", "?!", "?<=", "?<!"), found.end()


def _escaped(pattern: str, at: int) -> tuple[_Part, int]:
    """What a backslash before ``at`` means."""
    char = pattern[at : at + 1]
    if char == "" or char in "123456789kgKRXGO":  # references, calls, what is kept, clusters of characters
        raise _Refused("it refers back to a group" if char in "123456789kg" and char else f"it holds \\{char}")
    if char in "pPx" and pattern[at + 1 : at + 2] == "{":
        end = pattern.find("}", at)
        if end < 0:
            raise _Refused("its brackets do not match")
        return _Part(), end + 1
    return _Part(looks=char in "bBAzZ"), at + 1


def _repeated(pattern: str, at: int) -> tuple[int, float, int]:
    """Lowest and highest number of times by the quantifier at ``at``, and the place after it."""
    char, (low, high) = pattern[at : at + 1], (1, 1.0)
    if char and char in "*+?":
        low, high, at = int(char == "+"), 1.0 if char == "?" else math.inf, at + 1
        at += pattern[at : at + 1] in ("?", "+")  # lazy, possessive
    elif (found := _QUANTIFIER.match(pattern, at)) is not None:
        least, comma, most = found.groups()
        low = int(least[:9] or 0)
        high = float(most[:9]) if most else math.inf if comma else float(low)
        at = found.end() + (pattern[found.end() : found.end() + 1] == "?")
        if low > high:
            raise _Refused("it repeats something more often than at most")
    return low, high, at


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
    raise _Refused("its brackets do not match")


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
