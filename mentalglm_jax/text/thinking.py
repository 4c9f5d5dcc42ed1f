"""What a model thinks before it answers, in the marks of whoever made it. ``probes.models.encode`` has the same marks
(the packages do not import each other; a test compares them)."""

import re

# What opens thinking and what ends it. Templates often write the first themselves, so an end alone counts as well.
_TAGS = r"think(?:ing)?|thoughts?|reasoning|seed:think"
OPENED = (
    rf"<(?:{_TAGS})(?:\s[^<>]*)?>|\[think\]|◁think▷|<\|thinking\|>|<\|start_thinking\|>|"
    r"<\|(?:begin|start)_of_(?:thinking|thought)\|>|<\|channel>thought|<unused94>thought|<\|channel\|>analysis<\|message\|>"
)
CLOSED = (
    rf"</(?:{_TAGS})>|\[/think\]|◁/think▷|<\|/thinking\|>|<\|end_thinking\|>|<\|end_of_(?:thinking|thought)\|>|"
    r"<channel\|>|<unused95>|<\|channel\|>final<\|message\|>"
)
_OPENED, _CLOSED = re.compile(rf"\s*(?:{OPENED})", re.IGNORECASE), re.compile(CLOSED, re.IGNORECASE)
# Around an answer alone: GLM-4.1V-Thinking and others.
_WRAPS = (("<answer>", "</answer>"), ("<|begin_of_box|>", "<|end_of_box|>"))


def spoken_span(text: str) -> tuple[int, int]:
    """Where the answer is, without white space at its ends: behind the end of the thinking that a mark opens, or behind
    an end alone; inside what wraps an answer. Empty where thinking never ends."""
    closed = _CLOSED.search(text)
    if closed is None and _OPENED.match(text):
        return len(text), len(text)
    start = closed.end() if closed else 0
    start, end = _stripped(text, start, len(text))
    for before, behind in _WRAPS:
        if text.startswith(before, start, end):
            start += len(before)
            return _stripped(text, start, end - len(behind) if text.endswith(behind, start, end) else end)
    return start, end


def spoken(text: str) -> str:
    """The answer without the thinking before it."""
    return text[slice(*spoken_span(text))]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    start = end - len(part.lstrip())
    return start, max(start, start + len(part.strip()))
