"""Swap pairs: two posts that differ in one phrase. Do their maps differ there, and does the label move as they say?

The sharpest question one can ask of a map without knowing the model: nothing is erased, both posts are real text, and
what the phrase does to the label is simply seen. Rows of one ``pair`` id in generations.jsonl are compared, the answer
of the first written after the post of the second where their labels differ, so that both scores are of one label.

* ``share``: of all differences between the two maps, unit by unit, the part at the phrase. Null: the phrase stood in
  another unit (exact: where the difference is, is unrelated to where the phrase is).
* ``cosine``: over pairs, of what the maps say (their difference at the phrase, nats) with what the label does (the
  difference of its log-odds, nats). Null: the sign of what the maps say is a coin for each pair, posts of one author
  alike. 1 is exact up to a factor, which is ``slope`` (nats of the label per nat of the maps).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes import stats
from probes.checks.crosscheck import unit_sums
from probes.checks.verdict import gate
from probes.errors import ProbeInputError
from probes.records import Attribution, Example, Segment, Span

MIN_PAIRS = 5


@dataclass(frozen=True)
class Swap:
    """One pair, by one method. Nats.

    Attributes:
        pair: its id. user: author of the first post, if known.
        moved: label's log-odds after the first post less after the second. turned: whether the label changed sides.
        said: the same difference of the maps, at the units that hold the phrase.
        differences: absolute difference of the maps, unit by unit, the phrase's units as one. at: which one that is.
    """

    pair: str
    method: str
    user: str | None
    moved: float
    turned: bool
    said: float
    differences: tuple[float, ...]
    at: int

    @property
    def shares(self) -> np.ndarray:
        """float64 ``[k]``: the share at the phrase, then had it stood elsewhere; empty where nothing differs."""
        d = np.array(self.differences)
        return np.concatenate([d[self.at : self.at + 1], np.delete(d, self.at)]) / d.sum() if d.sum() > 0 else d[:0]


def pairs(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Indices of the rows of each ``pair`` id, in order.

    Raises:
        ProbeInputError: an id with one row, or with more than two, or whose rows ask different questions.
    """
    groups: dict[str, list[int]] = {}
    for at, example in enumerate(examples):
        if example.pair is not None:
            groups.setdefault(example.pair, []).append(at)
    for name, found in groups.items():
        if len(found) != 2:
            raise ProbeInputError(
                f"pair {name!r}: {len(found)} rows with a label; a swap pair is two that differ in a phrase"
            )
        a, b = (examples[at] for at in found)
        if a.post == b.post:
            raise ProbeInputError(f"pair {name!r}: rows {a.id!r} and {b.id!r} have the same post")
        if (a.task, a.candidates) != (b.task, b.candidates):
            raise ProbeInputError(f"pair {name!r}: rows {a.id!r} and {b.id!r} differ in task or candidates")
    return [(a, b) for a, b in groups.values()]


def phrase(first: str, second: str) -> tuple[Span, Span]:
    """Where two posts differ: what is left of each without their common beginning and end."""
    least = min(len(first), len(second))
    head = next((i for i in range(least) if first[i] != second[i]), least)
    tail = next((i for i in range(least - head) if first[-1 - i] != second[-1 - i]), least - head)
    return (head, len(first) - tail), (head, len(second) - tail)


def counterpart(a: Example, b: Example) -> Example:
    """``b``'s prompt with ``a``'s answer: the row whose label score is comparable with ``a``'s. Exact ids of both.

    Raises:
        ProbeInputError: a prompt that ends inside a character.
    """
    cut_a, cut_b = a.byte_spans[a.prompt_len - 1][1], b.byte_spans[b.prompt_len - 1][1]
    if cut_a not in a.char_bytes or cut_b not in b.char_bytes:
        raise ProbeInputError(f"pair {a.pair!r}: a prompt ends inside a character; its answer cannot be moved")
    chars_a, chars_b = a.char_bytes.index(cut_a), b.char_bytes.index(cut_b)
    by, by_tok, by_char = cut_b - cut_a, b.prompt_len - a.prompt_len, chars_b - chars_a
    moved = [
        Segment(s.name, (s.tok[0] + by_tok, s.tok[1] + by_tok), (s.char[0] + by_char, s.char[1] + by_char))
        for s in a.segments
        if s.tok[0] >= a.prompt_len
    ]
    return dataclasses.replace(
        b,
        ids=(*b.ids[: b.prompt_len], *a.ids[a.prompt_len :]),
        byte_spans=(*b.byte_spans[: b.prompt_len], *((x + by, y + by) for x, y in a.byte_spans[a.prompt_len :])),
        char_bytes=(*b.char_bytes[:chars_b], *(at + by for at in a.char_bytes[chars_a:])),
        segments=(*(s for s in b.segments if s.tok[1] <= b.prompt_len), *moved),
        text=b.text[:chars_b] + a.text[chars_a:],
        label=a.label,
        label_text=a.label_text,
        explanation=a.explanation,
    )


