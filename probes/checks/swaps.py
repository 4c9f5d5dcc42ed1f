"""Swap pairs: two posts that differ in one phrase. Do their maps differ there, and does the label move as they say?

The sharpest question one can ask of a map without knowing the model: nothing is erased, both posts are real text, and
what the phrase does to the label is simply seen. Rows of one ``pair`` id in generations.jsonl are compared, the answer
of the first written after the post of the second where their labels differ, so that both scores are of one label.

Both maps are summed over the same text: the pieces between the boundaries that units of both posts share, counted from
the beginning before the phrase and from the end after it. What is left between them is the phrase. Both numbers have
the same null: the phrase stood elsewhere, so the difference of the maps is summed over every other window of as many
consecutive units (exact: where the difference is, is unrelated to where the phrase is).

* ``share``: of all differences between the two maps, the part at the phrase.
* ``cosine``: over pairs, of what the maps say (their difference at the phrase, nats) with what the label does (the
  difference of its log-odds, nats). Tested is the mean of their product, signed: a complete map adds up to what the
  label does wherever it puts it, and has to say it at the phrase. 1 is exact up to a factor, which is ``slope`` (nats
  of the label per nat of the maps).

A sum over more units varies more, so a pair whose phrase is not cut into as many units in both posts is left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes import stats
from probes.checks.verdict import FAMILIES, barred, gate
from probes.errors import ProbeInputError
from probes.records import Attribution, Example, Segment, Span

MIN_PAIRS = 5


@dataclass(frozen=True)
class Swap:
    """One pair, by one method. Nats.

    Attributes:
        pair: its id. user: author of the first post, if known. posts: ids of both.
        moved: label's log-odds after the first post less after the second. turned: whether their labels differ.
        differences: of the maps, signed, unit by unit. at, width: first of the phrase's units, and how many they are.
    """

    pair: str
    method: str
    user: str | None
    moved: float
    turned: bool
    differences: tuple[float, ...]
    at: int
    width: int = 1
    posts: tuple[str, str] = ("", "")

    @property
    def windows(self) -> np.ndarray:
        """float64 ``[k]``: difference of the maps at the phrase, then at each other window of as many units."""
        sums = np.convolve(np.array(self.differences), np.ones(self.width), "valid")
        return np.concatenate([sums[self.at : self.at + 1], np.delete(sums, self.at)])

    @property
    def said(self) -> float:
        return float(self.windows[0])

    @property
    def shares(self) -> np.ndarray:
        """float64 ``[k]``: size of each window's difference / all sizes; empty where nothing differs."""
        total = float(np.abs(self.differences).sum())
        return np.abs(self.windows) / total if total > 0 else np.empty(0)


@dataclass(frozen=True)
class LeftOut:
    """One pair that a method cannot compare, and why."""

    pair: str
    method: str
    why: str
    posts: tuple[str, str] = ("", "")


