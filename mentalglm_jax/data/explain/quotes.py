"""Quotes in an explanation, and whether the post really says them.

Fuzzy: both sides are reduced to letters and digits (NFKC, case folded), then aligned locally (Smith and Waterman 1981:
match 2, mismatch -1, gap -1). The score is divided by that of a perfect match; 0.7 admits a dropped or added word and
keeps out what only shares its topic.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator

import numpy as np

ACCEPT = 0.7
_EXACT_ABOVE = 1000  # characters: alignment takes the product of both lengths, and nobody quotes so much with changes
MOST_CELLS = 20_000_000  # a quote of 400 characters in a post of 50,000
_EXACT_BELOW = 4  # characters: so short a quote is too easily near something
_QUOTES = re.compile(r"“([^“”]+)”|「([^「」]+)」|『([^『』]+)』|‘([^‘’]+)’|\"([^\"]+)\"|(?<!\w)'([^']+)'(?!\w)")
_GAP = re.compile(r"…+|\.{3,}|。{3,}")


def find_quotes(text: str) -> list[str]:
    """What stands in quotation marks, in order, white space at the ends dropped; apostrophes are not marks."""
    found = (next(group for group in match.groups() if group is not None) for match in _QUOTES.finditer(text))
    return [quote.strip() for quote in found if quote.strip()]


def without_quotes(text: str) -> str:
    """The explainer's own words."""
    return _QUOTES.sub("", text)


def reduce(text: str) -> str:
    """Letters and digits, NFKC, case folded: what is compared."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] not in "PZC")


def similarity(quote: str, post: str) -> float:
    """How well the post says the quote: 1 for word for word, 0 for nothing in common. An ellipsis in the quote leaves
    something out; the worst of its parts counts."""
    return next(_similarities([quote], post))


def _similarities(quotes: Iterable[str], post: str) -> Iterator[float]:
    """``similarity`` of each; what is not there word for word is aligned for as long as ``MOST_CELLS`` last."""
    text, left = reduce(post), MOST_CELLS
    for quote in quotes:
        scores: list[float] = []
        for part in filter(None, map(reduce, _GAP.split(quote))):
            if part in text:
                scores.append(1.0)
                continue
            left -= len(part) * len(text)
            scores.append(aligned(part, text) if len(part) >= _EXACT_BELOW and left >= 0 else 0.0)
        yield min(scores, default=0.0)


def aligned(part: str, text: str) -> float:
    """The best local alignment of what ``reduce`` gave, from 0 to 1; 0 where the part is longer than any quote, or the
    product of both lengths, which is the time that it takes, is beyond reason."""
    if not part or not text or len(part) > _EXACT_ABOVE or len(part) * len(text) > MOST_CELLS:
        return 0.0
    post = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    steps = np.arange(1, len(post) + 1)
    row, best = np.zeros(len(post) + 1, np.int64), 0
    for character in part:
        step = np.where(post == ord(character), 2, -1)
        fresh = np.maximum(np.maximum(row[:-1] + step, row[1:] - 1), 0)
        # A gap on the post's side costs one a character: the best start to the left, minus the way from it.
        fresh = np.maximum(np.maximum.accumulate(fresh + steps) - steps, 0)
        row[1:] = fresh
        best = max(best, int(fresh.max()))
    return best / (2 * len(part))


def quotes_of_post(explanation: str, own_words: Collection[str] = ()) -> list[str]:
    """The quotes that claim to be the post's; ``own_words`` (label names) may stand in quotation marks too."""
    known = {reduce(word) for word in own_words}
    return [quote for quote in find_quotes(explanation) if reduce(quote) not in known]


def quotes_occur(explanation: str, post: str, own_words: Collection[str] = ()) -> bool:
    """Whether there is a quote, and every quote stands in the post."""
    quotes = dict.fromkeys(quotes_of_post(explanation, own_words))
    return bool(quotes) and all(score >= ACCEPT for score in _similarities(quotes, post))
