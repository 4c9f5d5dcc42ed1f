"""From a row of generations.jsonl to an ``Example``: exact bytes of every token, and where post, label, reasons lie.

The generated ids are taken as they are. Re-tokenising the generated text may give other ids than the model wrote, and
then every score would be of a sequence the model never saw.
"""

import bisect
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError, RowRefused
from probes.foreign import BOM, parse_json, plain, read_bytes
from probes.models.token_bytes import TokenBytes, decode_bytes
from probes.records import Example, Segment, Span, comparable, somebody

MAX_GENERATIONS_BYTES = 4 << 30  # of one file, which is held in memory
MOST_TOKENS, MOST_BYTES = 1 << 20, 4 << 20  # of a row, prompt and answer: more than any model reads
MOST_MARKED = 100  # times its length: cues and the like of a post
_MAX_ID = 2**31 - 1

_REQUIRED: dict[str, type | tuple[type, ...]] = {"id": (str, int), "post": str, "prompt_ids": list, "output_ids": list}
_QUOTES = frozenset("\"'“”‘’「」『』《》")
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "question": str,
    "parsed_label": (str, list),
    "parsed_explanation": str,
    "label_text": str,
    "label_span": list,
    "candidates": dict,
    "cues": list,
    "decoys": list,
    "rationales": list,
    "finish": str,
    "drawn": int,
    "user": (str, int),
    "pair": (str, int),
    "reasoning": str,
    "hint": str,
    "post_span": list,
}
# What opens a model's reasoning, and what ends it; the answer follows the last of them. mentalglm_jax.text.thinking has
# the same marks (the packages do not import each other; a test compares them).
_TAGS = r"think(?:ing)?|thoughts?|reasoning|seed:think"
OPENED = (
    rf"<(?:{_TAGS})(?:\s[^<>]*)?>|\[think\]|◁think▷|<\|thinking\|>|<\|start_thinking\|>|"
    r"<\|(?:begin|start)_of_(?:thinking|thought)\|>|<\|channel>thought|<unused94>thought|<\|channel\|>analysis<\|message\|>"
)
CLOSED = (
    rf"</(?:{_TAGS})>|\[/think\]|◁/think▷|<\|/thinking\|>|<\|end_thinking\|>|<\|end_of_(?:thinking|thought)\|>|"
    r"<channel\|>|<unused95>|<\|channel\|>final<\|message\|>"
)
_OPENED, _THOUGHT = re.compile(OPENED, re.IGNORECASE), re.compile(CLOSED, re.IGNORECASE)
_TAIL = 80  # characters at a prompt's end in which reasoning may be opened, and closed again


def read_generations(path: str | Path) -> list[dict[str, Any]]:
    """Reads generations.jsonl.

    Returns:
        one dict per non-empty line, in file order, with at least ``id, post, prompt_ids, output_ids``.
    Raises:
        ProbeInputError: ``file:line: reason`` for the first line that cannot be used; or the file cannot be read.
    """
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_bytes(path, MAX_GENERATIONS_BYTES).removeprefix(BOM).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ProbeInputError(f"{where}: a JSON {type(row).__name__}, not an object")
        problem = _format_problem(row)
        if problem:
            raise ProbeInputError(f"{where}: {problem}")
        if str(row["id"]) in seen:
            raise ProbeInputError(
                f"{where}: id {row['id']!r} was used on line {seen[str(row['id'])]}; ids must be unique"
            )
        seen[str(row["id"])] = number
        rows.append(row)
    if not rows:
        raise ProbeInputError(f"{path}: no rows; write it with `mentalglm generate`")
    return rows


def _format_problem(row: dict[str, Any]) -> str | None:
    """Why a row is not of this format at all: then the file is another kind of file."""
    for key, kind in _REQUIRED.items():
        if key not in row:
            return f"key {key!r} is missing"
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            return f"key {key!r} has type {type(row[key]).__name__}"
    for key, kind in OPTIONAL.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            return f"key {key!r} has type {type(row[key]).__name__}"
    for key in ("prompt_ids", "output_ids"):
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in row[key]):
            return f"key {key!r} must hold non-negative integers only"
        if max(row[key], default=0) > _MAX_ID:
            return f"key {key!r} holds {plain(max(row[key]), 40)}, which no vocabulary has"
    spans = [(key, row.get(key) or ()) for key in ("cues", "decoys", "rationales")]
    spans += [(key, [] if row.get(key) is None else [row[key]]) for key in ("post_span", "label_span")]
    for key, given in spans:
        for span in given:
            if not (isinstance(span, list) and len(span) == 2 and all(type(at) is int for at in span)):
                return f"key {key!r}: {plain(span, 60)} is not a [start, end)"
    if not all(isinstance(text, str) and text for text in (row.get("candidates") or {}).values()):
        return "key 'candidates' must map each label to its sentence"
    if isinstance(row.get("parsed_label"), list) and not all(isinstance(one, str) for one in row["parsed_label"]):
        return "key 'parsed_label' must hold labels only"
    return None


