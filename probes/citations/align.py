"""Where in the post do the words of an explanation come from?

The explanation is free text. It grounds itself in the post in three ways, tried in this order:

* ``quote``: text between quotation marks. A quote that is nowhere in the post is a finding, not a failure: it is
  returned with ``post_char=()`` and counts as fabricated.
* ``cue``: what follows "mentions", "such as", "提到", "例如" up to the end of the clause.
* ``lcs``: a maximal common substring of at least 4 CJK characters or 2 words that is not made of function words.

Matching runs on a normalised copy (NFKC, casefold, punctuation and white space dropped) with index maps both ways,
first exactly, then by Smith-Waterman local alignment (Smith & Waterman 1981; match 2, mismatch -1, gap -1; accepted
when score / (2 |query|) >= 0.7). Every span is in characters (Python string indices) of the original strings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from probes.citations.normalise import Normalised, cuts_word, is_cjk, is_letter, normalise
from probes.records import Citation, Example, Span

FUZZY_ACCEPT = 0.7
MIN_CJK = 4
MIN_WORDS = 2
_MAX_CELLS = 30_000_000  # beyond this a quote is only looked for exactly: the alignment table would not fit in memory
_MAX_REPEATS = 8

_PAIRS = {
    "「": "」",
    "『": "』",
    "“": "”",
    "‘": "’",
    "《": "》",
    "〈": "〉",
    "«": "»",
    "„": "”",
    '"': '"',
    "'": "'",
    "＂": "＂",
}
_ELLIPSIS = re.compile(r"…+|\.{2,}|⋯+|。{2,}")
_CUE_VERBS = re.compile(
    r"(?:提到|提及|写道|写到|说道|自述|声称|表示|表达了?|流露出?|例如|比如|诸如|说(?!明|法|服)|如(?!果|何|此|同|今|实|常))"
    r"(?:了|自己|他|她|其|[:：，,])*"
    r"|\b(?:mention(?:s|ed|ing)?|sa(?:ys?|id|ying)|stat(?:es?|ed|ing)|writ(?:es?|ing)|wrote|express(?:es|ed|ing)?"
    r"|describ(?:es?|ed|ing)|such as|for example|e\.g\.|phrases? like|words? like)\b[\s,:]*(?:that\b)?",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[。！？!?；;，,、\n]|\.(?=\s|$)")
_MAX_CUE_CHARS = 80

# Words so frequent that sharing them is no sign of a citation. English words are compared whole; Chinese ones are
# deleted from the substring before its characters are counted.
_STOP_WORDS = (
    "a an and are as at be been being but by can could did do does for from had has have having he her him his how i "
    "if in into is it its me more most my no nor not of off on or our out over own post poster she should so some "
    "such than that the their them then there these they this those to too under up very was we were what when "
    "where which who whom why will with would you your am feel feels feeling felt feelings author writer person "
    "about because just like really also any all one"
)
_STOP_EN = frozenset(_STOP_WORDS.split())
_STOP_ZH = re.compile(
    "自己|感觉|觉得|这个|那个|一个|一些|一种|什么|没有|我们|他们|她们|你们|因为|所以|但是|可能|可以|还是|就是|不是|"
    "已经|现在|时候|这样|那样|如果|非常|真的|以及|并且|或者|而且|对于|关于|表示|帖子|用户|作者|[的了是我你他她它在有和与也都就很吧吗呢啊着过把被让给]"
)


def _substance(text: str) -> tuple[int, int]:
    """(CJK characters, words) of ``text``."""
    return sum(map(is_cjk, text)), len(_words(text))


def _words(text: str) -> list[str]:
    spaced = "".join(" " if is_cjk(char) else char for char in text)
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", spaced)


def _substantial(text: str) -> bool:
    cjk, words = _substance(text)
    return cjk >= MIN_CJK or words >= MIN_WORDS or (cjk >= 2 and words >= 1)


def _informative(text: str) -> bool:
    """Substantial even when function words are ignored."""
    content = [word for word in _words(text) if word.casefold().replace("’", "'") not in _STOP_EN]
    cjk = sum(map(is_cjk, _STOP_ZH.sub("", text)))
    return _substantial(text) and (cjk >= 2 or any(len(word) >= 3 for word in content))


def _quotes(text: str) -> list[Span]:
    """Insides of the outermost quotations, apostrophes left alone."""
    found = []
    position = 0
    while position < len(text):
        opener = text[position]
        if opener not in _PAIRS or not _may_open(text, position):
            position += 1
            continue
        close = _closing(text, position)
        if close is None:
            position += 1
            continue
        found.append((position + 1, close))
        position = close + 1
    return found


def _may_open(text: str, position: int) -> bool:
    if text[position] not in "'‘":
        return True
    before = text[position - 1] if position else " "
    after = text[position + 1] if position + 1 < len(text) else " "
    return not is_letter(before) and not after.isspace()


def _closing(text: str, position: int) -> int | None:
    opener = text[position]
    close, depth = _PAIRS[opener], 0
    for j in range(position + 1, len(text)):
        char = text[j]
        if char == "\n" and (opener in "'‘" or text[j : j + 2] == "\n\n"):
            return None  # a mark left open must not swallow the next paragraph
        if char == close or (opener == '"' and char == "”") or (opener == "“" and char == '"'):
            if char in "'’" and (cuts_word(text, j) or text[j - 1].isspace()):
                continue
            if depth == 0:
                return j
            depth -= 1
        elif char == opener and opener != close and opener != "‘":
            depth += 1
    return None


def _occurrences(query: str, post: Normalised) -> list[Span]:
    """All normalised spans where ``query`` stands in the post without cutting a word in two."""
    spans = []
    at = post.text.find(query)
    while at >= 0:
        a, b = post.to_source(at, at + len(query))
        whole = not post.splits(at) and not post.splits(at + len(query))
        if whole and not cuts_word(post.source, a) and not cuts_word(post.source, b):
            spans.append((at, at + len(query)))
        at = post.text.find(query, at + 1)
    return spans


def smith_waterman(query: str, text: str) -> tuple[float, Span, Span] | None:
    """Best local alignment of two strings: (score, span in query, span in text), None when nothing matches.

    Match 2, mismatch -1, gap -1. The linear gap cost lets a whole row be filled by one running maximum:
    ``H[j] = max_k<=j (T[k] - (j - k))``. O(len(query)) numpy operations over len(text).
    """
    q = np.fromiter(map(ord, query), np.int32, len(query))
    t = np.fromiter(map(ord, text), np.int32, len(text))
    table = np.zeros((len(q) + 1, len(t) + 1), np.int32)
    ramp = np.arange(len(t) + 1, dtype=np.int32)
    for i in range(1, len(q) + 1):
        row = np.zeros(len(t) + 1, np.int32)
        row[1:] = np.maximum(table[i - 1, :-1] + np.where(t == q[i - 1], 2, -1), table[i - 1, 1:] - 1)
        np.maximum(row, 0, out=row)
        table[i] = np.maximum.accumulate(row + ramp) - ramp
    i, j = np.unravel_index(int(table.argmax()), table.shape)
    i, j = int(i), int(j)
    score = int(table[i, j])
    if score <= 0:
        return None
    end = (i, j)
    while table[i, j] > 0:
        here = table[i, j]
        if here == table[i - 1, j - 1] + (2 if q[i - 1] == t[j - 1] else -1):
            i, j = i - 1, j - 1
        elif here == table[i - 1, j] - 1:
            i -= 1
        else:
            j -= 1
    return float(score), (i, end[0]), (j, end[1])


def _fuzzy(query: str, post: Normalised) -> tuple[float, list[Span]]:
    """(best score in 0..1, normalised spans of it and of repeats nearly as good); no spans below FUZZY_ACCEPT."""
    if not query or not post.text or len(query) * len(post.text) > _MAX_CELLS:
        return 0.0, []
    text, best, spans = post.text, 0.0, []
    for _ in range(_MAX_REPEATS):
        hit = smith_waterman(query, text)
        if hit is None:
            break
        score = hit[0] / (2 * len(query))
        best = max(best, score)
        if score < FUZZY_ACCEPT or score < 0.9 * best:
            break
        (qa, qb), (a, b) = hit[1], hit[2]
        text = text[:a] + "\0" * (b - a) + text[b:]
        spans.append(_extend(post, a, b, head=qa, tail=len(query) - qb))
    return best, spans


def _extend(post: Normalised, a: int, b: int, head: int, tail: int) -> Span:
    """Takes in as many post characters as the query has unaligned ends, within the clause and to whole words."""

    def joined(i: int) -> bool:  # nothing but word spaces between normalised characters i - 1 and i
        gap = post.source[int(post.end[i - 1]) : int(post.start[i])]
        return not gap.strip(" '’")

    while a > 0 and joined(a) and (head > 0 or cuts_word(post.source, int(post.start[a]))):
        a, head = a - 1, head - 1
    while b < len(post.text) and joined(b) and (tail > 0 or cuts_word(post.source, int(post.end[b - 1]))):
        b, tail = b + 1, tail - 1
    return a, b


def _find(query: str, post: Normalised) -> tuple[float, list[Span]]:
    """(score, normalised spans) of one normalised query: exact if possible, else fuzzy."""
    exact = _occurrences(query, post)
    if exact:
        return 1.0, exact
    return _fuzzy(query, post) if len(query) >= MIN_CJK else (0.0, [])


def _find_quote(inside: str, post: Normalised) -> tuple[float, list[Span]]:
    """As ``_find``; a quote with an ellipsis that is not in the post whole is found when every piece of it is."""
    query = normalise(inside).text
    pieces = [piece for part in _ELLIPSIS.split(inside) if (piece := normalise(part).text)]
    if len(pieces) > 1 and not _occurrences(query, post):
        found = [_find(piece, post) for piece in pieces]
        if all(hits for _, hits in found):
            return min(score for score, _ in found), [span for _, hits in found for span in hits]
    return _find(query, post)


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorted union of half-open spans; overlapping ones are joined, touching ones stay apart, empty ones vanish."""
    merged: list[Span] = []
    for a, b in sorted(spans):
        if b <= a:
            continue
        if merged and a < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], b))
        else:
            merged.append((a, b))
    return tuple(merged)


