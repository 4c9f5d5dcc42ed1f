"""Nulls for saliency over text: the map moved round the post, the citation elsewhere; and the p-value of one.

What a p-value here does and does not say:

* Saliency is smooth along the text and citations are contiguous, so the scores of single positions are not
  exchangeable: shuffling positions rejects 15-25 % of true nulls at 5 % (``tests/probes/test_stats.py`` shows it)
  and is refused. Shifting the whole map around the post (*circular shift*) keeps its smoothness. The shifts form a
  group, so the p-value with the identity included is exact when the map is circularly stationary.
* What is shifted are the map's smallest pieces (``atoms``): a token's value is the same on all its characters, and
  citations begin and end where tokens do. A shift by characters breaks that common alignment, and then 7-9 % of true
  nulls are rejected at 5 % (AUROC); a shift by pieces keeps it.
* It cannot be smaller than 1 / (number of shifts). A map that is constant on clauses, or a citation that always is a
  whole clause, has as many meaningful placements as the post has clauses, however many characters it has: a character
  shift breaks the common alignment at clause boundaries, and then rejects too often. Such maps are rotated by clause
  (``rotations``). One short post can therefore never be significant alone; posts are combined into ONE test on the mean
  (``probes.stats.mean_test``), whose resolution grows with every post.
* Rotation does not remove a preference that map and explanation share (both always like the last clause): compare with
  the mismatched null in ``crosscheck.summarise``.

All arrays are float64 or bool of one length n; a null distribution has the identity at index 0.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from probes.errors import ProbeInputError
from probes.stats import TIE, ranks, runs

NULLS = ("circular", "placement")
_MANY_RUNS = 1000  # of a mask: no honest citation has more


def require_null(null: str) -> None:
    """Refuses a null that does not hold for text.

    Raises:
        ProbeInputError: unknown, or a token shuffle.
    """
    if null in NULLS:
        return
    why = (
        "single tokens of a text are not exchangeable, shuffling them rejects true nulls"
        if "shuf" in null
        else "unknown"
    )
    raise ProbeInputError(f"null {null!r}: {why}; choose from {', '.join(NULLS)}")


def shifted_sums(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``out[k]`` = sum over ``mask`` of ``np.roll(values, k)`` for all n shifts. O(n * runs of the mask), and where
    these are many O(n log n), to rounding."""
    n = len(values)
    if len(runs(mask)[0]) > _MANY_RUNS:
        return np.fft.irfft(np.conj(np.fft.rfft(values)) * np.fft.rfft(mask.astype(np.float64)), n)
    prefix = np.concatenate(([0.0], np.cumsum(np.tile(values, 2))))
    total, back = np.zeros(n), n - np.arange(n)
    back[0] = 0
    for a, b in zip(*runs(mask), strict=True):
        total += prefix[back + b] - prefix[back + a]
    return total


