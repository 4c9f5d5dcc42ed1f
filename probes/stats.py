"""Nulls, p-values and intervals for saliency over text.

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
  (``mean_test``), whose resolution grows with every post.
* Rotation does not remove a preference that map and explanation share (both always like the last clause): compare with
  the mismatched null in ``crosscheck.summarise``.

All arrays are float64 or bool of one length n; a statistic's null distribution has the identity at index 0.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from probes.errors import ProbeInputError

NULLS = ("circular", "placement")
MIN_POSTS = 5  # for a test or an interval: of fewer posts (authors) no interval holds what it says
_MANY_RUNS = 1000  # of a mask: no honest citation has more
_TIE = 1e-9  # statistics this close count as tied: sums in another order must not decide a comparison


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


def mass_share(values: np.ndarray, mask: np.ndarray) -> float:
    """Relevance mass (Arras et al. 2022): sum of the positive part over ``mask`` / sum of the positive part, in [0, 1].

    By chance it is ``mask.mean()``. NaN when nothing is positive or a value is not finite.
    """
    positive = np.maximum(values, 0.0)
    total = positive.sum()
    return float(positive[mask].sum() / total) if np.isfinite(total) and total > 0 else math.nan


def density_ratio(share: float, length_share: float) -> float:
    """Mass per character inside / outside: ``(s/l) / ((1-s)/(1-l))``. 1 = chance, inf = everything is inside.

    NaN where there is no inside or no outside.
    """
    if not 0 < length_share < 1 or math.isnan(share):
        return math.nan
    outside = (1 - share) * length_share
    return share * (1 - length_share) / outside if outside > _TIE else math.inf


def ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks from 1."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(np.append(starts, len(values)))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (counts + 1) / 2.0, counts)
    return ranks


def auroc(values: np.ndarray, positives: np.ndarray) -> float:
    """Area under the ROC curve; ties count half (Mann-Whitney). NaN unless both classes are present."""
    n_pos = int(positives.sum())
    n_neg = len(values) - n_pos
    if not n_pos or not n_neg or not np.isfinite(values).all():
        return math.nan
    return float((ranks(values)[positives].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(values: np.ndarray, positives: np.ndarray) -> float:
    """Sum of precision times recall step over distinct thresholds (tied values enter together); chance = base rate."""
    if not positives.any() or not np.isfinite(values).all():
        return math.nan
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(positives[order])
    last = np.append(np.diff(values[order]) != 0, True)  # where a run of tied values ends
    precision, recall = hits[last] / (np.flatnonzero(last) + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return edges[::2], edges[1::2]


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
        chosen = [(rng.permutation(lengths).tolist(), slots.tolist()) for slots in draws]
    placed = np.zeros((len(chosen), len(cited)), bool)
    for row, (order, slots) in zip(placed, chosen, strict=True):
        at = 0
        for i, (length, slot) in enumerate(zip(order, slots, strict=True)):
            row[slot - i + at : slot - i + at + length] = True
            at += length
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
    return float(np.mean(null >= null[0] - _TIE * max(1.0, abs(null[0]))))


@dataclass(frozen=True)
class MeanTest:
    """One test for a whole data set: ``value`` against the distribution of the mean over independent random shifts."""

    value: float
    null_mean: float
    null_q05: float
    null_q95: float
    p: float
    n: int


def mean_test(
    nulls: Sequence[np.ndarray],
    draws: int = 9999,
    seed: int = 0,
    clusters: Sequence[object] | None = None,
    two_sided: bool = False,
) -> MeanTest | None:
    """Is the mean over posts of ``null[0]`` larger than when every post is shifted at random and independently?

    Posts with a NaN are left out; None when none is left. ``p = (1 + #(draw >= value)) / (1 + draws)``
    (Phipson & Smyth 2010); ``two_sided`` asks larger or smaller: twice the smaller of both. Posts of one cluster
    (author) may depend on one another in a way nobody knows. p is the larger of two: with all posts shifted
    independently, and with those of an author at one shared quantile of their nulls, the most a mean can vary.
    """
    chosen = [i for i, null in enumerate(nulls) if len(null) and np.isfinite(null).all()]
    kept = [nulls[i] for i in chosen]
    if not kept:
        return None
    rng = np.random.default_rng(seed)
    value = float(np.mean([null[0] for null in kept]))
    many = Counter(str(clusters[i]) for i in chosen) if clusters is not None else Counter()
    authors = [str(clusters[i]) if clusters is not None and many[str(clusters[i])] > 1 else None for i in chosen]
    means = [_means(kept, [None] * len(kept), draws, rng)]
    if any(authors):
        means.append(_means(kept, authors, draws, rng))
    tie = _TIE * max(1.0, abs(value))
    upper = max((1 + int(np.sum(found >= value - tie))) / (1 + draws) for found in means)
    lower = max((1 + int(np.sum(found <= value + tie))) / (1 + draws) for found in means)
    p = min(1.0, 2 * min(upper, lower)) if two_sided else upper
    low, high = np.quantile(means[-1], [0.05, 0.95])
    expected = float(np.mean([null.mean() for null in kept]))
    return MeanTest(value, expected, float(low), float(high), p, len(kept))


def _means(
    nulls: Sequence[np.ndarray], authors: Sequence[str | None], draws: int, rng: np.random.Generator
) -> np.ndarray:
    """float64 ``[draws]``: means over posts at random; those of one author at one quantile of their nulls."""
    total = np.zeros(draws)
    shared: dict[str, np.ndarray] = {}
    for null, author in zip(nulls, authors, strict=True):
        if author is None:
            total += null[rng.integers(len(null), size=draws)]
            continue
        if author not in shared:
            shared[author] = rng.random(draws)
        total += np.sort(null)[(shared[author] * len(null)).astype(int)]
    return total / len(nulls)


def permutation_test(tables: Sequence[np.ndarray], draws: int = 9999, seed: int = 0) -> MeanTest | None:
    """Is the mean of the diagonals larger than when the columns of every table are permuted at random?

    Exact when the columns are exchangeable: row i is a post, column j what post j brought, and nothing ties i to its
    own. ``null_mean`` is the mean off the diagonals. None without a table of two.

    Args:
        tables: float64 ``[b, b]`` each, finite.
    """
    tables = [table for table in tables if len(table)]
    n = sum(map(len, tables))
    if not any(len(table) > 1 for table in tables):
        return None
    rng = np.random.default_rng(seed)
    value = float(sum(np.trace(table) for table in tables)) / n
    total = np.zeros(draws)
    for table in tables:
        rows = np.arange(len(table))
        for start in range(0, draws, 2000):  # in blocks, for memory
            part = total[start : start + 2000]
            part += table[rows, rng.random((len(part), len(table))).argsort(1)].sum(1)
    means = total / n
    low, high = np.quantile(means, [0.05, 0.95])
    reached = int(np.sum(means >= value - _TIE * max(1.0, abs(value))))
    off = np.concatenate([table[~np.eye(len(table), dtype=bool)] for table in tables])
    return MeanTest(value, float(off.mean()), float(low), float(high), (1 + reached) / (1 + draws), n)


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[object] | None = None,
) -> tuple[float, float] | None:
    """BCa interval (Efron 1987) of the mean, resampling posts, or whole ``clusters`` (authors) when given.

    A bootstrap of n posts takes the spread of the sample for that of the world, which is n / (n - 1) larger and not
    known: its "95 %" hold the mean of ten normal values in 90 %. So its normal quantiles are Student's with n - 1
    degrees of freedom, times the root of n / (n - 1) (Hesterberg 2015, section 5.3). Skewed and rare values still need
    more posts (``docs/statistics.md``).

    NaN values are left out. None with fewer than ``MIN_POSTS`` posts (clusters), or ``n_boot`` 0. A constant sample
    gives a point: the data show no spread, which is not the same as certainty.
    """
    data = np.asarray(values, dtype=np.float64)
    keep = np.isfinite(data)
    labels = (
        np.arange(len(data))
        if clusters is None
        else np.unique(np.array(list(map(str, clusters))), return_inverse=True)[1]
    )
    data, labels = data[keep], labels[keep]
    groups, index = np.unique(labels, return_inverse=True)
    if len(groups) < MIN_POSTS or n_boot < 1:
        return None
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    sums, counts = np.bincount(index, weights=data), np.bincount(index).astype(np.float64)
    rng = np.random.default_rng(seed)
    draws = np.empty(n_boot)
    for start in range(0, n_boot, 256):  # in blocks: 2000 draws of 100,000 posts would not fit in memory at once
        pick = rng.integers(len(groups), size=(min(256, n_boot - start), len(groups)))
        draws[start : start + len(pick)] = sums[pick].sum(1) / counts[pick].sum(1)
    estimate = data.mean()
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum() ** 1.5)
    acceleration = float((deviation**3).sum()) / (6 * spread) if spread > 0 else 0.0
    normal = NormalDist()
    below = float(np.mean(draws < estimate) + np.mean(draws == estimate) / 2)
    bias = normal.inv_cdf(min(max(below, 1 / (n_boot + 1)), n_boot / (n_boot + 1)))
    wide = _student((1 + level) / 2, len(groups) - 1) * math.sqrt(len(groups) / (len(groups) - 1))
    ends = []
    for z in (bias - wide, bias + wide):
        left = 1 - acceleration * z
        ends.append(normal.cdf(bias + z / left) if left > 0 else float(z > 0))
    low, high = np.quantile(draws, ends)
    return float(low), float(high)


def _student(level: float, freedom: int) -> float:
    """A quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, level))


