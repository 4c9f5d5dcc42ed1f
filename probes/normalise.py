"""A normalised copy of a text with index maps both ways, so that a match in the copy is a span of the original."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from probes.model import Span

_MAX_CLUSTER = 64  # a letter under more combining marks than this is an attack on the clock, not text


def is_cjk(char: str) -> bool:
    """True for scripts written without spaces whose single characters carry meaning (Han and kana)."""
    code = ord(char)
    return (
        0x2E80 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0xFF66 <= code <= 0xFF9D or 0x20000 <= code <= 0x3FFFF
    )


@dataclass(frozen=True, eq=False)
class Normalised:
    """A normalised copy of ``source``.

    Attributes:
        text: the normalised string.
        start, end: int arrays [len(text)]: the source span each normalised character came from.
        index: int array [len(source) + 1]: number of normalised characters that come from before a source position.
    """

    source: str
    text: str
    start: np.ndarray
    end: np.ndarray
    index: np.ndarray

    def to_source(self, a: int, b: int) -> Span:
        """The source span that holds normalised characters ``[a, b)``; a and b within the text, a < b."""
        return int(self.start[a]), int(self.end[b - 1])

    def from_source(self, a: int, b: int) -> Span:
        """The normalised span of the characters that come from source ``[a, b)``; empty when all were dropped."""
        return int(self.index[a]), int(self.index[b])

    def splits(self, i: int) -> bool:
        """True when a cut before normalised character ``i`` falls inside one source cluster (ß -> ss)."""
        return 0 < i < len(self.text) and bool(self.start[i] == self.start[i - 1])


def _dropped(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "PZC" or category == "Sk" or char in "~∼" or 0xFE00 <= ord(char) <= 0xFE0F


def _clusters(text: str) -> Iterable[Span]:
    """Cuts ``text`` where NFKC never merges across the cut, so that normalising the pieces normalises the whole."""
    start = 0
    for position in range(1, len(text)):
        char = text[position]
        if not (ord(char) < 0x300 or 0x3400 <= ord(char) <= 0x9FFF):  # these never join what stands before them
            head = text[start:position]
            joined = unicodedata.normalize("NFKC", head + char)
            apart = unicodedata.normalize("NFKC", head) + unicodedata.normalize("NFKC", char)
            if (unicodedata.combining(char) or joined != apart) and len(head) < _MAX_CLUSTER:
                continue
        yield start, position
        start = position
    if text:
        yield start, len(text)


def normalise(text: str) -> Normalised:
    """NFKC, casefold, punctuation / separators / controls / variation selectors dropped, with index maps both ways.

    Any Python string is accepted, lone surrogates included. Symbols (emoji, ``%``) are kept.
    """
    pieces: list[str] = []
    start: list[int] = []
    end: list[int] = []
    index = np.zeros(len(text) + 1, dtype=np.int64)
    for a, b in _clusters(text):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[a:b]).casefold())
        kept = "".join(char for char in folded if not _dropped(char))
        index[a + 1 : b] = len(start)  # a position inside a cluster counts only what comes before the cluster
        pieces.append(kept)
        start.extend([a] * len(kept))
        end.extend([b] * len(kept))
        index[b] = len(start)
    return Normalised(text, "".join(pieces), np.array(start, np.int64), np.array(end, np.int64), index)


def is_letter(char: str) -> bool:
    """A letter or digit of a script whose words are delimited by spaces."""
    return char.isalnum() and not is_cjk(char)


def cuts_word(text: str, position: int) -> bool:
    """True when ``position`` lies inside a space-delimited word of ``text``, apostrophes between letters included."""
    if not 0 < position < len(text):
        return False
    before, after = text[position - 1], text[position]
    if is_letter(before) and is_letter(after):
        return True
    if after in "'’" and position + 1 < len(text):
        return is_letter(before) and is_letter(text[position + 1])
    if before in "'’" and position > 1:
        return is_letter(text[position - 2]) and is_letter(after)
    return False
