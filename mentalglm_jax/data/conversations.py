"""Conversations of several turns, to be trained on beside records: JSONL whose rows have ``messages``."""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mentalglm_jax.data.near import NearIndex, signature
from mentalglm_jax.data.records import Record, json_rows
from mentalglm_jax.data.splits import NEAR, NEAR_FROM, bare_post
from mentalglm_jax.errors import InputError

_KEYS = ("id", "messages")
_HEAD = 2048  # characters by which posts that begin alike are told apart, without comparing each


@dataclass(frozen=True)
class Conversation:
    """``messages``: role and content of each turn; the last is the assistant's."""

    id: str
    messages: tuple[Mapping[str, str], ...]


def read_conversations(path: str | Path) -> list[Conversation]:
    """Rows ``{"messages": [{"role": ..., "content": ...}, ...], "id": ...}``; where a row has no id, it is the number
    of its line.

    Raises:
        InputError: the file is missing or empty, an id stands twice, or a row is no conversation; the message names
            file and line.
    """
    path, found = Path(path), dict[str, Conversation]()
    for number, row in json_rows(path):
        try:
            one = _conversation(row, number)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if one.id in found:
            raise InputError(f"{path}:{number}: id {one.id!r} stands twice; ids must differ")
        found[one.id] = one
    if not found:
        raise InputError(f"{path}: holds no conversation; give at least one line")
    return list(found.values())


def _conversation(row: Any, number: int) -> Conversation:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    if unknown := [key for key in row if key not in _KEYS]:
        raise InputError(f"unknown field {unknown[0]!r}; a conversation has: {', '.join(_KEYS)}")
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise InputError("messages: expected a list of turns")
    for place, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
            raise InputError(f"messages: turn {place} must have role and content, and nothing else")
        if not isinstance(turn["role"], str) or not isinstance(turn["content"], str) or not turn["content"].strip():
            raise InputError(f"messages: role and content of turn {place} must be text")
    if turns[-1]["role"] != "assistant":
        raise InputError("messages: the last turn must be the assistant's, there is nothing to train on otherwise")
    named = row.get("id", f"line {number}")
    if not isinstance(named, str) or not named.strip():
        raise InputError("id: expected text")
    return Conversation(named, tuple(dict(turn) for turn in turns))


def apart_from(conversations: Sequence[Conversation], held_out: Sequence[Record]) -> tuple[list[Conversation], int]:
    """The conversations of which no turn has a held-out post, and how many went: a turn that holds its letters and
    digits in one piece (from ``NEAR_FROM`` on; a shorter post must be the whole turn), or that is nearly the same."""
    index, whole = NearIndex(NEAR), set[str]()
    begun: dict[str, dict[str, list[str]]] = {}  # long posts by their first characters, and by more of them
    for record in held_out:
        text = bare_post(record.post)
        if text in whole:
            continue
        whole.add(text)
        if len(text) >= NEAR_FROM:
            index.add(signature(text, record.language))
            begun.setdefault(text[:NEAR_FROM], {}).setdefault(text[:_HEAD], []).append(text)
    heads = {start: _apart(of) for start, of in begun.items()}
    languages = sorted({record.language for record in held_out})

    def held(turn: str) -> bool:
        text, seen = bare_post(turn), set[str]()
        if text in whole:
            return True
        for at in range(len(text) - NEAR_FROM + 1):
            start = text[at : at + NEAR_FROM]
            if start in heads and (head := _begun(heads[start], text[at : at + _HEAD])) not in seen:
                seen.add(head)  # once: one post may begin at every place of a turn
                if head and any(post in text for post in begun[start][head]):
                    return True
        return len(text) >= NEAR_FROM and any(index.near(signature(text, one)) for one in languages)

    stay = [one for one in conversations if not any(held(turn["content"]) for turn in one.messages)]
    return stay, len(conversations) - len(stay)


def _apart(heads: Iterable[str]) -> list[str]:
    """Sorted, without those that another one begins: where they are found it is, too."""
    found: list[str] = []
    for head in sorted(heads):
        if not found or not head.startswith(found[-1]):
            found.append(head)
    return found


def _begun(heads: Sequence[str], text: str) -> str:
    """The one of ``heads`` (``_apart``) that ``text`` begins with, or nothing: it is the last that is not behind it."""
    at = bisect.bisect_right(heads, text)
    return heads[at - 1] if at and text.startswith(heads[at - 1]) else ""
