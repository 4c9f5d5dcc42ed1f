"""Contact details in a text: found, counted and replaced by placeholders. Rules for Chinese and English posts; they
look for what identifies a person or opens a line to one, and rather take too much than too little."""

import re
from dataclasses import replace

from mentalglm_jax.data.records import Record, Span

# Kind -> pattern; earlier kinds win where two overlap. A messenger counts only with an account name behind it.
PATTERNS: dict[str, re.Pattern[str]] = {
    "email": re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+", re.ASCII),
    "url": re.compile(r"(?:https?://|www\.)[^\s<>\"'，。；、（）]+|\b(?:[\w-]{1,63}\.)+(?:com|cn|net|org|me)\b[^\s<>\"'，。]*",
                      re.IGNORECASE | re.ASCII),
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
MENTION = re.compile(r"qq|扣扣|微信|wechat", re.IGNORECASE)
PLACEHOLDERS = {"email": "[email]", "url": "[url]", "html": "", "messenger": "[account]", "handle": "[user]",
                "phone": "[phone]"}  # fmt: skip


def find_contacts(text: str) -> list[tuple[str, Span]]:
    """(kind, [start, end) characters) of each contact detail, in order, none overlapping another."""
    taken: list[tuple[str, Span]] = []
    for kind, pattern in PATTERNS.items():
        group = "account" if kind == "messenger" else 0
        for match in pattern.finditer(text):
            start, end = match.span(group)
            if all(end <= other[0] or start >= other[1] for _, other in taken):
                taken.append((kind, (start, end)))
    return sorted(taken, key=lambda found: found[1])


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
    shift = 0
    for (start, end), (new_start, new_end) in edits:
        if at < end and (at > start or (at == start and not is_end)):
            return new_end if is_end else new_start
        if at >= end:
            shift = new_end - end
    return at + shift
