"""The units of erasure: clauses of a post, found without knowing its language, and the tokens each one holds."""

import re
import unicodedata

import numpy as np

from probes.model import Example, Span

_EMOJI = "\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\U000e0020-\U000e007f"
_WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
_BREAK = re.compile(
    rf"[。！？；，…、\n]+|(?<![0-9A-Za-z])[,.!?;]+|[,.!?;]+(?![0-9A-Za-z])|[{_EMOJI}]+|(?<=[{_WIDE}])\s+|\s+(?=[{_WIDE}])"
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
    spans = _join_empty(post, spans)
    while len(spans) > max_units:
        at = min(range(len(spans) - 1), key=lambda i: spans[i + 1][1] - spans[i][0])
        spans[at : at + 2] = [(spans[at][0], spans[at + 1][1])]
    return spans


def _join_empty(post: str, spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for a, b in spans:
        blank = not any(_says(char) for char in post[a:b])
        if joined and (blank or not any(_says(char) for char in post[slice(*joined[-1])])):
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return joined


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
        ends.append(a + (min(spaces, key=lambda at: abs(at - wanted)) if spaces else wanted))
    ends = sorted(set(ends))
    return list(zip([a, *ends], [*ends, b], strict=True))


def clause_tokens(example: Example, max_units: int = 30) -> tuple[list[Span], np.ndarray]:
    """Clauses and the post tokens erased with each.

    A token belongs to the clause that holds most of its meaning-bearing bytes (letters, digits, symbols; the later one
    if equal): byte-level BPE often glues a comma to the word after it. Clauses left without a token join the next.

    Returns:
        spans covering the post, and int ``[post tokens]``: the clause of each.
    """
    spans = clauses(example.post, max_units)
    owner = np.repeat(np.arange(len(spans)), [b - a for a, b in spans])
    weight = np.array([1e-3 + _says(char) for char in example.post])
    first, last = example.post_tok
    unit = np.zeros(last - first, dtype=int)
    for index in range(last - first):
        share = example.post_chars(np.eye(1, last - first, index)[0]) * weight
        held = np.bincount(owner, weights=share, minlength=len(spans))
        unit[index] = np.flatnonzero(held >= held.max() * (1 - 1e-9))[-1]
    kept = sorted(set(unit.tolist()))
    starts = [0, *(spans[index][0] for index in kept[1:])]
    merged = list(zip(starts, [*starts[1:], len(example.post)], strict=True))
    return merged, np.searchsorted(kept, unit)