def _refuse_content(row: dict[str, Any], row_id: str) -> None:
    """Refuses a row of the right format with which nothing can be done."""
    for key, reason in (("prompt_ids", "no prompt"), ("output_ids", "no answer")):
        if not row[key]:
            raise RowRefused(row_id, f"key {key!r} is empty", reason)
    if (count := len(row["prompt_ids"]) + len(row["output_ids"])) > MOST_TOKENS:
        said = f"{count} tokens, which no model reads; a row has at most {MOST_TOKENS}"
        raise RowRefused(row_id, said, "more tokens than a model reads")
    if not row["post"].strip():
        raise RowRefused(row_id, "the post is empty", "the post is empty")
    for key in ("cues", "decoys", "rationales"):
        for a, b in row.get(key) or ():
            if not 0 <= a < b <= len(row["post"]):
                said = f"key {key!r}: [{a}, {b}] is not inside the post of {len(row['post'])} characters"
                raise RowRefused(row_id, said, f"{key} outside the post")
        if sum(b - a for a, b in row.get(key) or ()) > MOST_MARKED * len(row["post"]):
            said = f"key {key!r} marks the post more than {MOST_MARKED} times over"
            raise RowRefused(row_id, said, f"{key} mark the post many times")


def encode(row: dict[str, Any], token_bytes: TokenBytes) -> Example:
    """Lays out one row.

    The post is where ``post_span`` says (characters ``[start, end)`` of the decoded prompt), else it is found in the
    decoded prompt by exact match, as the tokenizer reads it: one that normalises (NFC, NFKC, lower case) changes the
    post, and the spans in it with it. It may repeat words of the template, and the question may
    repeat words of the post; of several places those that end before the question are preferred, of these the ones
    between quotation marks, of these the last.

    Raises:
        RowRefused: ``row 'id': ...``: nothing can be done with this row, say because its post is not in its prompt.
        ProbeInputError: a key is missing or has the wrong type, so that it is no row of such a file.
    """
    row_id = str(row.get("id"))
    problem = _format_problem(row)
    if problem:
        raise ProbeInputError(f"row {row_id!r}: {problem}")
    _refuse_content(row, row_id)
    _refuse_padding(row, row_id, token_bytes.tokenizer)
    ids = [*row["prompt_ids"], *row["output_ids"]]
    prompt_len = len(row["prompt_ids"])
    known = {index: token_bytes(index) for index in set(ids)}
    pieces = [known[index] for index in ids]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    if ends[-1] > MOST_BYTES:
        said = f"{ends[-1]} bytes of text, at most {MOST_BYTES} are read"
        raise RowRefused(row_id, said, "more text than a model reads")
    byte_spans = list(itertools.pairwise(ends))
    data = b"".join(pieces)
    text, char_bytes = decode_bytes(data)
    prompt_chars = sum(offset < ends[prompt_len] for offset in char_bytes[:-1])

    row = _as_read(row, text[:prompt_chars], token_bytes)
    post_char = _find_post(row, text[:prompt_chars], row_id, token_bytes)
    spans: dict[str, Span] = {}
    label_text = row.get("label_text") or ""
    placed = _placed_label(row, text, prompt_chars) if label_text else None
    answer, thought = _answer(row, text, prompt_chars, placed)
    if label_text:
        spans["label"] = placed or _find_label(text, label_text, answer, row_id)
    explanation = row.get("parsed_explanation") or None
    if explanation:
        # After the label if it is there at all: the label sentence may itself hold the words of a short explanation.
        # The reasoning before the answer may be the explanation; the answer is looked at first.
        after = spans["label"][1] if "label" in spans and explanation in text[spans["label"][1] :] else answer
        after = after if explanation in text[after:] else prompt_chars
        spans["explanation"] = _find(text, explanation, after, row_id, "parsed_explanation")
        # Explanation first: the label follows, whatever it says.
        if "label" in spans and not placed and spans["explanation"][0] < spans["label"][1]:
            at = text.find(label_text, spans["explanation"][1])
            spans["label"] = (at, at + len(label_text)) if at >= 0 else spans["label"]
    said = spans.get("explanation")
    if thought is not None and not (said and said[0] < thought[1] and thought[0] < said[1]):
        spans["reasoning"] = thought  # an explanation that stands in it is what is asked, and comes first as well

    segments = _segments(data, byte_spans, char_bytes, prompt_len, post_char, spans)
    if not any(segment.name == "post" for segment in segments):
        raise RowRefused(
            row_id,
            f"no token lies wholly inside the post of {len(row['post'])} characters: each also holds characters of the "
            "prompt around it, and cannot be taken away without them",
            "no token wholly inside the post",
        )
    label = row.get("parsed_label") or ""
    made = Example(
        id=row_id,
        task=row.get("task") or "",
        post=row["post"],
        ids=tuple(ids),
        prompt_len=prompt_len,
        byte_spans=tuple(byte_spans),
        char_bytes=tuple(char_bytes),
        segments=segments,
        post_char=post_char,
        text=text,
        label=label if isinstance(label, str) else ",".join(label),
        label_text=label_text,
        candidates=dict(row.get("candidates") or {}),
        explanation=explanation,
        cues=_spans(row.get("cues")),
        decoys=_spans(row.get("decoys")),
        rationales=_spans(row.get("rationales")),
        user=somebody(row.get("user")),
        pair=somebody(row.get("pair")),
        hint=_find_hint(row, text[:prompt_chars], post_char, row_id),
    )
    own = comparable(label_text)
    stated = [key for key, said in made.candidates.items() if label_text and comparable(said) == own]
    if stated and made.label in made.candidates and made.label not in stated:
        raise RowRefused(
            row_id,
            f"parsed_label is {made.label!r} but label_text is the sentence of {stated[0]!r}; write both of one label",
            "parsed_label and label_text are of two labels",
        )
    return made


