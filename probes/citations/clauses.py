"""The units of erasure: clauses, words, characters or tokens of a post, and the tokens each one holds.

Time is linear in the length of the post (and its tokens), but for a logarithm where units are joined.
"""

import bisect
import heapq
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from probes.errors import ProbeInputError
from probes.records import Example, Span

UNITS = ("clause", "word", "char", "token")
# A post of fewer clauses can settle nothing (a citation of one would agree by chance in one place of three): cut finer.
MIN_UNITS = 4

_EMOJI = "\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\U000e0020-\U000e007f"
_WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
_BREAK = re.compile(
    rf"[。！？；，…、\n]+|(?<![0-9A-Za-z])[,.!?;]+|[,.!?;]+(?![0-9A-Za-z])|[{_EMOJI}]+|(?<=[{_WIDE}])\s+|(?<![^\S\n])[^\S\n]+(?=[{_WIDE}])"
)


def clauses(post: str, max_units: int = 30, max_width: int = 80) -> list[Span]:
    """Cuts a post into clauses without knowing its language.

    A clause ends after sentence punctuation, a line break, a run of emoji, or white space next to a wide (CJK)
    character; punctuation between two ASCII letters or digits ("3.5", "e.g") does not end one. Clauses wider than
    ``max_width`` columns (a wide character counts 2) are cut into equal parts, at spaces where there are any. Pieces
    without a letter, digit or emoji join their neighbour, and the shortest neighbours are joined until ``max_units``
    are left.

    Returns:
        spans that cover the post without gap or overlap; none for an empty post.
    """
    ends = sorted({match.end() for match in _BREAK.finditer(post)} | {len(post)} if post else ())
    spans: list[Span] = []
    start = 0
    for end in ends:
        spans += _cut(post, (start, end), max_width)
        start = end
    return _join_shortest(_join_empty(post, spans), max_units)


