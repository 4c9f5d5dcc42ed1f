"""Contact details in a text: found, counted and replaced by placeholders. Rules for Chinese and English posts; they
look for what identifies a person or opens a line to one, and rather take too much than too little."""

import bisect
import heapq
import re
from collections.abc import Iterator
from dataclasses import replace

from mentalglm_jax.data.records import Record, Span

# Kind -> pattern; earlier kinds win where two overlap. A messenger counts only with an account name behind it.
PATTERNS: dict[str, re.Pattern[str]] = {
    "email": re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+", re.ASCII),
    "url": re.compile(r"(?:https?://|www\.)[^\s<>\"'，。；、（）]+", re.IGNORECASE | re.ASCII),  # and see _urls
    "html": re.compile(r"</?(?:a|b|br|div|em|font|i|img|li|p|span|strong|ul)(?:\s[^<>]{0,500})?/?>", re.IGNORECASE),
    "messenger": re.compile(
        r"(?:(?:qq群?|扣扣|企鹅号?|微信号?|weixin|vx|v信|薇信)[^\w\n]{0,3}(?:号码?|群|是|加我?)?[^\w\n]{0,3}"
        r"|(?:wechat|telegram|snapchat|discord|whatsapp|kik)\s{0,2}(?:(?:id|name|username)\s{0,2})?(?:[:=：]|is)\s{0,2})"
        r"(?P<account>(?!account\])[a-z0-9][\w-]{4,24})",
        re.IGNORECASE | re.ASCII,
    ),
    "handle": re.compile(r"(?<![A-Za-z0-9_.])@[\w\-\u4e00-\u9fff]{2,30}|(?<![\w/])/?u/[\w-]{3,24}"),
    "phone": re.compile(r"(?<![\d.])(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)|"
                        r"(?<![\d.])0\d{2,3}-\d{7,8}(?!\d)|"
                        r"(?<![\d.])(?:\+?1[ .-]?)?\(?[2-9]\d{2}\)?[ .-]\d{3}[ .-]\d{4}(?!\d)"),
}  # fmt: skip
_CHAIN = re.compile(r"(?<![\w-])[\w-]++(?:\.[\w-]++)+", re.ASCII)
_END = re.compile(r"(?:com|cn|net|org|me)\b", re.IGNORECASE | re.ASCII)
_REST = re.compile(r"[^\s<>\"'，。]*")
_LONGEST_LABEL = 63
MENTION = re.compile(r"qq|扣扣|微信|wechat", re.IGNORECASE)
PLACEHOLDERS = {"email": "[email]", "url": "[url]", "html": "", "messenger": "[account]", "handle": "[user]",
                "phone": "[phone]"}  # fmt: skip


def find_contacts(text: str) -> list[tuple[str, Span]]:
    """(kind, [start, end) characters) of each contact detail, in order, none overlapping another."""
    taken: list[tuple[Span, str]] = []  # sorted, apart: time stays linear in the text, but for the sorting
    for kind, pattern in PATTERNS.items():
        fresh: list[tuple[Span, str]] = []
        for start, end in _urls(text) if kind == "url" else _spans(kind, pattern, text):
            at = bisect.bisect_left(taken, ((start, start), ""))
            before = at == 0 or taken[at - 1][0][1] <= start
            if before and (at == len(taken) or taken[at][0][0] >= end):
                fresh.append(((start, end), kind))
        taken = sorted([*taken, *fresh])
    return [(kind, span) for span, kind in taken]


def _spans(kind: str, pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    group = "account" if kind == "messenger" else 0
    return (match.span(group) for match in pattern.finditer(text))


def _urls(text: str) -> Iterator[Span]:
    """Addresses, from the left, each character looked at a few times: one pattern for all would try every label of a
    long chain anew. An address without http:// goes from its first label over a well-known end to what cannot follow.
    """
    at = 0
    hosts = (match.start() + start for match in _CHAIN.finditer(text) if (start := _host(match[0])) is not None)
    whole = (match.span() for match in PATTERNS["url"].finditer(text))
    for start, end in heapq.merge(whole, ((start, -1) for start in hosts)):
        if start >= at:
            at = end if end > 0 else _REST.match(text, start).end()  # type: ignore[union-attr]
            yield start, at


def _host(chain: str) -> int | None:
    """Where the address in a chain of labels begins, if there is one: at the edge of a word, labels not too long."""
    place, first = 0, None
    for label in chain.split("."):
        if first is not None and _END.match(label):
            return first
        begin = max(0, len(label) - _LONGEST_LABEL)
        if first is None or begin:
            edges = (at for at in range(begin, len(label)) if (label[at] == "-") != (at == 0 or label[at - 1] == "-"))
            first = next((place + at for at in edges), None)
        place += len(label) + 1
    return None


def scrub(text: str) -> str:
    """``text`` with each contact detail replaced by what it was: ``[phone]``, ``[user]`` and so on; HTML tags go."""
    return _scrubbed(text)[0]


def scrub_record(record: Record) -> Record:
    """The record with post and explanation scrubbed; cues and decoys are moved to where their words now stand, and one
    that overlaps a contact detail covers the placeholder."""
    post, edits = _scrubbed(record.post)

    def moved(spans: tuple[Span, ...] | None) -> tuple[Span, ...] | None:
        if spans is None:
            return None
        places = [(_place(edits, start, False), _place(edits, end, True)) for start, end in spans]
        return tuple((start, end) for start, end in places if start < end)

    explanation = None if record.explanation is None else scrub(record.explanation).strip() or None
    kept = post if post.strip() else "[removed]"
    return replace(record, post=kept, explanation=explanation, cues=moved(record.cues), decoys=moved(record.decoys),
                   rationales=moved(record.rationales))  # fmt: skip


def _scrubbed(text: str) -> tuple[str, list[tuple[Span, Span]]]:
    """The new text, and for each replacement its place in the old and in the new text."""
    parts, edits, done, length = [], [], 0, 0
    for kind, (start, end) in find_contacts(text):
        word = PLACEHOLDERS[kind]
        parts += [text[done:start], word]
        length += start - done
        edits.append(((start, end), (length, length + len(word))))
        length += len(word)
        done = end
    return "".join([*parts, text[done:]]), edits


def _place(edits: list[tuple[Span, Span]], at: int, is_end: bool) -> int:
    index = bisect.bisect_right(edits, at, key=lambda edit: edit[0][1])  # the edits that end at or before ``at``
    if index < len(edits):
        (start, _), (new_start, new_end) = edits[index]
        if at > start or (at == start and not is_end):
            return new_end if is_end else new_start
    return at + (edits[index - 1][1][1] - edits[index - 1][0][1] if index else 0)
