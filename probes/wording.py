"""A label in other words than its candidate's, and the other candidates in the same words.

A model may state its label as "High." or **高** where its candidate is a whole sentence. Against the other candidates
as they stand, its score would be of the wording and not of the label: a whole sentence is unlikely where the model
writes one word. What it wrote is compared with the same text that has the other label in its place: "Low.", **低**.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import takewhile

_MARKS = "*_`"  # Markdown's, which may stand anywhere


def reworded(written: str, own: str, others: Sequence[str]) -> tuple[str, ...] | None:
    """``written`` with the name of each other candidate in place of its own.

    The name is what is left of a candidate's sentence without the words that all of them begin and end with. Case,
    width, white space, Markdown's marks and punctuation do not count.

    Args:
        written: the label as the model wrote it. own: its candidate's sentence. others: those of other candidates.
    Returns:
        one text for each of ``others``; None where ``written`` is not its candidate's name with no more around it than
        ends of what stands around it in the sentence.
    """
    sentences = [_Folded(text) for text in (own, *others)]
    if not others or not all(one.text for one in sentences):
        return None
    head, tail = _frame([one.text for one in sentences])
    spans = [_trimmed(one.text, head, len(one.text) - tail) for one in sentences]
    names = [one.text[a:b] for one, (a, b) in zip(sentences, spans, strict=True)]
    if not all(names):
        return None
    said, name = _Folded(written), names[0]
    (a, b), first = spans[0], sentences[0].text
    places = [at for at in range(len(said.text)) if said.text.startswith(name, at)]
    places = [at for at in places if not (_joined(said.text, at) or _joined(said.text, at + len(name)))]
    if len(places) != 1:
        return None
    at, end = places[0], places[0] + len(name)
    around = _letters(said.text[:at]), _letters(said.text[end:])
    if not (_letters(first[:a]).endswith(around[0]) and _letters(first[b:]).startswith(around[1])):
        return None
    low, high = said.span(at, end)
    spelled = sentences[0].original(a, b)
    return tuple(
        written[:low] + _dressed(one.original(*span), written[low:high], spelled) + written[high:]
        for one, span in zip(sentences[1:], spans[1:], strict=True)
    )


class _Folded:
    """A text without what does not count, and where each of its characters stands in the original."""

    def __init__(self, text: str) -> None:
        self._source = text
        kept: list[tuple[str, int]] = []
        for at, char in enumerate(text):
            for one in unicodedata.normalize("NFKC", char).casefold() if char not in _MARKS else "":
                if not one.isspace():
                    kept.append((one, at))
                elif kept and kept[-1][0] != " ":
                    kept.append((" ", at))
        self.text = "".join(char for char, _ in kept)
        self._places = [at for _, at in kept]

    def span(self, a: int, b: int) -> tuple[int, int]:
        return self._places[a], self._places[b - 1] + 1

    def original(self, a: int, b: int) -> str:
        low, high = self.span(a, b)
        return self._source[low:high]


def _frame(texts: Sequence[str]) -> tuple[int, int]:
    """How many characters all texts begin and end with, in whole words, so that something is left of each."""
    head = _longest(texts)
    return (0, 0) if head is None else (head, _longest([text[head:][::-1] for text in texts]) or 0)


def _longest(texts: Sequence[str]) -> int | None:
    """The longest of ``_shared`` behind which each text still has a letter; None where one has none at all."""
    last = [max((at for at, char in enumerate(text) if _letters(char)), default=-1) for text in texts]
    return next((cut for cut in _shared(texts) if cut <= min(last)), None)


def _shared(texts: Sequence[str]) -> list[int]:
    """Lengths of what all texts begin with, the longest first, each cut between words."""
    same = takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return [cut for cut in range(sum(1 for _ in same), -1, -1) if not any(_joined(text, cut) for text in texts)]


def _joined(text: str, at: int) -> bool:
    """Whether a cut here would lie inside a word; only where words are written apart."""
    return 0 < at < len(text) and all(
        char.isalnum() and unicodedata.east_asian_width(char) not in "WF" for char in text[at - 1 : at + 1]
    )


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The stretch without spaces and punctuation at its end, and spaces at its beginning; signs in front may be all
    that tells two labels apart."""
    while start < end and text[start] == " ":
        start += 1
    while end > start and (text[end - 1] == " " or unicodedata.category(text[end - 1]) == "Po"):
        end -= 1
    return start, end


def _letters(text: str) -> str:
    return "".join(char for char in text if char != " " and not unicodedata.category(char).startswith("P"))


def _dressed(name: str, written: str, spelled: str) -> str:
    """Another candidate's name in the case that ``written`` has and ``spelled`` has not."""
    if written == spelled:
        return name
    if written.isupper() and not spelled.isupper():
        return name.upper()
    if written.islower() and not spelled.islower():
        return name.lower()
    return name[:1].upper() + name[1:] if written[:1].isupper() and not spelled[:1].isupper() else name