def _join_empty(post: str, spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    says = False  # whether the last of ``joined`` does
    for a, b in spans:
        this = any(_says(char) for char in post[a:b])
        if joined and not (this and says):
            joined[-1], says = (joined[-1][0], b), says or this
        else:
            joined.append((a, b))
            says = this
    return joined


def _join_shortest(spans: list[Span], count: int) -> list[Span]:
    """Joins the two neighbours that are shortest together, the first such pair, until ``count`` are left."""
    last = len(spans)
    before, after = list(range(-1, last - 1)), list(range(1, last + 1))
    ends, gone = [b for _, b in spans], [False] * last
    pairs = [(spans[i + 1][1] - spans[i][0], i, i + 1) for i in range(last - 1)]
    heapq.heapify(pairs)
    left = last
    while left > max(count, 1):
        width, i, j = heapq.heappop(pairs)
        if gone[i] or gone[j] or after[i] != j or ends[j] - spans[i][0] != width:
            continue  # a pair that was joined with another meanwhile
        ends[i], gone[j], after[i] = ends[j], True, after[j]
        left -= 1
        if after[i] < last:
            before[after[i]] = i
            heapq.heappush(pairs, (ends[after[i]] - spans[i][0], i, after[i]))
        if before[i] >= 0:
            heapq.heappush(pairs, (ends[i] - spans[before[i]][0], before[i], i))
    return [(spans[i][0], ends[i]) for i in range(last) if not gone[i]]


def _says(char: str) -> bool:
    """Whether a character can carry meaning: a letter, digit, emoji or other symbol."""
    return unicodedata.category(char)[0] in "LNS"


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def _cut(post: str, span: Span, max_width: int) -> list[Span]:
    a, b = span
    parts = -(-_width(post[a:b]) // max_width)
    if parts <= 1:
        return [span]
    spaces = [match.end() for match in re.finditer(r"\s+", post[a:b]) if match.end() < b - a]
    ends = []
    for part in range(1, parts):
        wanted = (b - a) * part // parts
        near = bisect.bisect_left(spaces, wanted)
        close = spaces[max(near - 1, 0) : near + 1]
        ends.append(a + (min(close, key=lambda at: abs(at - wanted)) if spaces else wanted))
    ends = sorted(set(ends))
    return list(zip([a, *ends], [*ends, b], strict=True))


def pieces(post: str, max_units: int = 30, cut: str | None = None) -> list[Span]:
    """What a post is erased by: its clauses, or its words.

    Args:
        cut: clause | word, or None to choose for this post alone (``choose_cut``).
    Returns:
        spans that cover the post without gap or overlap.
    """
    by_words = (cut or choose_cut([post])) == "word" and sum(map(_says, post)) >= 2 * MIN_UNITS
    return words(post, max_units) if by_words else clauses(post, max_units)


def choose_cut(posts: Sequence[str]) -> str:
    """ "clause", or "word" where most posts have fewer than ``MIN_UNITS`` clauses.

    One for a whole data set: a post of three sentences in words beside one of ten in clauses would be two measurements
    under one name. A post without punctuation is one clause, however long, and then nothing could be told apart in it.
    """
    few = sum(len(clauses(post, max_width=len(post) * 2 + 1)) < MIN_UNITS for post in posts)
    return "word" if 2 * few > len(posts) else "clause"


def words(post: str, max_units: int | None = None) -> list[Span]:
    """Cuts a post into words: at white space, and runs of CJK every 2 characters (most Chinese words have two; a
    segmenter would add a dependency and a lexicon to what the numbers depend on).

    Returns:
        spans that cover the post (white space and punctuation go with the word before); the shortest neighbours are
        joined until ``max_units`` are left.
    """
    cuts = {0, len(post)} | {match.end() for match in re.finditer(r"\s+", post)}
    for match in re.finditer(rf"[{_WIDE}]+", post):
        cuts |= {match.start(), match.end()}
        cuts |= set(range(match.start(), match.end(), 2))
    ends = sorted(cuts)
    spans = _join_empty(post, [(a, b) for a, b in itertools.pairwise(ends)])
    return spans if max_units is None else _join_shortest(spans, max_units)


def clause_tokens(example: Example, max_units: int = 30) -> tuple[list[Span], np.ndarray]:
    """Clauses (``pieces``) and the post tokens erased with each: ``unit_tokens`` of "clause"."""
    return _owned(example, pieces(example.post, max_units, example.cut))


def saying_tokens(example: Example) -> np.ndarray:
    """bool ``[post tokens]``: which hold a letter, digit or symbol, and not only punctuation or white space."""
    return example.touched([(at, at + 1) for at, char in enumerate(example.post) if _says(char)])


def unit_tokens(example: Example, kind: str, max_units: int = 30) -> tuple[list[Span], np.ndarray]:
    """The units of a post and the post tokens erased with each.

    Args:
        kind: clause | word | char | token. A character is as many tokens as its bytes are cut into; where one token
            holds several characters, they are one unit. ``max_units`` bounds clauses only.
    Returns:
        character spans covering the post (none for "char" and "token", whose units need not be spans), and
        int ``[post tokens]``: the unit of each.
    Raises:
        ProbeInputError: unknown kind.
    """
    if kind == "clause":
        return clause_tokens(example, max_units)
    if kind == "word":
        return _owned(example, words(example.post))
    first, last = example.post_tok
    if kind == "token":
        return [], np.arange(last - first)
    if kind != "char":
        raise ProbeInputError(f"units {kind!r}: not one of {', '.join(UNITS)}")
    starts = set(example.char_bytes)
    opens = [example.byte_spans[first + i][0] in starts for i in range(last - first)]
    return [], np.cumsum([i > 0 and opens[i] for i in range(last - first)])


def _owned(example: Example, spans: list[Span]) -> tuple[list[Span], np.ndarray]:
    """Each token to the span that holds most of its meaning-bearing bytes (letters, digits, symbols; the later one if
    equal): byte-level BPE often glues a comma to the word after it. Spans left without a token join the next."""
    owner = np.repeat(np.arange(len(spans)), [b - a for a, b in spans])
    weight = np.array([1e-3 + _says(char) for char in example.post])
    first, last = example.post_tok
    tokens, chars, shares = example.post_shares
    # One row per token and span that share a character, and how much of the token that is.
    pairs, rows = np.unique(tokens * len(spans) + owner[chars], return_inverse=True)
    held = np.bincount(rows, weights=shares * weight[chars], minlength=len(pairs))
    token, span = np.divmod(pairs, len(spans))
    most = np.zeros(last - first)
    np.maximum.at(most, token, held)
    unit = np.full(last - first, len(spans) - 1)
    best = held >= most[token] * (1 - 1e-9)
    unit[token[best]] = span[best]  # ascending within a token: the last of equals stays
    kept = sorted(set(unit.tolist()))
    starts = [0, *(spans[index][0] for index in kept[1:])]
    merged = list(zip(starts, [*starts[1:], len(example.post)], strict=True))
    return merged, np.searchsorted(kept, unit)
