"""Uncertainty of scores: bootstrap over posts, paired comparison of two systems, correction for several tests."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mentalglm_jax.data.splits import bare_post
from mentalglm_jax.evaluate.metrics import averages, f1

DRAWS = 1000
MIN_POSTS = 5  # for an interval: fewer posts, drawn again and again, only say themselves


def _post_sums(
    posts: Sequence[str], gold: Bool[np.ndarray, "N C"], *predictions: Bool[np.ndarray, "N C"]
) -> list[Float[np.ndarray, "P 3 C"]]:
    """Per system: hits, predicted and gold counts of every class, summed over the rows of each distinct post."""
    post_of = _post_numbers(posts)
    found = []
    for predicted in predictions:
        sums = np.zeros((int(post_of.max()) + 1, 3, gold.shape[1]))
        np.add.at(sums, post_of, np.stack([gold & predicted, predicted, gold], axis=1))
        found.append(sums)
    return found


def _post_numbers(posts: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Which post each row is of. Copies that differ in white space, width, case or marks are one post: rows that repeat
    it say nothing new, and would make intervals narrow."""
    texts, text_of = np.unique(np.asarray(posts, dtype=object), return_inverse=True)
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(bare_post(text), len(numbers)) for text in texts], np.int64)[text_of]


def _times(size: int, draws: int, seed: int) -> Iterator[Float[np.ndarray, "D P"]]:
    """How often each of ``size`` posts is drawn, in parts that bound memory."""
    rng = np.random.default_rng(seed)
    step = max(1, 4_000_000 // size)
    for start in range(0, draws, step):
        yield rng.multinomial(size, np.full(size, 1 / size), size=min(step, draws - start)).astype(float)


def _drawn(
    kind: str, times: Float[np.ndarray, "D P"], sums: Float[np.ndarray, "P 3 C"], positive: int | None
) -> dict[str, Any]:
    hits, said, true = np.moveaxis(np.tensordot(times, sums, axes=1), 1, 0)
    found = averages(kind, hits, said, true)
    return found if positive is None else found | {"positive_f1": f1(hits, said, true)[..., positive]}


def bootstrap(
    kind: str, posts: Sequence[str], gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"],
    draws: int = DRAWS, seed: int = 0, positive: int | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """95 % percentile intervals (Efron 1979) of ``METRICS``, and of ``positive_f1`` where ``positive`` is the place of
    that class; all rows of one post are drawn together. Of fewer than ``MIN_POSTS`` posts it is all that a score can
    be."""
    (sums,) = _post_sums(posts, gold, predicted)
    parts = [_drawn(kind, times, sums, positive) for times in _times(len(sums), draws, seed)]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    few = len(sums) < MIN_POSTS
    return {name: [0.0, 1.0] if few else np.percentile(value, [2.5, 97.5]).tolist() for name, value in values.items()}


def paired_bootstrap(
    kind: str, posts: Sequence[str], gold: Bool[np.ndarray, "N C"], first: Bool[np.ndarray, "*A N C"],
    second: Bool[np.ndarray, "*B N C"], draws: int = DRAWS, seed: int = 0, positive: int | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """``first`` minus ``second`` on the same resampled posts, in the metrics of ``bootstrap``. Several runs of a system
    (a leading axis) are averaged in every sample; they are not resampled.

    Returns:
        Metric to ``difference`` (on the posts themselves), ``ci95`` (percentiles of the resampled differences) and
        ``p``: twice the share of draws on the other side of 0 (draws of exactly 0 count as such), the sample itself
        counted as one draw so that p is never 0 (Davison & Hinkley 1997, section 4.2.5), at most 1. Nor is p smaller
        than 2 ** (1 - d), d being the posts on which the two sides differ: were they alike, each would favour either
        side by the throw of a coin, and no test can say more of so few (the bootstrap would, of one post). The interval
        of fewer than ``MIN_POSTS`` posts is all that a difference can be.
    """
    sides = [_post_sums(posts, gold, *np.reshape(side, (-1, *gold.shape))) for side in (first, second)]

    def means(times: Float[np.ndarray, "D P"]) -> list[dict[str, Any]]:
        runs = [[_drawn(kind, times, sums, positive) for sums in side] for side in sides]
        return [{name: np.mean([run[name] for run in side], axis=0) for name in side[0]} for side in runs]

    size, (mine, theirs) = len(sides[0][0]), (np.mean(side, axis=0) for side in sides)
    least = 2.0 ** (1 - int((mine != theirs).any(axis=(1, 2)).sum()))
    observed = means(np.ones((1, size)))
    parts = [means(times) for times in _times(size, draws, seed)]
    result = {}
    for name in observed[0]:
        drawn = np.concatenate([a[name] - b[name] for a, b in parts])
        beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        result[name] = {
            "difference": float(observed[0][name][0] - observed[1][name][0]),
            "ci95": [-1.0, 1.0] if size < MIN_POSTS else np.percentile(drawn, [2.5, 97.5]).tolist(),
            "p": min(1.0, max(least, 2 * (1 + beyond) / (draws + 1))),
        }
    return result


def mcnemar(
    first_right: Bool[np.ndarray, " N"], second_right: Bool[np.ndarray, " N"], posts: Sequence[str]
) -> dict[str, Any]:
    """McNemar's test, exact: of the posts that only one system has right, is each side equally likely (McNemar 1947)?

    A post counts once, for the system that has more of its rows right: where a task asks several questions about a
    post, or a post is repeated, rows are not independent.

    Returns:
        ``only_first``, ``only_second`` (posts) and the two-sided binomial ``p``.
    """
    from scipy.stats import binomtest

    ahead = np.bincount(_post_numbers(posts), weights=first_right.astype(float) - second_right)
    only_first, only_second = int((ahead > 0).sum()), int((ahead < 0).sum())
    total = only_first + only_second
    p = float(binomtest(only_first, total, 0.5).pvalue) if total else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for testing all of them at once (Holm 1979), in the order given."""
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = float(largest)
    return adjusted