def pairs(examples: Sequence[Example]) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Indices of the rows of each ``pair`` id, in order, and why other ids are no pair: reason -> ids.

    The other half of a pair may be beyond a limit, or have no label; its posts are probed like any other.
    """
    groups: dict[str, list[int]] = {}
    for at, example in enumerate(examples):
        if example.pair is not None:
            groups.setdefault(example.pair, []).append(at)
    found, others = [], Counter[str]()
    for rows in groups.values():
        if why := no_pair([examples[at] for at in rows]):
            others[why] += 1
        else:
            found.append((rows[0], rows[1]))
    return found, dict(others)


def no_pair(rows: Sequence[Example]) -> str | None:
    """Why rows are no pair; None for two that are one."""
    if len(rows) == 1:
        return "one row only"
    if len(rows) > 2:
        return "more than two rows"
    a, b = rows
    if a.post == b.post:
        return "one post twice"
    return None if (a.task, a.candidates) == (b.task, b.candidates) else "two tasks, or two sets of candidates"


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


def swaps_of(
    first: Example,
    second: Example,
    maps: Sequence[Attribution],
    others: Sequence[Attribution],
    units: tuple[Sequence[Span], Sequence[Span]],
) -> list[Swap | LeftOut]:
    """One pair by every method with a vote that made label maps of both.

    Args:
        maps: of the first row. others: of the second post with the first's answer (``counterpart``).
        units: what each post is cut into.
    """
    posts, turned = (first.post, second.post), first.label != second.label
    name = f"{first.id} / {second.id}" if first.pair is None else first.pair
    return [
        swap(a, b, posts, units, name, first.user, turned)
        for a in maps
        for b in others
        if a.target == b.target == "label" and a.method == b.method and a.method in FAMILIES
    ]


def swap(first: Attribution, second: Attribution, posts: tuple[str, str], units: tuple[Sequence[Span], Sequence[Span]],
         pair: str, user: str | None = None, turned: bool = False) -> Swap | LeftOut:  # fmt: skip
    """Compares the label maps of two posts, of one method and for one label; ``turned``: whether their labels differ.

    Returns:
        ``LeftOut`` where a map may not speak (its own gate), where the phrase is not as many units in both posts, or
        where there is no other place for it.
    """
    ids = (first.example_id, second.example_id)
    if any(gate(a) == "not finite" or a.converged is False or barred(a) for a in (first, second)):
        return LeftOut(pair, first.method, "a map may not speak", ids)
    lengths = (len(posts[0]), len(posts[1]))
    (head, end), _ = phrase(*posts)
    bounds = [{0, size, *(at for span in cut for at in span)} for size, cut in zip(lengths, units, strict=True)]
    before = {at for at in bounds[0] & bounds[1] if at <= head}
    from_end = [{size - at for at in found} for size, found in zip(lengths, bounds, strict=True)]
    after = {at for at in from_end[0] & from_end[1] if at <= lengths[0] - end}
    sides, widths = [], []
    for found, size, own in zip((first, second), lengths, bounds, strict=True):
        inside = {at for at in own if max(before) < at < size - max(after)}
        ends = sorted(before | inside | {size - at for at in after})
        sides.append(np.array([found.char_values[a:b].sum() for a, b in itertools.pairwise(ends)]))
        widths.append(len(ends) - len(before) - len(after) + 1)
    if widths[0] != widths[1]:
        return LeftOut(pair, first.method, "the phrase is not as many units in both posts", ids)
    if len(sides[0]) <= widths[0]:
        return LeftOut(pair, first.method, "no unit without the phrase", ids)
    return Swap(
        pair=pair,
        method=first.method,
        user=user,
        moved=first.f_input - second.f_input,
        turned=turned,
        differences=tuple((sides[0] - sides[1]).tolist()),
        at=len(before) - 1,
        width=widths[0],
        posts=ids,
    )


def summarise_swaps(found: Sequence[Swap | LeftOut], draws: int = 9999, seed: int = 0) -> dict[str, Any] | None:
    """The data set's swap pairs in numbers; None without any.

    Returns:
        ``pairs``, and of the ``n`` that some method compares ``turned`` labels and ``moved`` (mean absolute nats, None
        without one); by method ``share``, ``share_null``, ``p_share``, ``cosine``, ``slope``, ``p_cosine``, ``n``,
        ``left_out`` (reason -> pairs); no p below ``MIN_PAIRS`` pairs. ``each`` pair: its ``pair`` and ``posts``,
        whether it ``turned`` and what it ``moved`` (None where no method compares it), and by method ``said`` (nats),
        ``share`` and ``share_null``, or ``left_out``, the reason.
    """
    if not found:
        return None
    by_method: dict[str, Any] = {}
    for method in dict.fromkeys(s.method for s in found):
        by_method[method] = _of_method([s for s in found if s.method == method], draws, seed)
    once = list({s.pair: s for s in found if isinstance(s, Swap)}.values())
    return {
        "pairs": len({s.pair for s in found}),
        "n": len(once),
        "turned": sum(s.turned for s in once),
        "moved": float(np.mean([abs(s.moved) for s in once])) if once else None,
        "by_method": by_method,
        "each": _each(found),
    }


def _each(found: Sequence[Swap | LeftOut]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for one in found:
        row = rows.setdefault(
            one.pair, {"pair": one.pair, "posts": list(one.posts), "turned": None, "moved": None, "by_method": {}}
        )
        if isinstance(one, LeftOut):
            row["by_method"][one.method] = {"left_out": one.why}
            continue
        row |= {"turned": one.turned, "moved": one.moved}
        shares = one.shares
        share, null = (float(shares[0]), float(shares.mean())) if len(shares) else (None, None)
        row["by_method"][one.method] = {"said": one.said, "share": share, "share_null": null}
    return list(rows.values())


def _of_method(found: Sequence[Swap | LeftOut], draws: int, seed: int) -> dict[str, Any]:
    chosen = [s for s in found if isinstance(s, Swap)]
    who = [f"pair {s.pair}" if s.user is None else f"user {s.user}" for s in chosen]
    placed = [(s.shares, author) for s, author in zip(chosen, who, strict=True) if len(s.shares)]
    share = cosine = None
    if len(placed) >= MIN_PAIRS:
        share = stats.mean_test([shares for shares, _ in placed], draws, seed, [author for _, author in placed])
    said, moved = (np.array([getattr(s, name) for s in chosen], dtype=np.float64) for name in ("said", "moved"))
    size = float(np.linalg.norm(said) * np.linalg.norm(moved))
    if len(chosen) >= MIN_PAIRS and size > 0:
        cosine = stats.mean_test([s.windows * s.moved for s in chosen], draws, seed, who)
    return {
        "share": float(np.mean([shares[0] for shares, _ in placed])) if placed else None,
        "share_null": float(np.mean([shares.mean() for shares, _ in placed])) if placed else None,
        "p_share": None if share is None else share.p,
        "cosine": float(said @ moved) / size if size > 0 else None,
        "slope": float(said @ moved / (said @ said)) if said.any() else None,
        "p_cosine": None if cosine is None else cosine.p,
        "n": len(chosen),
        "left_out": dict(Counter(s.why for s in found if isinstance(s, LeftOut))),
    }