def swap(first: Attribution, second: Attribution, posts: tuple[str, str], units: tuple[Sequence[Span], Sequence[Span]],
         pair: str, user: str | None = None) -> Swap | None:  # fmt: skip
    """Compares the label maps of two posts, of one method and for one label.

    Returns:
        None where a map may not speak (its own gate), or the units outside the phrase do not pair off.
    """
    if any(gate(a) == "not finite" or a.converged is False for a in (first, second)):
        return None
    sides = []
    for found, span, cut in zip((first, second), phrase(*posts), units, strict=True):
        values = unit_sums(found.char_values, cut)
        touched = [i for i, (a, b) in enumerate(cut) if a < max(span[1], span[0] + 1) and b > span[0]]
        touched = touched or [len(cut) - 1]  # words put at the very end
        sides.append((values[: touched[0]], values[touched].sum(), values[touched[-1] + 1 :]))
    (left_a, in_a, right_a), (left_b, in_b, right_b) = sides
    if len(left_a) != len(left_b) or len(right_a) != len(right_b):
        return None
    outside = [np.abs(left_a - left_b), [abs(in_a - in_b)], np.abs(right_a - right_b)]
    return Swap(
        pair=pair,
        method=first.method,
        user=user,
        moved=first.f_input - second.f_input,
        turned=(first.f_input > 0) != (second.f_input > 0),
        said=float(in_a - in_b),
        differences=tuple(np.concatenate(outside).tolist()),
        at=len(left_a),
    )


def summarise_swaps(found: Sequence[Swap], draws: int = 9999, seed: int = 0) -> dict[str, Any] | None:
    """The data set's swap pairs in numbers; None without any.

    Returns:
        ``n`` pairs, ``turned`` labels, ``moved`` (mean absolute nats), and by method ``share``, ``share_null``,
        ``p_share``, ``cosine``, ``slope``, ``p_cosine``, ``n``; no p below ``MIN_PAIRS`` pairs.
    """
    if not found:
        return None
    by_method: dict[str, Any] = {}
    for method in dict.fromkeys(s.method for s in found):
        by_method[method] = _of_method([s for s in found if s.method == method], draws, seed)
    once = list({s.pair: s for s in found}.values())
    return {
        "n": len(once),
        "turned": sum(s.turned for s in once),
        "moved": float(np.mean([abs(s.moved) for s in once])),
        "by_method": by_method,
    }


def _of_method(chosen: Sequence[Swap], draws: int, seed: int) -> dict[str, Any]:
    who = [f"pair {s.pair}" if s.user is None else f"user {s.user}" for s in chosen]
    placed = [(s.shares, author) for s, author in zip(chosen, who, strict=True) if len(s.shares) > 1]
    test = None
    if len(placed) >= MIN_PAIRS:
        test = stats.mean_test([shares for shares, _ in placed], draws, seed, [author for _, author in placed])
    said, moved = (np.array([getattr(s, name) for s in chosen]) for name in ("said", "moved"))
    size = float(np.linalg.norm(said) * np.linalg.norm(moved))
    return {
        "share": float(np.mean([shares[0] for shares, _ in placed])) if placed else None,
        "share_null": float(np.mean([1 / len(shares) for shares, _ in placed])) if placed else None,
        "p_share": None if test is None else test.p,
        "cosine": float(said @ moved) / size if size > 0 else None,
        "slope": float(said @ moved / (said @ said)) if said.any() else None,
        "p_cosine": sign_test(said * moved, who, draws, seed) if len(set(who)) >= MIN_PAIRS and size > 0 else None,
        "n": len(chosen),
    }


def sign_test(products: np.ndarray, who: Sequence[str], draws: int, seed: int) -> float:
    """One-sided p of the sum of ``products`` where the sign of each author's part is a coin (Monte Carlo)."""
    groups: Mapping[str, int] = {name: i for i, name in enumerate(dict.fromkeys(who))}
    parts = np.bincount([groups[name] for name in who], weights=products)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(parts)))
    observed = parts.sum()
    reached = int((signs @ parts >= observed - 1e-12 * np.abs(parts).sum()).sum())
    return (1 + reached) / (1 + draws) if math.isfinite(observed) else math.nan
