"""Rows of generations.jsonl from what a researcher has: a prompt or a conversation, an answer, and where the post is.

The prompt is tokenised as the model's clients do it: with its own tokenizer, and for a conversation with its own chat
template. What the tokens say is compared with the text; a row whose tokens say something else is left out, by reason.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError, ProbeWarning, RowRefused
from probes.foreign import BOM, parse_json, plain, read_bytes, read_json
from probes.intake.labels import find_label, find_text, read_explanation, read_label
from probes.intake.quoting import QuotedRows
from probes.intake.template import chat_template, render
from probes.models.directory import locate
from probes.models.encode import (
    MAX_GENERATIONS_BYTES,
    OPTIONAL,
    after_reasoning,
    encode,
    marks_reasoning,
    read_generations,
)
from probes.models.reading import Reading
from probes.models.token_bytes import TokenBytes, decode_bytes
from probes.models.tokenizer import load_tokenizer
from probes.records import Span

# Keys of a row that are made here; and what it takes from a record as it is: all others.
MADE = ("candidates", "label_span", "label_text", "parsed_explanation", "parsed_label", "post_span")
KEPT = tuple(key for key in OPTIONAL if key not in MADE)
# A row of two bytes takes two kilobytes of memory, and a candidate is looked for in all of an answer.
MOST_RECORDS, MOST_CANDIDATES, _MOST_WORK = 300_000, 1000, 50_000_000  # the last: candidates times characters
_STATED = re.compile(r"\ufeff?sep=([,;|\t])\r?(?:\n|\Z)")
_TABLES = {".csv": ",", ".tsv": "\t"}
_LINE_END = re.compile(r"\r\n|[\r\n]")  # of old Macs, too
# An empty cell, and what a spreadsheet writes into one that it could not compute.
_NOTHING = ("", "#DIV/0!", "#N/A", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!", "#SPILL!", "#CALC!",
            "#GETTING_DATA")  # fmt: skip
_TEXTS = ("prompt", "answer", "label", "label_text", "explanation", "reasoning", "hint")


@dataclass(frozen=True)
class Laid:
    """Rows as ``probes run`` takes them, and of each record left out its ``id``, ``reason`` and what is ``said``."""

    rows: list[dict[str, Any]]
    left_out: list[dict[str, str]]


class Reader:
    """A model's tokenizer and chat template.

    Attributes:
        token_bytes: the bytes of each token.
        template: its chat template, or None.
    """

    def __init__(self, model: str | Path) -> None:
        """Opens the tokenizer of a model directory or Hub id; no weight is read.

        Raises:
            ProbeInputError: there is none that can be used.
        """
        directory = locate(model)
        self.name = str(model)
        self.token_bytes = TokenBytes(load_tokenizer(directory))
        self.template = chat_template(directory)

    def conversations(self, given: Sequence[Sequence[Mapping[str, str]]]) -> list[str | ProbeInputError]:
        """Each conversation as the chat template writes it, with the beginning of the answer.

        Raises:
            ProbeInputError: there is no template, or it cannot be rendered.
        """
        if not given:
            return []
        if self.template is None:
            raise ProbeInputError(f"{self.name}: no chat template; give prompts as text (key 'prompt')")
        special = self.token_bytes.tokenizer.special_tokens_map
        named = {key: str(value) for key, value in special.items() if not isinstance(value, (list, tuple))}
        usual = {"add_generation_prompt": True, "tools": None, "documents": None, **named}
        contexts = [{"messages": [dict(turn) for turn in turns], **usual} for turns in given]
        return render(self.template, contexts, f"{self.name}: its chat template")

    def ids(self, prompt: str, templated: bool) -> list[int]:
        """Tokens of a prompt. Before plain text stands, once, what the tokenizer puts before every text."""
        ids = self.token_bytes.plain(prompt)
        if templated:
            return ids
        alone, opened = self.token_bytes.plain("a"), list(self.token_bytes.tokenizer("a")["input_ids"])
        size = next((at for at in range(len(opened)) if opened[at : at + len(alone)] == alone), 0)
        before = opened[:size]
        return ids if ids[:size] == before else [*before, *ids]


def rows(
    model: str | Path, records: Iterable[Mapping[str, Any]], candidates: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Records as rows of generations.jsonl, for ``run_suite``.

    Args:
        model: directory or Hub id of the model that answered; only its tokenizer is opened.
        records: each with ``prompt`` (text as the model got it) or ``messages`` (``role``, ``content``; the last one
            may be the assistant's, the answer), ``answer``, and ``post``: a text that stands in the prompt once, or
            ``[start, end)`` in the prompt (in the last user message). Optional: ``id``; ``label`` (a key of the
            candidates) or ``label_text`` (as it stands in the answer), else read by rule; ``candidates``;
            ``explanation``, else what follows the label; ``reasoning``, ``hint``, ``task``, ``question``, ``user``,
            ``pair``, ``rationales``, ``cues``, ``decoys``, ``finish``.
        candidates: label -> its sentence, for records that have none of their own.
    Warns:
        ProbeWarning: how many records were left out, and why.
    Raises:
        ProbeInputError: a record is none of these, none can be used, or the model's tokenizer cannot.
    """
    laid = lay(Reader(model), list(records), candidates)
    if laid.left_out:
        counted = Counter(one["reason"] for one in laid.left_out)
        said = ", ".join(f"{reason} ({count})" for reason, count in counted.most_common())
        warnings.warn(f"{len(laid.left_out)} records left out: {said}", ProbeWarning, stacklevel=2)
    return laid.rows


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """``read_generations``, which says what to do where posts were given in place of rows.

    Raises:
        ProbeInputError: as there.
    """
    try:
        return read_generations(path)
    except ProbeInputError as error:
        if Path(path).suffix.lower() in (*_TABLES, ".txt"):
            raise ProbeInputError(f"{error}; `probes answer` and `probes rows` make rows of such a file") from None
        raise