def _answer(row: dict[str, Any], text: str, prompt_chars: int, placed: Span | None = None) -> tuple[int, Span | None]:
    """Where the answer begins in ``text``: after the reasoning, which may state every label before it decides; and
    where the words of the reasoning stand, without its marks, or None.

    Reasoning is opened by a mark that the output begins with, or that the prompt ends with and has not closed again (a
    template that switches thinking off writes both). Its end is the last mark after which the label still stands:
    an explanation may quote one.

    Raises:
        RowRefused: the reasoning never ends, or the label stands in it only.
    """
    output, tail = text[prompt_chars:], text[max(0, prompt_chars - _TAIL) : prompt_chars]
    closed = max((match.end() for match in _THOUGHT.finditer(tail)), default=0)
    opened = _OPENED.search(tail, closed) or _OPENED.match(output.lstrip())
    closings = [match.span() for match in _THOUGHT.finditer(output)]
    ends = [end for _, end in closings]
    reasoning = row.get("reasoning") or ""
    if reasoning and reasoning in output:
        ends.append(output.index(reasoning) + len(reasoning))
    label = row.get("label_text") or ""
    if not ends and opened and label:
        raise RowRefused(
            str(row.get("id")),
            f"the reasoning ({opened.group()}) never ends, so there is no answer to score; generate with a larger "
            "limit, or set label_text to null",
            "the reasoning never ends",
        )
    last = output.rfind(label) if placed is None else placed[0] - prompt_chars
    answer = max((end for end in ends if end <= last), default=0)
    if label and label in output and ends and answer == 0 and (opened or reasoning):
        raise RowRefused(
            str(row.get("id")),
            "label_text stands in the reasoning only, not in the answer after it; parse the answer again",
            "label_text stands in the reasoning only",
        )
    begin = output.index(reasoning) if reasoning and reasoning in output else None
    stop = answer if begin is None else begin + len(reasoning)
    if begin is None and answer:
        stop = next(low for low, high in closings if high == answer)
        mark = _OPENED.match(output.lstrip())
        begin = 0 if mark is None else len(output) - len(output.lstrip()) + mark.end()
    words = "" if begin is None else output[begin:stop]
    if begin is None or stop > answer or not words.strip():
        return prompt_chars + answer, None
    begin += len(words) - len(words.lstrip())
    return prompt_chars + answer, (prompt_chars + begin, prompt_chars + begin + len(words.strip()))


