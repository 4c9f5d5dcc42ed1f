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
# Opening marks and those that close them, as ``probes`` reads them but for titles (《》), which are no words of a post.
_PAIRS = {"「": "」", "『": "』", "｢": "｣", "“": '”"', "‘": "’", "«": "»", "»": "«", "‹": "›", "›": "‹", "„": "”“",
          "‚": "’‘", "〝": "〞〟", '"': '"”', "'": "'", "＂": "＂", "＇": "＇", "`": "`"}  # fmt: skip
_SINGLE = "'‘‚＇`"  # these do not cross a line
_MARK = re.compile(f"[{''.join({*_PAIRS, *''.join(_PAIRS.values())})}\n]")
_UNSPACED = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]")  # Han and kana
_GAP = re.compile(r"…+|\.{3,}|。{3,}")


def find_quotes(text: str) -> list[str]:
    """What stands in quotation marks, in order, the outermost, white space at the ends dropped; apostrophes are no
    marks. In time linear in the text."""
    return [quote for a, b in _spans(text) if (quote := text[a:b].strip())]


def without_quotes(text: str) -> str:
    """The explainer's own words."""
    kept, end = [], 0
    for a, b in _spans(text):
        kept.append(text[end : a - 1])
        end = b + 1
    return "".join(kept) + text[end:]


def _spans(text: str) -> list[tuple[int, int]]:
    """Insides of the outermost quotations."""
    found, end = [], 0
    for opening, closing in sorted(_closings(text).items()):
        if opening >= end:
            found.append((opening + 1, closing))
            end = closing + 1
    return found


def _closings(text: str) -> dict[int, int]:
    """For every opening mark that is closed, where.

    A pair of different marks nests; of others, and of single ones, the first that may close does. A mark left open
    does not swallow the next paragraph, a single one not even the next line.
    """
    found: dict[int, int] = {}
    opened: dict[str, list[int]] = {}
    for match in _MARK.finditer(text):
        at, char = match.start(), match.group()
        if char == "\n":
            for opener in [*opened] if text[at + 1 : at + 2] == "\n" else _SINGLE:
                opened.pop(opener, None)
            continue
        for opener in [opener for opener in opened if char in _PAIRS[opener] and _may_close(text, at)]:
            if _nests(opener):
                found[opened[opener].pop()] = at
            else:
                found.update(dict.fromkeys(opened[opener], at))
                opened[opener].clear()
            if not opened[opener]:
                del opened[opener]
        if char in _PAIRS and (_nests(char) or _may_open(text, at)):
            opened.setdefault(char, []).append(at)
    return found


def _nests(opener: str) -> bool:
    return opener not in _PAIRS[opener] and opener not in "‘‚"


def _may_open(text: str, at: int) -> bool:
    """No apostrophe, which has a letter or digit before it: don't, the posters' words."""
    return text[at] not in "'‘" or not (_letter(text[at - 1 : at]) or text[at + 1 : at + 2].isspace())


def _may_close(text: str, at: int) -> bool:
    """No apostrophe, which has a letter or digit behind it: don't, 'cause."""
    if text[at] not in "'’":
        return True
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    return not before.isspace() and not (_letter(before) and _letter(after))


def _letter(char: str) -> bool:
    """A letter or digit of a script that sets words apart by spaces."""
    return char.isalnum() and not _UNSPACED.match(char)


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
