"""Pairs of answers to one prompt, of which one is preferred: ``pairs.jsonl``, as `probes rank` writes it."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.data.batches import Example
from mentalglm_jax.data.records import json_rows
from mentalglm_jax.errors import InputError

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_MAX_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt and two answers as token ids, what ends an answer included; ``place`` is its line in the file."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    place: int


def read_pairs(path: str | Path, vocab_size: int | None = None) -> list[Pair]:
    """The pairs of a JSONL file. Keys beside ``id`` and the three lists of ids are not looked at.

    Args:
        path: the file.
        vocab_size: ids from here on belong to another tokenizer.

    Raises:
        InputError: no such file, no pair in it, or a row that is none; file, line and key are named.
    """
    path = Path(path)
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, row in json_rows(path):
        try:
            pair = _pair(row, number, _MAX_ID + 1 if vocab_size is None else vocab_size)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if pair.id in seen:
            raise InputError(f"{path}:{number}: id {pair.id!r} already stands in line {seen[pair.id]}; ids must differ")
        seen[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path}: holds no pair; sample more answers, or rank them with a smaller margin")
    return pairs


def _pair(row: Any, place: int, vocab_size: int) -> Pair:
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    if missing := [name for name in ("id", *_IDS) if name not in row]:
        raise InputError(f"field {missing[0]!r} is missing; `probes rank` writes it")
    if not isinstance(row["id"], str) or not row["id"].strip():
        raise InputError("id: expected text that is not blank")
    ids = {name: _token_ids(name, row[name], vocab_size) for name in _IDS}
    if ids["chosen_ids"] == ids["rejected_ids"]:
        raise InputError("chosen_ids and rejected_ids are one answer; delete the line")
    return Pair(row["id"], **ids, place=place)


def _token_ids(name: str, given: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(type(one) is int for one in given):
        raise InputError(f"{name}: expected a list of token ids, at least one")
    if wrong := next((one for one in given if not 0 <= one < vocab_size), None):
        raise InputError(f"{name}: {wrong} is no token of this model (0 to {vocab_size - 1}); were the answers made by "
                         "another one?")  # fmt: skip
    return tuple(given)


def encode_pairs(pairs: Iterable[Pair], sequence_length: int) -> tuple[list[Example], list[str]]:
    """Examples of both answers, the chosen one first, and the ids of pairs left out whole because prompt and answers,
    twice the prompt, exceed ``sequence_length`` tokens.

    Raises:
        InputError: nothing is left.
    """
    kept: list[Example] = []
    too_long: list[str] = []
    for pair in pairs:
        before, sides = len(pair.prompt_ids), (pair.chosen_ids, pair.rejected_ids)
        split = before + len(pair.chosen_ids)
        if split + before + len(pair.rejected_ids) > sequence_length:
            too_long.append(pair.id)
            continue
        tokens = np.asarray([id for side in sides for id in (*pair.prompt_ids, *side)], np.int32)
        starts = (before - 1, split + before - 1)
        index = np.concatenate([np.arange(start, start + len(side)) for start, side in zip(starts, sides, strict=True)])
        index = index.astype(np.int32)
        kept.append(Example(tokens=tokens, target_index=index, target_ids=tokens[index + 1], split=split, id=pair.id))
    if not kept:
        raise InputError(f"none of {len(too_long)} pairs fits into sequence_length = {sequence_length} tokens (both "
                         "answers, each after its prompt); raise it")  # fmt: skip
    return kept, too_long
