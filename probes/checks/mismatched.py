"""What a post has by itself against what it has with the citation or the explanation of another post.

Explanations (citations) are permuted among posts of one label. Rotation (``probes.nulls``) keeps a preference that map
and explanation share, such as for the last clause; this does not, for a stranger's has it too. A post of k clauses can
take part in the place of one of m: maps and citations are put at the same relative position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probes import stats
from probes.checks.agreement import CONSISTENCY
from probes.checks.crosscheck import Evidence

_TOGETHER = 40  # most posts that exchange citations and explanations; the table of all pairs of them is made


def authors(evidence: Sequence[Evidence]) -> list[str]:
    """Of each post; one without a known author is its own."""
    return [f"post {i}" if e.user is None else f"user {e.user}" for i, e in enumerate(evidence)]


def _blocks(evidence: Sequence[Evidence], seed: int) -> list[list[int]]:
    """Posts that may exchange citations or explanations: at random, up to ``_TOGETHER`` of one label together.

    Labels with one post are put together, and a post that is left alone with others.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for i, one in enumerate(evidence):
        by_label.setdefault(one.label, []).append(i)
    groups = [group for group in by_label.values() if len(group) > 1]
    single = [group[0] for group in by_label.values() if len(group) == 1]
    if len(single) == 1 and groups:
        groups[0].append(single[0])
    elif single:
        groups.append(single)
    return [
        block.tolist()
        for group in groups
        for block in np.array_split(rng.permutation(np.array(group, dtype=int)), -(-len(group) // _TOGETHER))
    ]


def _exchanged(
    evidence: Sequence[Evidence],
    blocks: Sequence[Sequence[int]],
    pairs: Callable[[int, int], float],
    draws: int,
    seed: int,
) -> stats.MeanTest | None:
    """Is what post i has by itself larger than what it has with the citation or explanation of another of its block?

    A permutation test, and where an author has several posts also that of ``stats.mean_test``: the larger p counts.
    """
    tables = [np.array([[pairs(i, j) for j in block] for i in block]) for block in blocks]
    test = stats.permutation_test(tables, draws, seed)
    who = authors(evidence)
    if test is None or len(set(who)) == len(who):
        return test
    rows = [np.concatenate([[t[i, i]], np.delete(t[i], i)]) for t in tables for i in range(len(t))]
    dependent = stats.mean_test(rows, draws, seed, [who[i] for block in blocks for i in block])
    return test if dependent is None else dataclasses.replace(test, p=max(test.p, dependent.p))


def transfer_map(values: np.ndarray, m: int) -> np.ndarray:
    """A map of k clauses on m clauses: each has the value of the clause at the same relative position. float64 [m].

    Spreading or adding values up would make the stranger blurred, or leave it clauses without a value; then it loses
    against the own map for that reason alone (up to every time, ``tests/probes/results/test_summary.py``).
    """
    return values[((np.arange(m) + 0.5) * len(values) / m).astype(int)]


def transfer_citation(cited: np.ndarray, m: int) -> np.ndarray:
    """A citation among k clauses put among m by relative position: bool [m]; something stays cited."""
    onto = ((np.flatnonzero(cited) + 0.5) * m / len(cited)).astype(int)
    return np.isin(np.arange(m), onto)


def mismatched_citations(evidence: Sequence[Evidence], method: str, draws: int, seed: int) -> stats.MeanTest | None:
    """The excess mass of a post's own citation against that of the citations of other posts in its place."""
    excess = [e.mass[method] / e.mass[method].sum() - e.lengths / e.lengths.sum() for e in evidence]

    def held(i: int, j: int) -> float:
        return float(excess[i][transfer_citation(evidence[j].cited, len(excess[i]))].sum())

    return _exchanged(evidence, _blocks(evidence, seed), held, draws, seed)


def mismatched_explanations(
    evidence: Sequence[Evidence], methods: Sequence[str], draws: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Label map against own explanation map, and against those of other posts, transferred: method -> statistic.

    Each statistic has its mean over posts, the mean over mismatched explanations, one p-value and the posts used. Where
    a transferred map is constant, it says nothing: 0.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for method in methods:
        speaking = [e for e in evidence if _has_both(e, method)]
        blocks = _blocks(speaking, seed)
        out[method] = {}
        for name, statistic in CONSISTENCY.items():

            def alike(
                i: int, j: int, method: str = method, statistic: Any = statistic, speaking: Any = speaking
            ) -> float:
                own = speaking[i].label_maps[method]
                value = statistic(own, transfer_map(speaking[j].explanation_maps[method], len(own)))
                return value if math.isfinite(value) else 0.0

            test = _exchanged(speaking, blocks, alike, draws, seed) if len(speaking) >= stats.MIN_POSTS else None
            out[method][name] = {
                "value": None if test is None else test.value,
                "mismatched": None if test is None else test.null_mean,
                "p": None if test is None else test.p,
                "n": 0 if test is None else test.n,
            }
    return out


def _has_both(e: Evidence, method: str) -> bool:
    """Whether a post has a label map and an explanation map that say something, on three clauses or more."""
    maps = (e.label_maps.get(method), e.explanation_maps.get(method))
    return len(e.lengths) >= 3 and all(m is not None and np.isfinite(m).all() and np.ptp(m) > 0 for m in maps)