def _find_hint(row: dict[str, Any], prompt: str, post: Span, row_id: str) -> Span | None:
    """The last place of the hint in the prompt outside the post, else in the post."""
    hint = row.get("hint") or ""
    if not hint:
        return None
    places = [(at, at + len(hint)) for at in places_of(hint, prompt)]
    if not places:
        raise RowRefused(row_id, "hint is not in the prompt as it stands", "the hint is not in the prompt")
    return ([one for one in places if one[1] <= post[0] or one[0] >= post[1]] or places)[-1]


def after_reasoning(answer: str) -> int:
    """Where the answer proper begins: after the last mark that ends a reasoning, else 0."""
    return max((match.end() for match in _THOUGHT.finditer(answer)), default=0)


def marks_reasoning(token: str) -> bool:
    """Whether a token opens or ends a reasoning."""
    return (_OPENED.fullmatch(token.strip()) or _THOUGHT.fullmatch(token.strip())) is not None


def _placed_label(row: dict[str, Any], text: str, prompt_chars: int) -> Span | None:
    """Where ``label_span``, characters ``[start, end)`` of the decoded answer, says that the label stands."""
    if (span := row.get("label_span")) is None:
        return None
    placed = prompt_chars + span[0], prompt_chars + span[1]
    if span[0] < 0 or text[slice(*placed)] != row["label_text"]:
        said = f"label_span {span} of the decoded answer is not label_text; mend it or leave it out"
        raise RowRefused(str(row.get("id")), said, "label_span is not where the label stands")
    return placed


def _find_label(text: str, label: str, start: int, row_id: str) -> Span:
    """The first place of the label from ``start`` on; not inside a longer word ("low" in "following") if it can be."""
    first = _find(text, label, start, row_id, "label_text")
    if not inside_word(text, *first):
        return first
    places = (at + start for at in places_of(label, text[start:]))
    at = next((at for at in places if not inside_word(text, at, at + len(label))), first[0])
    return at, at + len(label)


def _joined(left: str, right: str) -> bool:
    return all(char.isalnum() and unicodedata.east_asian_width(char) not in "WF" for char in (left, right))