def holm(p_values: Sequence[float] | np.ndarray) -> list[float]:
    """Holm (1979) adjusted p-values in the given order; a NaN stays NaN and is not counted as a test."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted, valid = np.full(len(p), math.nan), np.flatnonzero(np.isfinite(p))
    running = 0.0
    for rank, i in enumerate(valid[np.argsort(p[valid], kind="stable")]):
        running = max(running, min(1.0, float(p[i]) * (len(valid) - rank)))
        adjusted[i] = running
    return adjusted.tolist()


@dataclass(frozen=True)
class Diagnosticity:
    """P(faithful scores above unfaithful), ties half, with a Wilson 95 % interval over ``n`` pairs."""

    value: float
    ci: tuple[float, float]
    n: int


def diagnosticity(
    faithful: Sequence[float] | np.ndarray,
    unfaithful: Sequence[float] | np.ndarray,
    level: float = 0.95,
    clusters: Sequence[object] | None = None,
) -> Diagnosticity | None:
    """Paired ``P(f > u) + 0.5 P(f = u)`` (Chan et al. 2022). Pairs with a NaN are left out; None when none is left.

    The Wilson interval stays honest at 0 and 1, where a bootstrap gives a point. It counts clusters (authors), not
    pairs, where they are given: pairs of one author may all say the same.

    Raises:
        ValueError: the two sequences differ in length.
    """
    f, u = np.asarray(faithful, dtype=np.float64), np.asarray(unfaithful, dtype=np.float64)
    if f.shape != u.shape:
        raise ValueError(f"pairs needed: {len(f)} faithful and {len(u)} unfaithful scores")
    keep = np.isfinite(f) & np.isfinite(u)
    n = int(keep.sum())
    if not n:
        return None
    gap = f[keep] - u[keep]
    tied = np.abs(gap) <= _TIE
    rate = float(np.mean(np.where(tied, 0.5, gap > 0)))
    z = NormalDist().inv_cdf((1 + level) / 2)
    free = n if clusters is None else len({str(c) for c, used in zip(clusters, keep, strict=True) if used})
    centre = (rate + z * z / (2 * free)) / (1 + z * z / free)
    half = z / (1 + z * z / free) * math.sqrt(rate * (1 - rate) / free + z * z / (4 * free * free))
    return Diagnosticity(rate, (max(0.0, centre - half), min(1.0, centre + half)), n)
