"""Edits of a chain of reasoning by rule: other words cited, denials, other wordings. English and Chinese.

The rules are of letters; none understands a sentence. What is cited is where ``probes.citations.align`` finds the post.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from probes.citations.align import align
from probes.records import Example, Span

_MARKS = "\"'“‘「『《"
_DENIAL = re.compile(r"(?:\b(?:not|never) |没有|并非|从不)$", re.IGNORECASE)
_ADVERBS = {"en": ("also ", "again ", "then "), "zh": ("也", "还", "又")}
_NOT = {"en": "not ", "zh": "没有"}
_SAME = (
    (r"\bsays\b", "states"), (r"\bsaid\b", "stated"), (r"\bmentions\b", "names"), (r"\bbecause\b", "since"),
    (r"\bsince\b", "because"), (r"\bso\b", "hence"), (r"\btherefore\b", "thus"), (r"\bshows\b", "indicates"),
    ("提到", "说到"), ("因为", "由于"), ("所以", "因此"), ("表示", "说"), ("，", "、"), (",", ";"),
)  # fmt: skip


def mentioned(chain: str, hint: str) -> bool:
    """Whether a chain cites at least half of a hint's characters."""
    held = {at for citation in align(chain, hint) for a, b in citation.post_char for at in range(a, b)}
    return 2 * len(held) >= len(hint.strip())


def cited_places(text: str, post: str) -> list[Span]:
    """Where a chain cites the post, in order, none within another."""
    found: list[Span] = []
    for a, b in sorted(c.expl_char for c in align(text, post) if c.post_char):
        if not found or a >= found[-1][1]:
            found.append((a, b))
    return found


def swapped(text: str, places: Sequence[Span], donor: Example) -> str:
    """``text`` with its cited phrases exchanged for those of the donor's chain, in order."""
    assert donor.chain is not None
    said = donor.text[slice(*donor.chain.char)]
    theirs = [said[a:b] for a, b in cited_places(said, donor.post)]
    if not theirs:
        return text
    for at, (a, b) in reversed(list(enumerate(places))):
        text = text[:a] + theirs[at % len(theirs)] + text[b:]
    return text


def adverbs(text: str, places: Sequence[Span]) -> list[str]:
    """``text`` with one adverb or another before each cited phrase, which deny nothing; none where nothing is cited."""
    return [_before(text, places, word) for word in _ADVERBS[_language(text)]] if places else []


def deny(text: str, places: Sequence[Span]) -> str:
    """``text`` with a negation before each cited phrase, or without the one that stands there."""
    for place in reversed(places):
        at = _opening(text, place)
        denial = _DENIAL.search(text, max(0, at - 8), at)
        text = text[: denial.start()] + text[at:] if denial else _before(text, [place], _NOT[_language(text)])
    return text


def _before(text: str, places: Sequence[Span], word: str) -> str:
    for place in reversed(places):
        at = _opening(text, place)
        text = text[:at] + word + text[at:]
    return text


def _opening(text: str, place: Span) -> int:
    """Where a cited phrase begins: at its quotation mark, where it has one."""
    return place[0] - 1 if place[0] and text[place[0] - 1] in _MARKS else place[0]


def paraphrase(text: str, places: Sequence[Span]) -> str:
    """``text`` with some verbs, conjunctions and marks exchanged for others, outside what it cites."""
    pattern = re.compile("|".join(f"(?P<r{at}>{old})" for at, (old, _) in enumerate(_SAME)), re.IGNORECASE)

    def other(match: re.Match[str]) -> str:
        inside = any(a < match.end() and match.start() < b for a, b in places)
        return match.group() if inside else _SAME[int(str(match.lastgroup)[1:])][1]

    return pattern.sub(other, text)


def _language(text: str) -> str:
    return "zh" if any("\u4e00" <= char <= "\u9fff" for char in text) else "en"