def inside_word(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]`` is part of a longer word, in scripts that write words apart."""

    before = start > 0 and _joined(text[start - 1], text[start])
    return before or (end < len(text) and _joined(text[end - 1], text[end]))


def _refuse_padding(row: dict[str, Any], row_id: str, tokenizer: Any) -> None:
    """Pad tokens on the left were hidden from the model by a mask that the row does not hold.

    One token that opens every text of this tokenizer as well as it pads is no padding; the same one twice is, whatever
    the tokenizer calls it: a client may have padded with the end-of-sequence token for generation only.
    """
    pad, ids = getattr(tokenizer, "pad_token_id", None), row["prompt_ids"]
    count = next((at for at, index in enumerate(ids) if index != ids[0]), len(ids))
    opens = ids[0] in (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None))
    special = ids[0] == pad or ids[0] in (getattr(tokenizer, "all_special_ids", None) or ())
    if (special and count > 1) or (ids[0] == pad and not opens):
        raise RowRefused(
            row_id,
            f"prompt_ids begin with {count} pad tokens (id {ids[0]}); leave them out: the model did not see them",
            "prompt_ids begin with pad tokens",
        )


def _spans(value: Sequence[Sequence[int]] | None) -> tuple[Span, ...] | None:
    return None if value is None else tuple((int(a), int(b)) for a, b in value)


def _as_read(row: dict[str, Any], prompt: str, token_bytes: TokenBytes) -> dict[str, Any]:
    """The row with its post, and the spans in it, as a tokenizer that normalises reads them; the same row where the
    post stands in the prompt as it is, or cannot be followed."""
    post = row["post"]
    if post in prompt or not token_bytes.rules():
        return row
    reading = token_bytes.reads(post)
    if reading is None or not reading.text.strip() or reading.text not in prompt:
        return row
    spans = {key: row[key] for key in ("cues", "decoys", "rationales") if row.get(key) is not None}
    moved = {key: [reading.span((a, b)) for a, b in given] for key, given in spans.items()}
    return row | {"post": reading.text, **{key: [[a, b] for a, b in one if a < b] for key, one in moved.items()}}


def _find_post(row: dict[str, Any], prompt: str, row_id: str, token_bytes: TokenBytes) -> Span:
    post, span = row["post"], row.get("post_span")
    if span is not None:
        if prompt[slice(*span)] != post or span[0] < 0:
            said = f"post_span {span} of the decoded prompt is not the post"
            raise RowRefused(row_id, said, "post_span is not where the post stands")
        return span[0], span[1]
    starts = list(places_of(post, prompt))
    if not starts:
        why, reason = "was it cut or rewritten before generation?", "the post is not in the prompt"
        if rules := token_bytes.rules():
            why = f"the tokenizer normalises what it reads ({rules}): give the post as its tokens read"
            reason = "the tokenizer normalises the post"
        elif token_bytes.kind != "byte-level":
            why = (
                f"was it cut or rewritten, or did the tokenizer ({token_bytes.kind}) lose spaces, case or unknown "
                "characters? Give the post as its tokens read"
            )
        raise RowRefused(row_id, f"the post is not in the prompt as it stands; {why}", reason)
    question = prompt.rfind(row["question"]) if row.get("question") else len(prompt)
    starts = [start for start in starts if start + len(post) <= question] or starts
    quoted = [start for start in starts if _QUOTES.issuperset(_around(prompt, start, len(post)))]
    start = (quoted or starts)[-1]
    return start, start + len(post)


def places_of(part: str, text: str) -> Iterator[int]:
    """Every start of ``part`` in ``text``, overlapping ones too, in linear time (Knuth, Morris and Pratt 1977)."""
    borders, k = [0] * len(part), 0
    for i in range(1, len(part)):
        while k and part[i] != part[k]:
            k = borders[k - 1]
        k += part[i] == part[k]
        borders[i] = k
    k = 0
    for i, char in enumerate(text):
        while k and (k == len(part) or char != part[k]):
            k = borders[k - 1]
        k += char == part[k]
        if k == len(part):
            yield i + 1 - k


def _around(prompt: str, start: int, length: int) -> str:
    """The characters before and after a stretch, a space where there is none."""
    padded = f" {prompt} "
    return padded[start] + padded[start + length + 1]


def _find(text: str, part: str, start: int, row_id: str, key: str) -> Span:
    at = text.find(part, start)
    if at < 0:
        raise RowRefused(row_id, f"{key} is not in the decoded output_ids", f"{key} is not in the output")
    return at, at + len(part)


def _fused(token: bytes, before: int, after: int) -> bool:
    """Whether a token that reaches into the post also holds some of the template.

    A space in front does not count: word tokens carry the space before the word.

    Args:
        before, after: bytes of it before and after the post; not positive where it lies inside.
    """
    return after > 0 or bool(token[: max(before, 0)].strip(b" "))


def _segments(
    data: bytes,
    byte_spans: Sequence[Span],
    char_bytes: Sequence[int],
    prompt_len: int,
    post: Span,
    spans: dict[str, Span],
) -> tuple[Segment, ...]:
    begin, stop = char_bytes[post[0]], char_bytes[post[1]]
    names = []
    for index, (a, b) in enumerate(byte_spans):
        if index < prompt_len:
            inside = a < stop and b > begin
            names.append(("border" if _fused(data[a:b], begin - a, b - stop) else "post") if inside else "template")
            continue
        inside = (name for name, (s, e) in spans.items() if char_bytes[s] <= a < char_bytes[e])
        names.append(next(inside, None) or _straddled(a, b, char_bytes, spans))
    exact = {"post": post, **spans}
    segments, start = [], 0
    for index in range(1, len(names) + 1):
        if index < len(names) and names[index] == names[start]:
            continue
        loose = (_char_at(char_bytes, byte_spans[start][0]), _char_at(char_bytes, byte_spans[index - 1][1]))
        segments.append(Segment(names[start], (start, index), exact.get(names[start], loose)))
        start = index
    return tuple(segments)


def _straddled(a: int, b: int, char_bytes: Sequence[int], spans: dict[str, Span]) -> str:
    """A token that begins before a segment and reaches into it (a leading space) opens that segment."""
    return next((name for name, (s, _) in spans.items() if a < char_bytes[s] < b), "other")


def _char_at(char_bytes: Sequence[int], offset: int) -> int:
    """The character holding byte ``offset``."""
    return bisect.bisect_right(char_bytes, offset) - 1
