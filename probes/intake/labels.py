"""The label and the explanation of an answer, read by rule where nobody gives them."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping

from probes.intake.denied import denied
from probes.models.encode import after_reasoning, inside_word, places_of
from probes.records import Span

_OPENING = " \t\r\n.,:;!?-–—*#|。，：；！？、>）)」』”\"'"  # what may stand between a label and its explanation

_ASKED = re.compile(r"[*_\"'”’」 ]{0,4}[?？]")
_MOST_PLACES = 100  # of a label, that are looked at for a denial
# What makes the digits behind it, or before it, a part of another number.
_NUMBER_BEFORE = re.compile(r"(?:\d|\d[.,:/٫٬–~～-]|(?<!\w)[-−.])$")
_NUMBER_AFTER = re.compile(r"\d|[.,:/٫٬–~～-]\d|[\s'’]\d{3}(?!\d)|\s?[%％‰]")


def read_label(answer: str, candidates: Mapping[str, str]) -> tuple[str | None, Span | None]:
    """The one candidate that an answer states, and where.

    The rule: after the reasoning, in the first line that is not empty, else in all of it: the candidate whose sentence
    stands there, in any case and with or without its last punctuation; where no sentence does, whose key does. Several
    are none: a rule cannot tell "not high but low" from its opposite. Nor is one that is denied or doubted anywhere in
    those lines (``denied``), or asked for where it stands first; it does not make another one the answer either.

    Returns:
        key and span in ``answer``; (None, None) where no candidate or several are stated, or one is denied.
    """
    begin = after_reasoning(answer)
    line = _first_line(answer, begin)
    scopes = [(begin, len(answer))] if line is None else [line, (begin, len(answer))]
    for scope in scopes:
        for wanted in (candidates, {key: key for key in candidates}):
            found = {key: span for key, text in wanted.items() if (span := find_label(answer, text, scope)) is not None}
            # "risk" inside "no risk" is no statement of its own
            found = {k: s for k, s in found.items() if not any(_within(s, other) for other in found.values())}
            if len(found) == 1:
                key, span = next(iter(found.items()))
                places = itertools.islice(_places(answer, wanted[key], scope), _MOST_PLACES)
                if _ASKED.match(answer, span[1]) or any(denied(answer, place) for place in places):
                    return None, None
                return key, span
            if found:
                return None, None
    return None, None


def _first_line(text: str, begin: int) -> Span | None:
    """The first line that is not empty."""
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        if text[begin:end].strip():
            return begin, end
        begin = end + 1
    return None


def find_label(answer: str, text: str, scope: Span) -> Span | None:
    """The first place of a label's text in ``answer[scope]`` that is not inside a longer word or number; in any
    case."""
    return next(_places(answer, text, scope), None)


def _places(answer: str, text: str, scope: Span) -> Iterator[Span]:
    """Every place, with the text's last punctuation; where it has none with it, without."""
    end = len(text)
    while end and unicodedata.category(text[end - 1]).startswith("P"):
        end -= 1
    said = _one_case(answer[scope[0] : scope[1]])
    for part in dict.fromkeys((text, text[:end])):
        wanted, found = _one_case(part), False
        if not part.strip() or wanted not in said:
            continue
        for at in places_of(wanted, said):
            span = scope[0] + at, scope[0] + at + len(part)
            if not inside_word(answer, *span) and not _inside_number(answer, *span):
                found = True
                yield span
        if found:
            return


def _inside_number(text: str, start: int, end: int) -> bool:
    """Whether the digits that ``text[start:end]`` begins or ends with go on: 1 in 1.5, 10, 1,000, 1/2 or -1."""
    before = text[start].isdigit() and _NUMBER_BEFORE.search(text[max(0, start - 3) : start])
    return bool(before or (text[end - 1].isdigit() and _NUMBER_AFTER.match(text, end)))


@functools.lru_cache(maxsize=4)  # of an answer every candidate is looked for
def _one_case(text: str) -> str:
    """In lower case, every character at its place."""
    return text.lower() if text.isascii() else "".join(low if len(low := c.lower()) == 1 else c for c in text)


def read_explanation(answer: str, label: Span | None) -> str | None:
    """What follows the label; where nothing does, what stands before it, after the reasoning. None without a label, and
    where there is not a word of it."""
    if label is None:
        return None
    after = answer[label[1] :].lstrip(_OPENING).rstrip()
    before = answer[after_reasoning(answer) : label[0]].strip()
    found = after if any(char.isalnum() for char in after) else before
    return found if sum(char.isalnum() for char in found) > 1 else None


def _within(span: Span, other: Span) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]
