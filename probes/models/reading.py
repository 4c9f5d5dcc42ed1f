"""What a tokenizer reads where it normalises a text before it cuts it (NFC, NFKC, lower case ...), with the way back.

The library tells offsets of tokens, and only into the text as it was given; what is needed here is which characters of
the one text are which of the other. So the text is cut where the rules cannot join what stands on both sides, and each
piece is read alone: if the pieces read alone are the text read whole, the map holds; if not (a rule that looks further,
say one that takes spaces from the ends), there is none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from probes.foreign import foreign_code
from probes.records import Span

_HARMLESS = ("Prepend", "Replace")  # SentencePiece's marker for a space; its tokens are told with the space
_MAX_PIECE = 64  # a letter under more combining marks than this is an attack on the clock, not text


@dataclass(frozen=True)
class Reading:
    """A text as a tokenizer reads it.

    Attributes:
        text: what it reads.
        begins, ends: for each character of the text as given, where in ``text`` the piece that holds it begins and
            ends.
    """

    text: str
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def span(self, span: Span) -> Span:
        """Where characters ``[a, b)`` of the text as given are read, in whole pieces; empty if dropped."""
        a, b = span
        if a < b:
            return self.begins[a], self.ends[b - 1]
        place = self.begins[a] if a < len(self.begins) else len(self.text)
        return place, place


def rules_of(core: Any) -> list[Any]:
    """The normalising rules of a ``tokenizers.Tokenizer`` that change a text beyond its spaces, in their order."""
    with foreign_code("the tokenizer", "cannot tell its normalizer"):
        rule = getattr(core, "normalizer", None)
        if rule is None:
            return []
        rules = list(rule) if type(rule).__name__ == "Sequence" else [rule]
        flat = [
            inner for one in rules for inner in (rules_of(_Alone(one)) if type(one).__name__ == "Sequence" else [one])
        ]
    return [one for one in flat if type(one).__name__ not in _HARMLESS]


@dataclass(frozen=True)
class _Alone:
    normalizer: Any


def read(core: Any, text: str) -> Reading | None:
    """``text`` as the tokenizer reads it; None where its characters cannot be followed."""
    rules = rules_of(core)

    def normal(part: str) -> str:
        with foreign_code("the tokenizer", "cannot normalise a text"):
            for one in rules:
                part = one.normalize_str(part)
        return part

    whole, pieces, begins, ends = normal(text), [], [], []
    at = 0
    for a, b in _pieces(text, normal):
        piece = normal(text[a:b])
        pieces.append(piece)
        begins += [at] * (b - a)
        at += len(piece)
        ends += [at] * (b - a)
    return Reading(whole, tuple(begins), tuple(ends)) if "".join(pieces) == whole else None


def _pieces(text: str, normal: Callable[[str], str]) -> Iterator[Span]:
    """Cuts ``text`` where no rule joins what stands before and after."""
    start = 0
    for at in range(1, len(text)):
        char, head = text[at], text[start:at]
        plain = ord(char) < 0x300 or 0x3400 <= ord(char) <= 0x9FFF  # these join nothing that stands before them
        marks = not plain and unicodedata.combining(unicodedata.normalize("NFKD", char)[0])
        joins = marks or (not plain and normal(head + char) != normal(head) + normal(char))
        if joins and len(head) < _MAX_PIECE:
            continue
        yield start, at
        start = at
    if text:
        yield start, len(text)
