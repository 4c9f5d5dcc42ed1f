"""Where in the post do the words of an explanation come from?

The explanation is free text. It grounds itself in the post in three ways, tried in this order:

* ``quote``: text between quotation marks. A quote that is nowhere in the post is a finding, not a failure: it is
  returned with ``post_char=()`` and counts as fabricated. So is one that the post negates (``claims.turned``), with
  the score it was found by. Titles and terms (``claims.term``) that are not in the post are no quotes.
* ``cue``: what follows "mentions", "such as", "提到", "例如" up to the end of the clause.
* ``lcs``: a maximal common substring of at least 4 CJK characters or 2 words that is not made of function words.

Matching runs on a normalised copy (NFKC, casefold, punctuation and white space dropped) with index maps both ways,
first exactly, then by Smith-Waterman local alignment (Smith & Waterman 1981; match 2, mismatch -1, gap -1; accepted
when score / (2 |query|) >= 0.68: with a fifth of the characters exchanged it is 0.7). Every span is in characters
(Python string indices) of the original strings.

Time is linear in the lengths of explanation and post but for the alignments, whose sum is bounded (``_MAX_CELLS``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from probes.citations.claims import term, turned
from probes.citations.index import Index
from probes.citations.normalise import Normalised, cuts_word, is_cjk, is_letter, normalise
from probes.records import Citation, Example, Span

FUZZY_ACCEPT = 0.68
MIN_CJK = 4
MIN_WORDS = 2
# Beyond these a quote is only looked for exactly: cells of one alignment table (memory), and of all of one explanation.
_MAX_CELLS = 30_000_000
_ALL_CELLS = 100_000_000
_MAX_REPEATS = 8
_MAX_TURNED = 20  # places of one quote whose polarity is looked at
_MAX_PLACES = 1000  # where one phrase is marked in a post; a post that repeats it more often is noise
_ALL_LETTERS = 50_000_000  # of all common runs that are looked at in one explanation
_LOOK = 200  # characters of a common run that are searched for content words

# Opening marks and those that close them.
_PAIRS = {"「": "」", "『": "』", "｢": "｣", "“": '”"', "‘": "’", "《": "》", "〈": "〉", "«": "»", "»": "«", "‹": "›",
          "›": "‹", "„": "”“", "‚": "’‘", "〝": "〞〟", '"': '"”', "'": "'", "＂": "＂",
          "＇": "＇", "`": "`"}  # fmt: skip
_SINGLE = "'‘‚＇`"  # these do not cross a line
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
    found, closings = [], _closings(text)
    position = 0
    while position < len(text):
        opener = text[position]
        if opener not in _PAIRS or not _may_open(text, position):
            position += 1
            continue
        close = closings.get(position)
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


def _closings(text: str) -> dict[int, int]:
    """For every opening mark that is closed, where: each kind of mark in one pass.

    A pair of different marks nests; of others, and of single quotation marks, the first that may close does. A mark
    left open must not swallow the next paragraph, a single one not even the next line.
    """
    found: dict[int, int] = {}
    for opener in _PAIRS.keys() & set(text):
        closers = _PAIRS[opener]
        nests, single = opener not in closers and opener not in "‘‚", opener in _SINGLE
        stack: list[int] = []
        for j, char in enumerate(text):
            if char == "\n":
                if single or text[j : j + 2] == "\n\n":
                    stack.clear()
                continue
            if char in closers and stack and not (char in "'’" and (cuts_word(text, j) or text[j - 1].isspace())):
                if nests:
                    found[stack.pop()] = j
                else:
                    found.update(dict.fromkeys(stack, j))
                    stack.clear()
            if char == opener and (nests or _may_open(text, j)):
                stack.append(j)
    return found


class _Post:
    """A normalised post that many phrases are looked for in, each only once; all alignments together are bounded."""

    def __init__(self, post: str) -> None:
        self.normalised = normalise(post)
        self.index = Index(self.normalised.text)
        self.cells = _ALL_CELLS
        self.straight: dict[str, list[Span]] = {}  # quote -> its places without those that say the contrary
        self._known: dict[str, list[Span]] = {}
        self._found: dict[str, tuple[float, list[Span]]] = {}

    def occurrences(self, query: str) -> list[Span]:
        """All normalised spans (``_MAX_PLACES`` at most) where ``query`` stands without cutting a word in two."""
        if query not in self._known:
            post, size, spans = self.normalised, len(query), []
            for at in self.index.places(query):
                a, b = post.to_source(at, at + size)
                whole = not post.splits(at) and not post.splits(at + size)
                if whole and not cuts_word(post.source, a) and not cuts_word(post.source, b):
                    spans.append((at, at + size))
                    if len(spans) == _MAX_PLACES:
                        break
            self._known[query] = spans
        return self._known[query]

    def find(self, query: str) -> tuple[float, list[Span]]:
        """(score, normalised spans) of one normalised query: exact if possible, else fuzzy."""
        if query not in self._found:
            exact = self.occurrences(query)
            self._found[query] = (1.0, exact) if exact else _fuzzy(query, self) if len(query) >= MIN_CJK else (0.0, [])
        return self._found[query]


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


def _fuzzy(query: str, where: _Post) -> tuple[float, list[Span]]:
    """(best score in 0..1, normalised spans of it and of repeats nearly as good); no spans below FUZZY_ACCEPT."""
    post = where.normalised
    text, best, spans = post.text, 0.0, []
    cells = len(query) * len(text)
    for _ in range(_MAX_REPEATS):
        if not cells or cells > min(_MAX_CELLS, where.cells):
            break
        where.cells -= cells
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


def _find_quote(inside: str, post: _Post) -> tuple[float, list[Span]]:
    """As ``find``, without places that say the contrary; a quote with an ellipsis that is not in the post whole is
    found when every piece of it is."""
    query = normalise(inside).text
    pieces = [part for part in _ELLIPSIS.split(inside) if normalise(part).text]
    if len(pieces) > 1 and not post.occurrences(query):
        found = [(post.find(normalise(piece).text), piece) for piece in dict.fromkeys(pieces)]
        if all(hits for (_, hits), _ in found):
            score = min(score for (score, _), _ in found)
            kept = [_straight(piece, hits, post) for (_, hits), piece in found]
            return score, [span for hits in kept for span in hits] if all(kept) else []
    score, hits = post.find(query)
    return score, _straight(inside, hits, post)


def _straight(quote: str, hits: list[Span], post: _Post) -> list[Span]:
    """Those of the places whose polarity the quote keeps; the same list where all of them are."""
    if quote not in post.straight:
        whole, looked = post.normalised, hits[:_MAX_TURNED]
        kept = [hit for hit in looked if not turned(quote, whole.source, whole.to_source(*hit))]
        post.straight[quote] = hits if len(kept) == len(looked) else kept
    return post.straight[quote]


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


def _common(explanation: Normalised, post: _Post, claimed: np.ndarray) -> list[tuple[Span, list[Span]]]:
    """Maximal common substrings, longest first, outside the normalised positions already ``claimed``."""
    text = explanation.text
    length = [*post.index.runs(["" if taken else char for char, taken in zip(text, claimed, strict=True)]), 0]
    ends = [i for i in range(len(text)) if length[i] and length[i + 1] != length[i] + 1]
    left, right = _word_borders(explanation)
    free = ~claimed
    ahead, back = _Next(claimed), _Next(claimed[::-1])
    found, budget = [], _ALL_LETTERS
    informative: dict[str, bool] = {}
    for i in sorted(ends, key=lambda i: (-length[i], i)):
        a, b = ahead(i + 1 - length[i]), len(text) - back(len(text) - i - 1)
        if a >= b:
            continue
        a = left[a]
        b = right[b] if a < b else b
        if a >= b or not free[a:b].all():
            continue
        span = explanation.to_source(a, b)
        budget -= b - a
        look = explanation.source[span[0] : min(span[1], span[0] + _LOOK)]
        if look not in informative:
            informative[look] = _informative(look)
        if budget < 0 or not informative[look]:
            continue
        hits = post.occurrences(text[a:b])
        if hits:
            free[a:b] = False
            ahead.close(a, b)
            back.close(len(text) - b, len(text) - a)
            found.append(((a, b), hits))
    return found


def _word_borders(text: Normalised) -> tuple[list[int], list[int]]:
    """For each normalised position the next one where a phrase may begin, and the last one where it may end."""
    size = len(text.text)
    begins = [not text.splits(a) and not cuts_word(text.source, int(text.start[a])) for a in range(size)] + [True]
    ends = [True] + [
        not text.splits(b) and not cuts_word(text.source, int(text.end[b - 1])) for b in range(1, size + 1)
    ]
    left, right = list(range(size + 1)), list(range(size + 1))
    for at in range(size - 1, -1, -1):
        left[at] = at if begins[at] else left[at + 1]
    for at in range(1, size + 1):
        right[at] = at if ends[at] else right[at - 1]
    return left, right


class _Next:
    """The first open position at or after a given one, while positions are closed (disjoint sets, halving paths)."""

    def __init__(self, closed: np.ndarray) -> None:
        self._after = [at + 1 if shut else at for at, shut in enumerate(closed.tolist())] + [len(closed)]

    def __call__(self, at: int) -> int:
        after = self._after
        while after[at] != at:
            after[at] = after[after[at]]
            at = after[at]
        return at

    def close(self, start: int, stop: int) -> None:
        """Closes [start, stop)."""
        for at in range(start, stop):
            self._after[at] = stop


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
    source, where = normalise(explanation), _Post(post)
    target = where.normalised
    found: list[tuple[Span, tuple[Span, ...], str, float]] = []
    claimed = np.zeros(len(source.text), bool)
    merged: dict[int, tuple[list[Span], tuple[Span, ...]]] = {}

    def add(span: Span, hits: list[Span], kind: str, score: float) -> None:
        a, b = source.from_source(*span)
        claimed[a:b] = True
        if id(hits) not in merged:  # the same phrase again; ``hits`` is kept with it, so that its id stays its own
            merged[id(hits)] = hits, merge_spans(target.to_source(x, y) for x, y in hits)
        found.append((span, merged[id(hits)][1], kind, score))

    for a, b in _quotes(explanation):
        query = normalise(explanation[a:b]).text
        if not query:
            continue
        score, hits = _find_quote(explanation[a:b], where)
        if hits or not (query in elsewhere or (score < FUZZY_ACCEPT and term(explanation, (a, b)))):
            add((a, b), hits, "quote", round(score, 4))
    for verb in _CUE_VERBS.finditer(explanation):
        stop = _CLAUSE_END.search(explanation, verb.end(), verb.end() + _MAX_CUE_CHARS)
        span = (verb.end(), stop.start() if stop else min(len(explanation), verb.end() + _MAX_CUE_CHARS))
        a, b = source.from_source(*span)
        if a >= b or claimed[a:b].any() or not _informative(explanation[span[0] : span[1]]):
            continue
        score, hits = where.find(source.text[a:b])
        if hits:
            add(source.to_source(a, b), hits, "cue", round(score, 4))
    for (a, b), hits in _common(source, where, claimed):
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


def turned_quotes(citations: Iterable[Citation]) -> int:
    """Quotes that are in the post but for a negation."""
    return sum(c.kind == "quote" and not c.post_char and c.score >= FUZZY_ACCEPT for c in citations)


def coverage(citations: Iterable[Citation], length: int) -> float:
    """Share of the ``length`` characters of an explanation that lie in grounded citations; 0.0 for an empty one."""
    grounded = merge_spans(citation.expl_char for citation in citations if citation.post_char)
    return sum(b - a for a, b in grounded) / length if length else 0.0