def read_records(path: str | Path, text: str = "post") -> list[dict[str, Any]]:
    """Reads records: ``.csv`` and ``.tsv`` (columns by their header), ``.txt`` (a post on each line), else JSONL (one
    object per line). What has no id has the number of its line, of its row in a table, as one.

    Args:
        text: the key, or column, that holds the post; it is called ``post`` in what is returned.
    Raises:
        ProbeInputError: ``file:line: reason``, or there is none; a record has ``post`` beside ``text``.
    """
    data = read_bytes(path, MAX_GENERATIONS_BYTES).removeprefix(BOM)
    kind = Path(path).suffix.lower()
    if kind in _TABLES:
        read = _table(path, _text(path, data), _TABLES[kind])
    elif kind == ".txt":
        lines = enumerate(_LINE_END.split(_text(path, data)), start=1)
        read = ((number, {"post": line.strip()}) for number, line in lines if line.strip())
    else:
        read = _objects(path, data)
    found = []
    for number, record in itertools.islice(read, MOST_RECORDS + 1):
        if text != "post" and text in record:
            if "post" in record:
                raise ProbeInputError(f"{path}:{number}: has a key 'post' beside {plain(text, 80)!r}; leave one out")
            record["post"] = record.pop(text)
        found.append({"id": str(number)} | record)
    if len(found) > MOST_RECORDS:
        raise ProbeInputError(f"{path}: more than {MOST_RECORDS} records; give them in several files")
    if not found:
        raise ProbeInputError(f"{path}: no records; give JSONL, a .csv or .tsv with a header, or a .txt of posts")
    return found