def rotated_sums(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``out[r]`` = sum of ``values`` over ``np.roll(mask, r)``: the mask moves and the values stay."""
    back = shifted_sums(values, mask)
    return back[-np.arange(len(back)) % len(back)]


def shift_null(values: np.ndarray, mask: np.ndarray, statistic: str = "mass") -> np.ndarray:
    """``mass_share`` ("mass") or ``auroc`` of the mask under all n circular shifts of ``values``: float64 [n]."""
    n, n_pos = len(values), int(mask.sum())
    if statistic == "mass":
        positive = np.maximum(values, 0.0)
        total = positive.sum()
        return shifted_sums(positive, mask) / total if total > 0 else np.full(n, math.nan)
    if not 0 < n_pos < n:
        return np.full(n, math.nan)
    return (shifted_sums(ranks(values), mask) - n_pos * (n_pos + 1) / 2) / (n_pos * (n - n_pos))


def placement_null(values: np.ndarray, mask: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """``mass_share`` of ``draws`` random placements of spans of the same lengths, disjoint, in any order.

    Returns:
        float64 [draws + 1]; index 0 is the observed placement.
    """
    rng = np.random.default_rng(seed)
    positive = np.maximum(values, 0.0)
    prefix = np.concatenate(([0.0], np.cumsum(positive)))
    starts, ends = runs(mask)
    lengths, out = ends - starts, np.empty(draws + 1)
    out[0] = positive[mask].sum()
    free = len(values) - int(lengths.sum())
    for draw in range(1, draws + 1):
        order = rng.permutation(lengths)
        # m spans among `free` unmarked positions: choosing m of free + m slots makes every placement equally likely.
        slots = np.sort(rng.choice(free + len(order), size=len(order), replace=False)) - np.arange(len(order))
        begin = slots + np.concatenate(([0], np.cumsum(order)[:-1])).astype(int)
        out[draw] = (prefix[begin + order] - prefix[begin]).sum()
    return out / prefix[-1] if prefix[-1] > 0 else np.full(draws + 1, math.nan)


def rotations(values: np.ndarray, lengths: np.ndarray, cited: np.ndarray) -> np.ndarray:
    """Excess mass of the cited units under all rotations of the citation over the k units of the post.

    ``out[r]`` = sum over units cited after rotating by r of (positive value / total - length / total length). Its mean
    over all rotations is exactly 0. Values keep their own lengths, so a long unit is expected to hold more.

    Args:
        values: float64 [k] per unit. lengths: [k] characters. cited: bool [k].

    Returns:
        float64 [k]; NaN when no value is positive.
    """
    positive = np.maximum(values, 0.0)
    if not positive.sum() > 0:
        return np.full(len(values), math.nan)
    excess = positive / positive.sum() - lengths / lengths.sum()
    return rotated_sums(excess, cited)


def atoms(char_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest pieces of a map on characters: runs of one value (a token of several characters is one piece).

    Returns:
        int ``[pieces]`` where each starts, and how many characters it has.
    """
    starts = np.flatnonzero(np.concatenate(([True], char_values[1:] != char_values[:-1])))
    return starts, np.diff(np.append(starts, len(char_values)))


def atom_null(char_values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mass share of the mask, the mask rotated over the map's pieces: float64 ``[pieces]``, the identity first.

    As in ``rotations``, each piece is compared with its own length, so that the mean over rotations is the length
    share. NaN when nothing is positive.
    """
    starts, sizes = atoms(char_values)
    positive = np.add.reduceat(np.maximum(char_values, 0.0), starts)
    if not positive.sum() > 0 or not np.isfinite(positive).all():
        return np.full(len(starts), math.nan)
    weight = np.add.reduceat(mask.astype(np.float64), starts) / sizes
    excess = positive / positive.sum() - sizes / len(char_values)
    moved = np.fft.irfft(np.fft.rfft(excess) * np.conj(np.fft.rfft(weight)), len(starts))
    null = moved + float(mask.mean())
    null[0] = float(positive @ weight / positive.sum())  # a share: exactly within [0, 1], which the transform is not
    return null


def arrangements(cited: np.ndarray, most: int = 5000, seed: int = 0) -> np.ndarray:
    """All places a citation could have had: its runs of units kept whole, in any order and position, never wrapped.

    Args:
        cited: bool [k]. most: beyond so many arrangements, that many are drawn at random instead.

    Returns:
        bool [P, k], distinct when enumerated; the citation itself is one of them, the first where they are drawn.
    """
    return _arrangements(np.asarray(cited, dtype=bool).tobytes(), most, seed)


@functools.lru_cache(maxsize=4)  # each post asks twice
def _arrangements(places: bytes, most: int, seed: int) -> np.ndarray:
    cited = np.frombuffer(places, dtype=bool)
    starts, ends = runs(cited)
    lengths = (ends - starts).tolist()
    free, m = len(cited) - sum(lengths), len(lengths)
    orders = sorted(set(itertools.permutations(lengths))) if m <= 6 else []
    enumerated = bool(orders) and len(orders) * math.comb(free + m, m) <= most
    if enumerated:
        chosen = [(order, slots) for order in orders for slots in itertools.combinations(range(free + m), m)]
    else:
        rng = np.random.default_rng(seed)
        draws = (np.sort(rng.choice(free + m, size=m, replace=False)) for _ in range(most))
        chosen = [(tuple(rng.permutation(lengths)), tuple(slots)) for slots in draws]
    sizes = np.array([order for order, _ in chosen], dtype=np.int64).reshape(len(chosen), m)
    slots = np.array([at for _, at in chosen], dtype=np.int64).reshape(len(chosen), m)
    starts = slots - np.arange(m) + np.cumsum(sizes, axis=1) - sizes
    edges, rows = np.zeros((len(chosen), len(cited) + 1), np.int64), np.arange(len(chosen))[:, None]
    np.add.at(edges, (rows, starts), 1)
    np.add.at(edges, (rows, starts + sizes), -1)
    placed = np.cumsum(edges[:, :-1], axis=1) > 0
    # Runs of different length that come to touch can give one mask twice.
    return np.unique(placed, axis=0) if enumerated else np.concatenate([cited[None], placed])


def circular_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of ``a`` with ``np.roll(b, k)`` for every k: float64 [n]; NaN when either is zero."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not np.isfinite(norm) or norm == 0:
        return np.full(len(a), math.nan)
    spectrum = np.fft.rfft(a) * np.conj(np.fft.rfft(b))
    return np.fft.irfft(spectrum, len(a)) / norm


def band(null: np.ndarray) -> tuple[float, float]:
    """5 % and 95 % quantiles (linear, as ``numpy.quantile``, which takes 30 times longer on short arrays)."""
    ordered = np.sort(null)
    at = 0.05 * (len(ordered) - 1)
    low = int(at)
    high, rest = min(low + 1, len(ordered) - 1), at - low
    bottom = ordered[low] + rest * (ordered[high] - ordered[low])
    top = ordered[-1 - low] + rest * (ordered[-1 - high] - ordered[-1 - low])
    return float(bottom), float(top)


def p_greater(null: np.ndarray) -> float:
    """Share of the null at least as large as its identity (index 0), which is counted: never below 1 / len(null)."""
    if np.isnan(null[0]):
        return math.nan
    return float(np.mean(null >= null[0] - TIE * max(1.0, abs(null[0]))))
