"""Greedy answers of any causal language model to a prompt of one's own, as rows that can be probed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError
from probes.files import write_jsonl
from probes.foreign import plain
from probes.intake.labels import read_explanation, read_label
from probes.intake.rows import Reader, has
from probes.intake.template import render
from probes.models.encode import read_generations
from probes.models.greedy import continued, stops_of
from probes.models.probed import Probed
from probes.models.token_bytes import decode_bytes

_KEPT_EVERY = 10  # answers
_MARK = "\ue000\ue001\ue000"  # characters of private use: no text has them


def prompts(reader: Reader, records: Sequence[Mapping[str, Any]], template: str, where: object) -> list[dict[str, Any]]:
    """What the model is to be asked: each record by ``template`` (Jinja; its names are the record's keys), as the turn
    of a user where the model has a chat template, else as plain text.

    Returns:
        records for ``probes.intake.rows``, with ``post`` as a place, without an answer.
    Raises:
        ProbeInputError: a record without a post, a template that fails or does not show the post as it is.
    """
    for record in records:
        if not isinstance(record.get("post"), str) or not record["post"].strip():
            said = f"key 'post' must be a text that is not empty; {has(record)}; --text names another key"
            raise ProbeInputError(f"record {plain(record.get('id'), 80)!r}: {said}")
    texts = render(template, records, where, strict=True)
    marked = render(template, [{**record, "post": _MARK} for record in records], where, strict=True)
    found = []
    for record, text, mark in zip(records, texts, marked, strict=True):
        if isinstance(text, ProbeInputError):
            raise text
        if isinstance(mark, ProbeInputError):
            raise mark
        at = mark.find(_MARK)
        end = at + len(record["post"])
        # A second place of it would stay where the first is erased, and the label with it.
        if mark.count(_MARK) != 1 or text != mark.replace(_MARK, record["post"]):
            raise ProbeInputError(
                f"{where}: record {record.get('id')!r}: the prompt does not show the post as it is; write "
                "{{ post }} once, without a filter"
            )
        asked = {"messages": [{"role": "user", "content": text}]} if reader.template is not None else {"prompt": text}
        found.append({**record, **asked, "post": [at, end]})
    return found


def answer(
    probe: Probed,
    rows: Sequence[dict[str, Any]],
    out: str | Path,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Asks the model every row, one at a time and greedily, and reads label and explanation by rule.

    Args:
        rows: as ``probes.intake.rows.asked`` makes them, without ``output_ids``.
        out: generations.jsonl; what an interrupted call left in it is taken up.
    Returns:
        the rows, in order, with what the model wrote.
    Raises:
        ProbeInputError: ``out`` holds something else, or answers that this call would lose.
    """
    import torch

    stops = stops_of(probe.model, probe.tokenizer)
    made = hashlib.blake2b(f"{probe.fingerprint} {max_new_tokens} {stops}".encode(), digest_size=8).hexdigest()
    before = _before(Path(out), rows, made)
    found: list[dict[str, Any]] = []
    for done, row in enumerate(rows):
        if (kept := before.pop(row["id"], None)) is not None:
            output_ids = kept["output_ids"]  # all else is read anew: candidates and labels may be others now
        else:
            ids = torch.tensor([row["prompt_ids"]], device=probe.device)
            output = continued(probe.model, ids, torch.ones_like(ids), max_new_tokens, stops, probe.pad_id)
            output_ids = output[0, ids.shape[1] :].tolist()
        found.append(read_answer(probe, row, output_ids, stops) | {"answered_by": made})
        if progress:
            progress(done + 1, len(rows))
        if (done + 1) % _KEPT_EVERY == 0:
            write_jsonl(out, [*found, *before.values()], private=True)  # what is not reached yet stays, too
    write_jsonl(out, found, private=True)
    return found


def _before(out: Path, rows: Sequence[Mapping[str, Any]], made: str) -> dict[str, dict[str, Any]]:
    """The rows that an earlier call left in ``out``, by id; each of them is one of ``rows``, asked the same.

    Raises:
        ProbeInputError: one is not: it would be replaced, and its answer lost.
    """
    if not out.exists():
        return {}
    before, asked = {str(row["id"]): row for row in read_generations(out)}, {row["id"]: row for row in rows}
    for name, row in before.items():
        if row.get("answered_by") != made:
            raise ProbeInputError(f"{out}: row {name!r} was not written by this model and call; give another --out")
        if name not in asked:
            said = "is not among the posts of this call, and its answer would be lost"
            raise ProbeInputError(f"{out}: row {name!r} {said}; give another --out")
        if row["prompt_ids"] != asked[name]["prompt_ids"]:
            said = "was asked with another post or prompt, and its answer would be lost"
            raise ProbeInputError(f"{out}: row {name!r} {said}; give another --out")
    return before


def read_answer(
    probe: Probed, row: Mapping[str, Any], output_ids: list[int], stops: Sequence[int] = ()
) -> dict[str, Any]:
    """``row`` with an answer: ids as the model wrote them, label and explanation by rule."""
    said = output_ids[:-1] if output_ids and output_ids[-1] in stops else output_ids
    text = decode_bytes(b"".join(map(probe.token_bytes, said)))[0]
    key, at = read_label(text, row["candidates"])
    return {
        **row,
        "output_ids": output_ids,
        "output_text": text,
        "finish": "stop" if len(said) < len(output_ids) else "length",
        "parsed_label": key,
        "label_text": None if at is None else text[slice(*at)],
        "label_span": None if at is None else list(at),
        "parsed_explanation": read_explanation(text, at),
    }