def _text(path: str | Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProbeInputError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from error


def _objects(path: str | Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            value = parse_json(line, f"{path}:{number}")
            if not isinstance(value, dict):
                raise ProbeInputError(f"{path}:{number}: a JSON {type(value).__name__}, not an object")
            yield number, value


def _table(path: str | Path, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table by the names in its header; an empty cell is none, nor is an error of a spreadsheet."""
    if (stated := _STATED.match(text)) is not None:
        delimiter = stated[1]
    lines = QuotedRows(io.StringIO(text, newline=""), delimiter)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        if names == ["sep=", ""]:  # Excel's line that says what separates the cells
            lines.took(1, [])
            names = [name.strip() for name in next(rows, [])]
        lines.took(1, names)
        line = rows.line_num + 1
        if "" in names or len(set(names)) < len(names):
            raise ProbeInputError(f"{path}:1: every column needs a name of its own, such as 'post'")
        for number, cells in enumerate(rows, start=1):
            lines.took(line, cells)
            line = rows.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                said = f"row {number} has {len(cells)} cells, the header {len(names)}"
                raise ProbeInputError(f"{path}:{rows.line_num}: {said}; quote a cell that holds the separator")
            yield number, {name: cell for name, cell in zip(names, cells, strict=True) if cell.strip() not in _NOTHING}
        if found := lines.swallowed():
            raise ProbeInputError(f"{path}:{found}")
    except csv.Error as error:
        raise ProbeInputError(f"{path}:{rows.line_num}: no table separated by {delimiter!r} ({error})") from error


def read_candidates(path: str | Path | None) -> dict[str, str]:
    """Reads a JSON object label -> sentence; empty without a file.

    Raises:
        ProbeInputError: it is none.
    """
    if path is None:
        return {}
    found = read_json(path)
    if not found or not all(isinstance(text, str) and text.strip() and key.strip() for key, text in found.items()):
        raise ProbeInputError(f"{path}: must map each label to its sentence, a text")
    return found


def lay(
    reader: Reader,
    records: Sequence[Mapping[str, Any]],
    candidates: Mapping[str, str] | None = None,
    answered: bool = True,
) -> Laid:
    """See ``rows``. Not ``answered``: rows with the prompt only, for a model that is still to be asked."""
    read = [_read(record, number, candidates, answered) for number, record in enumerate(records, start=1)]
    ids = Counter(one["id"] for one in read)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise ProbeInputError(f"id {plain(twice[0], 80)!r} is used {ids[twice[0]]} times; ids must be unique")
    written = iter(reader.conversations([one["messages"] for one in read if "messages" in one]))
    laid = Laid([], [])
    for one in read:
        try:
            if "messages" in one:
                text = next(written)
                if isinstance(text, ProbeInputError):
                    raise RowRefused(one["id"], str(text), "the chat template refuses the conversation")
                one["prompt"], one["span"] = text, _in_prompt(one, text)
            row = _asked(reader, one)
            if answered:
                row |= _answered(reader, one)
                encode(row, reader.token_bytes)
            laid.rows.append(row)
        except RowRefused as error:
            laid.left_out.append({"id": one["id"], "reason": error.reason, "said": str(error)})
    if not laid.rows:
        raise ProbeInputError(f"none of the {len(read)} records can be used: {laid.left_out[0]['said']}")
    return laid


def _read(
    record: Mapping[str, Any], number: int, candidates: Mapping[str, str] | None, answered: bool
) -> dict[str, Any]:
    """A record whose format is right: ``span`` is the post's in ``text``, the prompt or the last user message."""
    found = {**record, "id": str(record.get("id") if record.get("id") is not None else number)}
    where = f"record {plain(found['id'], 80)!r}"
    for key in _TEXTS:
        if found.get(key) is not None and not isinstance(found[key], str):
            raise ProbeInputError(f"{where}: key {key!r} has type {type(found[key]).__name__}, not text")
    if (found.get("prompt") is None) == (found.get("messages") is None):
        raise ProbeInputError(f"{where}: give 'prompt' or 'messages', one of them")
    if found.get("messages") is not None:
        _read_messages(found, where)
    else:
        found.pop("messages", None)
        found["text"] = found["prompt"]
    if answered and not found.get("answer"):
        raise ProbeInputError(f"{where}: key 'answer' is missing or empty")
    found["candidates"] = found.get("candidates") or dict(candidates or {})
    good = isinstance(found["candidates"], dict) and all(
        isinstance(text, str) and text.strip() and key.strip() for key, text in found["candidates"].items()
    )
    if not good:
        raise ProbeInputError(f"{where}: key 'candidates' must map each label to its sentence")
    if len(found["candidates"]) > MOST_CANDIDATES:
        raise ProbeInputError(
            f"{where}: {len(found['candidates'])} candidates, at most {MOST_CANDIDATES} are told apart"
        )
    found["span"] = _post(found, where)
    return found


def _read_messages(found: dict[str, Any], where: str) -> None:
    turns = found["messages"]
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not good:
        raise ProbeInputError(f"{where}: key 'messages' must be a list of objects with 'role' and 'content' (text)")
    if found.get("answer") is None and turns and turns[-1]["role"] == "assistant":
        found["answer"], turns = turns[-1]["content"], turns[:-1]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not asked:
        raise ProbeInputError(f"{where}: key 'messages' has no turn of the user")
    found["messages"], found["text"] = turns, asked[-1]


def _post(found: Mapping[str, Any], where: str) -> Span | None:
    """Where the post is in ``text``; None where it has to be looked for in the prompt."""
    post, text = found.get("post"), found["text"]
    if isinstance(post, str) and post.strip():
        return None
    if isinstance(post, list) and len(post) == 2 and all(type(at) is int for at in post):
        if 0 <= post[0] < post[1] <= len(text):
            return post[0], post[1]
        raise ProbeInputError(f"{where}: post {post} is not inside the text of {len(text)} characters")
    raise ProbeInputError(f"{where}: key 'post' must be a text that is not empty, or a [start, end); {has(found)}")


def has(record: Mapping[str, Any]) -> str:
    """Which keys a record has, for one that lacks what is needed."""
    return f"it has {', '.join(plain(key, 40) for key in list(record)[:8])}"


def _in_prompt(one: Mapping[str, Any], prompt: str) -> Span | None:
    """The post's place in a rendered conversation, for one that was given as a place in the last user message."""
    if one["span"] is None:
        return None
    text, (a, b) = one["text"], one["span"]
    trimmed = text.strip()  # most templates do
    at, lead = prompt.rfind(trimmed), len(text) - len(text.lstrip())
    if at < 0 or a < lead or b - lead > len(trimmed):
        said = "the chat template changes the user's message; give the post as text"
        raise RowRefused(one["id"], said, "the chat template changes the user's message")
    if prompt.count(trimmed) > sum(turn["content"].count(trimmed) for turn in one["messages"]):
        said = "the chat template writes the user's message more than once, and only one of them could be erased"
        raise RowRefused(one["id"], said, "the chat template repeats the user's message")
    return at + a - lead, at + b - lead


def _asked(reader: Reader, one: Mapping[str, Any]) -> dict[str, Any]:
    """A row as far as it is known before the model answers."""
    prompt, row_id = one["prompt"], one["id"]
    post, span = _placed(one, prompt)
    marked = {key: one[key] for key in KEPT if one.get(key) is not None}
    if (reading := reader.token_bytes.reads(prompt) if reader.token_bytes.rules() else None) is not None:
        alone, placed = reader.token_bytes.reads(post), reading.span(span)
        if alone is None or reading.text[slice(*placed)] != alone.text:
            raise _changed(reader, row_id, "post")
        prompt, post, span = reading.text, alone.text, placed
        marked |= {key: _read_spans(one, key, alone) for key in ("rationales", "cues", "decoys") if key in marked}
        marked |= {key: _read_text(reader, marked[key]) for key in ("reasoning", "hint") if key in marked}
    prompt_ids = reader.ids(prompt, "messages" in one)
    pieces = [reader.token_bytes(index) for index in prompt_ids]
    decoded, places = decode_bytes(b"".join(pieces))
    span = _moved(reader, row_id, prompt, decoded, span)
    _refuse_marks(reader, one, "the post", prompt_ids, pieces, (places[span[0]], places[span[1]]))
    for turn in one.get("messages", ()):  # the template writes marks, nobody else; a reasoning may stand in an answer
        if turn["role"] != "assistant":
            ids = reader.token_bytes.plain(turn["content"])
            parts = [reader.token_bytes(index) for index in ids]
            _refuse_marks(reader, one, f"a turn of the {turn['role']}", ids, parts, (0, sum(map(len, parts))))
    return {
        "id": row_id,
        "post": post,
        "post_span": list(span),
        "prompt_ids": prompt_ids,
        "candidates": one["candidates"],
        **marked,
    }


def _refuse_marks(
    reader: Reader, one: Mapping[str, Any], what: str, ids: Sequence[int], pieces: Sequence[bytes], span: Span
) -> None:
    """Raises ``RowRefused`` where a token in bytes ``[a, b)`` is no text to the model: a special one, which may end the
    user's turn and begin another, or a mark of reasoning. By what was read, not by how it was spelt."""
    added, at = reader.token_bytes.tokenizer.added_tokens_decoder, 0
    for index, piece in zip(ids, pieces, strict=True):
        if index in added and at < span[1] and at + len(piece) > span[0]:
            token = str(added[index])
            if added[index].special or marks_reasoning(token):
                said = f"{what} holds {plain(token, 40)}, which the model reads as a mark of its own, not as text"
                raise RowRefused(one["id"], f"{said}; take it out", f"{plain(what, 40)} holds a mark of conversations")
        at += len(piece)


def _read_spans(one: Mapping[str, Any], key: str, reading: Reading) -> list[list[int]]:
    """Spans of the post as given, in the post as read."""
    size, spans = len(reading.begins), one[key]
    good = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(at) is int for at in span) for span in spans
    )
    if not good:
        raise ProbeInputError(f"record {plain(one['id'], 80)!r}: key {key!r} must be a list of [start, end)")
    if outside := [span for span in spans if not 0 <= span[0] < span[1] <= size]:
        said = f"key {key!r}: {outside[0]} is not inside the post of {size} characters"
        raise RowRefused(one["id"], said, f"{key} outside the post")
    return [[a, b] for a, b in (reading.span((a, b)) for a, b in spans) if a < b]


def _answered(reader: Reader, one: Mapping[str, Any]) -> dict[str, Any]:
    if reader.token_bytes.rules():
        one = {**one, **{key: _read_text(reader, one[key]) for key in ("answer", "label_text", "explanation")
                         if one.get(key)}}  # fmt: skip
        one["candidates"] = {key: _read_text(reader, text) for key, text in one["candidates"].items()}
    answer = one["answer"]
    if len(answer) * max(1, len(one["candidates"])) > _MOST_WORK:
        said = f"an answer of {len(answer)} characters with {len(one['candidates'])} candidates is too long to be read"
        raise RowRefused(one["id"], said, "the answer is too long")
    output_ids = reader.token_bytes.encode(answer)
    if b"".join(map(reader.token_bytes, output_ids)) != answer.encode():
        raise _changed(reader, one["id"], "answer")
    label, label_text, at = _label(one, answer)
    explanation = one.get("explanation") or read_explanation(answer, at)
    if at and (given := one.get("explanation")) and (begin := answer.find(given, after_reasoning(answer))) >= 0:
        end = begin + len(given)
        if begin < at[1] and at[0] < end:  # an explanation that names the label: it is stated behind it, if at all
            at = find_label(answer, answer[slice(*at)], (end, len(answer))) or at
            label_text = answer[slice(*at)]
    found = {"parsed_label": label, "label_text": label_text, "parsed_explanation": explanation}
    found["label_span"] = None if at is None else list(at)
    return {"output_ids": output_ids, **found}


def _read_text(reader: Reader, text: str) -> str:
    reading = reader.token_bytes.reads(text)
    return text if reading is None else reading.text


def _placed(one: Mapping[str, Any], prompt: str) -> tuple[str, Span]:
    """The post and its place in the prompt."""
    if one["span"] is not None:
        a, b = one["span"]
        return prompt[a:b], (a, b)
    post, count = one["post"], prompt.count(one["post"])
    if count != 1:
        where = "not in the prompt" if not count else "several times in the prompt"
        raise RowRefused(one["id"], f"the post stands {where}; give it as [start, end)", f"the post stands {where}")
    at = prompt.index(post)
    return post, (at, at + len(post))


def _moved(reader: Reader, row_id: str, prompt: str, decoded: str, span: Span) -> Span:
    """A place of the prompt in what its tokens say, which may have special tokens before it and other spaces in it."""
    kept = [at for at, char in enumerate(decoded) if char != " "]
    wanted = prompt.replace(" ", "")
    lead = len(kept) - len(wanted)
    if lead < 0 or "".join(decoded[at] for at in kept[lead:]) != wanted:
        raise _changed(reader, row_id, "prompt")
    post = prompt[slice(*span)]
    if not post.strip(" "):
        raise RowRefused(row_id, "the post is empty", "the post is empty")
    front = len(post) - len(post.lstrip(" "))
    start = kept[lead + len(prompt[: span[0]].replace(" ", ""))] - front
    if start < 0 or decoded[start : start + len(post)] != post:
        raise _changed(reader, row_id, "post")
    return start, start + len(post)


def _changed(reader: Reader, row_id: str, what: str) -> RowRefused:
    rules = reader.token_bytes.rules() or reader.token_bytes.kind
    said = f"the tokenizer changes the {what}"
    return RowRefused(row_id, f"{said} ({rules}); give it as its tokens read", said)


def _label(one: Mapping[str, Any], answer: str) -> tuple[str | None, str | None, Span | None]:
    """Key, text and place of the label in the answer: as given, or by rule."""
    candidates, label, said = one["candidates"], one.get("label"), one.get("label_text")
    if said is not None:
        if (placed := find_text(answer, said)) is None:
            raise RowRefused(one["id"], "label_text is not in the answer as words", "label_text is not in the answer")
        return label, said, placed
    if label is not None:
        scope = (after_reasoning(answer), len(answer))
        found = find_label(answer, candidates.get(label) or label, scope) or find_label(answer, label, scope)
        if found is None:
            said = f"label {plain(label, 40)!r} is not in the answer; give its words as 'label_text'"
            raise RowRefused(one["id"], said, "the label is not in the answer")
        return label, answer[slice(*found)], found
    if "label" in one or "label_text" in one:  # null: there is none
        return None, None, None
    key, found = read_label(answer, candidates)
    return key, None if found is None else answer[slice(*found)], found