def _common(explanation: Normalised, post: Normalised, claimed: np.ndarray) -> list[tuple[Span, list[Span]]]:
    """Maximal common substrings, longest first, outside the normalised positions already ``claimed``."""
    e = np.fromiter(map(ord, explanation.text), np.int32, len(explanation.text))
    e[claimed] = -1
    p = np.fromiter(map(ord, post.text), np.int32, len(post.text))
    length = np.zeros(len(e) + 1, np.int64)  # the longest common run that ends at each explanation character
    run = np.zeros(len(p) + 1, np.int32)
    for i, code in enumerate(e):
        run[1:] = np.where(p == code, run[:-1] + 1, 0)
        run[0] = 0
        length[i] = run.max()
    ends = [i for i in range(len(e)) if length[i] and length[i + 1] != length[i] + 1]
    free = ~claimed
    found = []
    for i in sorted(ends, key=lambda i: (-length[i], i)):
        a, b = i + 1 - int(length[i]), i + 1
        while a < b and not free[a]:
            a += 1
        while a < b and not free[b - 1]:
            b -= 1
        while a < b and (explanation.splits(a) or cuts_word(explanation.source, int(explanation.start[a]))):
            a += 1
        while a < b and (explanation.splits(b) or cuts_word(explanation.source, int(explanation.end[b - 1]))):
            b -= 1
        if a >= b or not free[a:b].all():
            continue
        span = explanation.to_source(a, b)
        if not _informative(explanation.source[span[0] : span[1]]):
            continue
        hits = _occurrences(explanation.text[a:b], post)
        if hits:
            free[a:b] = False
            found.append(((a, b), hits))
    return found


