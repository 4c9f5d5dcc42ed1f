"""The label and the explanation of an answer, read by rule where nobody gives them."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping

from probes.models.encode import after_reasoning, inside_word, places_of
from probes.records import Span

_OPENING = " \t\r\n.,:;!?-–—*#|。，：；！？、>）)」』”\"'"  # what may stand between a label and its explanation


def read_label(answer: str, candidates: Mapping[str, str]) -> tuple[str | None, Span | None]:
    """The one candidate that an answer states, and where.

    The rule: after the reasoning, in the first line that is not empty, else in all of it: the candidate whose sentence
    stands there, in any case and with or without its last punctuation; where no sentence does, whose key does. Several
    are none: a rule cannot tell "not high but low" from its opposite.

    Returns:
        key and span in ``answer``; (None, None) where no candidate or several are stated.
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
                return next(iter(found.items()))
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
    """The first place of a label's text in ``answer[scope]`` that is not inside a longer word; in any case."""
    end = len(text)
    while end and unicodedata.category(text[end - 1]).startswith("P"):
        end -= 1
    said = _one_case(answer[scope[0] : scope[1]])
    for part in dict.fromkeys((text, text[:end])):
        wanted = _one_case(part)
        if not part.strip() or wanted not in said:
            continue
        for at in places_of(wanted, said):
            if not inside_word(answer, scope[0] + at, scope[0] + at + len(part)):
                return scope[0] + at, scope[0] + at + len(part)
    return None


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
