"""How well a saliency map and a set of cited units agree, and how well two maps do: one number each, no null here.

``values`` are float64 ``[k]`` per unit, ``cited`` bool ``[k]``. Every statistic is NaN where it is not defined, never a
number that looks like one. F1 and IOU-F1: DeYoung et al. 2020 (ERASER); W: Kendall & Smith 1939.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from probes import stats
from probes.records import Span

IOU_MATCH = 0.5


def top(values: np.ndarray, k: int) -> np.ndarray:
    """bool ``[len(values)]``: the k largest values, the earlier of equal ones; only positive values count."""
    order = np.argsort(-values, kind="stable")[:k]
    mask = np.zeros(len(values), bool)
    mask[order] = True
    return mask & (values > 0)


def f1_at_k(values: np.ndarray, cited: np.ndarray) -> float:
    """F1 of the top-k units against the cited ones, k as many as are cited. NaN when nothing or everything is cited."""
    k = int(cited.sum())
    if not 0 < k < len(cited) or not np.isfinite(values).all():
        return math.nan
    picked = top(values, k)
    return 2 * float((picked & cited).sum()) / (float(picked.sum()) + k)


def iou_f1(values: np.ndarray, cited: np.ndarray, units: Sequence[Span] | np.ndarray) -> float:
    """F1 over runs of units: a run of the top-k units matches a cited run when their characters' IOU is >= 0.5."""
    k = int(cited.sum())
    if not 0 < k < len(cited) or not np.isfinite(values).all():
        return math.nan
    edges = np.asarray(units)
    (a, b), (x, y) = (_char_runs(mask, edges) for mask in (top(values, k), cited))
    if not len(a):
        return 0.0
    common = np.minimum.outer(b, y) - np.maximum.outer(a, x)
    match = np.maximum(common, 0) / (np.maximum.outer(b, y) - np.minimum.outer(a, x)) >= IOU_MATCH
    hit, found = float(match.any(1).mean()), float(match.any(0).mean())
    return 2 * hit * found / (hit + found) if hit + found else 0.0


def _char_runs(mask: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last characters of runs of units."""
    starts, ends = stats.runs(mask)
    return edges[starts, 0], edges[ends - 1, 1]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine; NaN when either is zero or not finite."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if np.isfinite(norm) and norm > 0 else math.nan


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson r; NaN for fewer than 3 values or a constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0 or not np.isfinite(a @ b):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))  # ten times faster than numpy.corrcoef on short arrays
    return min(1.0, max(-1.0, float(a @ b) / norm)) if norm > 0 else math.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson r of average ranks. On sparse maps it weighs the order among near-zero values: shown, never evidence."""
    return pearson(stats.ranks(a), stats.ranks(b)) if np.isfinite(a @ b) else math.nan


def top_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the top quarter of units (at least one) that two maps have in common, over what either has (Jaccard)."""
    if len(a) < 3 or not np.isfinite(a @ b):
        return math.nan
    k = max(1, len(a) // 4)
    one, other = top(a, k), top(b, k)
    return float((one & other).sum() / (one | other).sum()) if (one | other).any() else math.nan


CONSISTENCY: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cosine": cosine,
    "pearson": pearson,
    "top_overlap": top_overlap,
    "spearman": spearman,
}


def rotated(statistic: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``statistic(a, np.roll(b, r))`` for all r: float64 ``[k]``, the identity first."""
    return np.array([statistic(a, np.roll(b, r)) for r in range(len(b))])


def kendall_w(maps: Sequence[np.ndarray]) -> float:
    """Kendall's coefficient of concordance of m maps on k units, with the correction for ties; 1 = same order.

    NaN for fewer than 2 maps or 3 units, or when no map orders anything.
    """
    if len(maps) < 2 or len(maps[0]) < 3 or not all(np.isfinite(m).all() for m in maps):
        return math.nan
    table = np.stack([stats.ranks(m) for m in maps])
    m, k = table.shape
    spread = float(((table.sum(0) - m * (k + 1) / 2) ** 2).sum())
    ties = sum(float((counts**3 - counts).sum()) for row in table for counts in [np.unique(row, return_counts=True)[1]])
    room = m * m * (k**3 - k) - m * ties
    return 12 * spread / room if room > 0 else math.nan


def mean_pairwise(statistic: Callable[[np.ndarray, np.ndarray], float], maps: Sequence[np.ndarray]) -> float:
    """Mean of a statistic over all pairs of maps; NaN without a pair where it is defined."""
    found = [statistic(a, b) for i, a in enumerate(maps) for b in maps[i + 1 :]]
    found = [value for value in found if math.isfinite(value)]
    return float(np.mean(found)) if found else math.nan
