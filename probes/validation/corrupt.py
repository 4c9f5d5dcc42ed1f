"""Quotes corrupted on purpose, with the span they came from: what the aligner is measured on (V12)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from probes.citations.align import align
from probes.citations.normalise import SIMPLER
from probes.records import Span

_ZH = "最近一直睡不好没有胃口白天坐在窗边看云朋友约我去公园散步说改天吧晚上又翻来覆去想很多事情楼下的猫叫了一夜觉得累"
_LINE = (
    "lately the kettle hums while rain taps windows buses pass my street slow grey rows before morning nobody answers "
    "letters pile beside unopened parcels and dinner stays cold until neighbours knock asking whether everything helps"
)
_EN = _LINE.split()
_TRADITIONAL = {simple: old for old, simple in SIMPLER.items()}
KINDS = ("exact", "insert", "delete", "substitute", "mixed", "traditional", "full width", "emoji", "punctuation")


@dataclass(frozen=True)
class Quote:
    """A post, an explanation that quotes ``span`` of it with some characters changed, and the kind of change."""

    post: str
    explanation: str
    span: Span
    kind: str


def quote(rng: random.Random, kind: str, language: str, rate: float) -> Quote:
    """One corrupted quotation of a whole clause.

    Args:
        rate: at most this share of the quote's characters is edited (insert, delete, substitute, mixed).
    """
    joint, stops = ("", "，。！") if language == "zh" else (" ", ",.!")
    clauses = []
    for _ in range(rng.randint(4, 8)):
        words = rng.sample(_ZH, rng.randint(8, 16)) if language == "zh" else rng.sample(_EN, rng.randint(4, 8))
        clauses.append(joint.join(words))
    post, spans = "", []
    for clause in clauses:
        post += joint if post else ""
        spans.append((len(post), len(post) + len(clause)))
        post += clause + rng.choice(stops)
    at = rng.randrange(len(clauses))
    said = _change(rng, clauses[at], kind, language, rate)
    explanation = (
        f"帖子提到“{said}”，说明心情低落。" if language == "zh" else f'They wrote "{said}", which shows low mood.'
    )
    return Quote(post, explanation, spans[at], kind)


def _change(rng: random.Random, text: str, kind: str, language: str, rate: float) -> str:
    if kind == "traditional":
        return "".join(_TRADITIONAL.get(char, char) for char in text)
    if kind == "full width":
        return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text).upper()
    if kind in ("emoji", "punctuation"):
        extra = "😭💔🙃" if kind == "emoji" else "…～、!"
        return "".join(char + (rng.choice(extra) if rng.random() < 0.1 else "") for char in text)
    letters = _ZH if language == "zh" else "abcdefghijklmnopqrstuvwxyz"
    chars = list(text)
    for _ in range(int(rate * len(text) + 1e-9) if kind != "exact" else 0):
        edit = rng.choice(("insert", "delete", "substitute")) if kind == "mixed" else kind
        where = rng.randrange(len(chars))
        if edit == "insert":
            chars.insert(where, rng.choice(letters))
        elif edit == "delete":
            del chars[where]
        else:
            chars[where] = rng.choice(letters)
    return "".join(chars)


def span_f1(count: int, rate: float, seed: int = 0) -> dict[str, float]:
    """Mean F1, over characters, of the aligned post spans against the true one, per kind of change; and "all".

    A quote that is not found counts 0; what is found besides it counts against precision.
    """
    rng = random.Random(seed)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index in range(count):
        one = quote(rng, KINDS[index % len(KINDS)], "zh" if index // len(KINDS) % 2 else "en", rate)
        truth, seen = np.zeros(len(one.post), bool), np.zeros(len(one.post), bool)
        truth[slice(*one.span)] = True
        for citation in align(one.explanation, one.post):
            for a, b in citation.post_char:
                seen[a:b] = True
        both = float((truth & seen).sum())
        found[one.kind].append(2 * both / float(truth.sum() + seen.sum()))
    means = {kind: float(np.mean(values)) for kind, values in found.items() if values}
    return means | {"all": float(np.mean([value for values in found.values() for value in values]))}


def false_alarms(count: int, seed: int = 0) -> float:
    """Share of quotes of a clause of *another* post that the aligner claims to have found in this one."""
    rng, claimed = random.Random(seed), 0
    for index in range(count):
        language = "zh" if index % 2 else "en"
        here, there = (quote(rng, "exact", language, 0.0) for _ in range(2))
        claimed += any(c.kind == "quote" and c.post_char for c in align(there.explanation, here.post))
    return claimed / count