def _not_the_post(example: Example) -> str:
    """Normalised text an explanation may quote without quoting the post: the question and the label names."""
    template = [
        example.text[a:b] for name, (a, b) in ((s.name, s.char) for s in example.segments) if name == "template"
    ]
    parts = [*template, *example.candidates.keys(), *example.candidates.values(), example.label_text, example.label]
    return "\n".join(normalise(part).text for part in parts)


def align(explanation: Example | str, post: str | None = None) -> list[Citation]:
    """Finds what the explanation cites of the post.

    Args:
        explanation: an ``Example`` (its explanation and post are used, and quotes of the question or of a label name
            are not mistaken for quotes of the post), or the explanation text, with ``post``.
        post: the post when ``explanation`` is a string.

    Returns:
        Citations sorted by ``expl_char`` (character spans in the explanation). ``post_char``: all occurrences in the
        post, disjoint and sorted; ``()`` for a quote that is not in the post (fabricated), whose ``score`` is then
        the best alignment found. ``kind``: quote | cue | lcs. ``score``: 1.0 exact, else score / (2 |query|).
        An explanation of None gives an empty list.
    """
    elsewhere = ""
    if not isinstance(explanation, str):
        elsewhere, post, explanation = _not_the_post(explanation), explanation.post, explanation.explanation or ""
    if post is None:
        raise TypeError("align(explanation, post): the post is missing")
    source, target = normalise(explanation), normalise(post)
    found: list[tuple[Span, tuple[Span, ...], str, float]] = []
    claimed = np.zeros(len(source.text), bool)

    def add(span: Span, hits: list[Span], kind: str, score: float) -> None:
        a, b = source.from_source(*span)
        claimed[a:b] = True
        found.append((span, merge_spans(target.to_source(x, y) for x, y in hits), kind, score))

    for a, b in _quotes(explanation):
        query = normalise(explanation[a:b]).text
        if not query:
            continue
        score, hits = _find_quote(explanation[a:b], target)
        if hits or query not in elsewhere:
            add((a, b), hits, "quote", round(score, 4))
    for verb in _CUE_VERBS.finditer(explanation):
        stop = _CLAUSE_END.search(explanation, verb.end(), verb.end() + _MAX_CUE_CHARS)
        span = (verb.end(), stop.start() if stop else min(len(explanation), verb.end() + _MAX_CUE_CHARS))
        a, b = source.from_source(*span)
        if a >= b or claimed[a:b].any() or not _informative(explanation[span[0] : span[1]]):
            continue
        score, hits = _find(source.text[a:b], target)
        if hits:
            add(source.to_source(a, b), hits, "cue", round(score, 4))
    for (a, b), hits in _common(source, target, claimed):
        add(source.to_source(a, b), hits, "lcs", 1.0)
    found.sort(key=lambda item: item[0])
    return [
        Citation(f"c{i}", span, hits, kind, score, _hash(explanation[span[0] : span[1]]))
        for i, (span, hits, kind, score) in enumerate(found, start=1)
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(normalise(text).text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fabricated_quotes(citations: Iterable[Citation]) -> tuple[int, int]:
    """(quotes that are nowhere in the post, all quotes)."""
    quotes = [citation for citation in citations if citation.kind == "quote"]
    return sum(not citation.post_char for citation in quotes), len(quotes)


def coverage(citations: Iterable[Citation], length: int) -> float:
    """Share of the ``length`` characters of an explanation that lie in grounded citations; 0.0 for an empty one."""
    grounded = merge_spans(citation.expl_char for citation in citations if citation.post_char)
    return sum(b - a for a, b in grounded) / length if length else 0.0
