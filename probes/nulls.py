"""Error rates and power of every p-value that is printed, measured on maps and citations drawn independently.

The worlds here are made of numbers only: saliency that is smooth along the text or constant on words, heavy-tailed
over clauses of unequal length, and citations that are stretches or whole words. A p-value is right when it is at most
0.05 in at most 5 % of such worlds; the bound is 7.5 % (``probes validate``, V10).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from probes import stats
from probes.crosscheck import Evidence, examine
from probes.model import Attribution, Citation, Report, Span
from probes.summary import summarise_tests

LEVEL = 0.05


def smooth(rng: np.random.Generator, n: int, scale: float = 4.0) -> np.ndarray:
    """float64 ``[n]``: Gaussian noise with a correlation length of about ``scale`` characters."""
    kernel = np.exp(-0.5 * (np.arange(-16, 17) / scale) ** 2)
    return np.convolve(rng.normal(size=n + 32), kernel, "valid")


def wordwise(rng: np.random.Generator, units: list[Span]) -> tuple[np.ndarray, list[Span]]:
    """A heavy-tailed map that is constant on words, as tokens make it, and the words."""
    words: list[Span] = []
    for a, b in units:
        while a < b:
            size = min(b - a, int(rng.integers(2, 9)))
            words.append((a, a + size))
            a += size
    values = np.zeros(units[-1][1])
    for a, b in words:
        values[a:b] = rng.gamma(0.3) * rng.choice([1.0, 1.0, -1.0]) / (b - a)
    return values, words


def null_post(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """Arguments of ``examine`` for a post where maps and citation have nothing to do with each other.

    Args:
        kind: smooth | words: of the map on characters; the erasure map lives on clauses in both.
    """
    k = int(rng.integers(5, 29))
    ends = np.cumsum(rng.integers(6, 18, size=k)).tolist()
    units: list[Span] = list(zip([0, *ends[:-1]], ends, strict=True))
    length = ends[-1]
    if kind == "words":
        values, words = wordwise(rng, units)
        at = int(rng.integers(len(words)))
        cited = (words[at][0], words[min(at + int(rng.integers(0, 4)), len(words) - 1)][1])
        other, _ = wordwise(rng, units)
    else:
        values, other = smooth(rng, length), smooth(rng, length)
        start = int(rng.integers(0, length - 6))
        cited = (start, min(length, start + int(rng.integers(5, 20))))
    clause = [rng.gamma(0.3, size=k) * rng.choice([1.0, 1.0, -1.0], size=k) for _ in range(2)]
    maps = [_map("ig", "label", values, None), _map("ig", "explanation", other, None)]
    maps += [_map("erase", t, v, units) for t, v in zip(("label", "explanation"), clause, strict=True)]
    some = int(rng.integers(k))
    return {
        "attributions": maps,
        "citations": [Citation("c1", (0, 5), (cited,), "quote", 1.0, "")],
        "example_id": "null",
        "length": length,
        "units": units,
        "explanation_length": 20,
        "cues": [units[some]],
        "rationales": [units[int(rng.integers(k))]],
    }


def _map(method: str, target: str, values: np.ndarray, units: list[Span] | None) -> Attribution:
    chars = values
    if units is not None:
        chars = np.concatenate([np.full(b - a, v / (b - a)) for (a, b), v in zip(units, values, strict=True)])
    spans = tuple(units) if units is not None else tuple((i, i + 1) for i in range(len(values)))
    unit = "char" if units is None else "clause"
    f = float(np.abs(values).sum()) + 1.0
    return Attribution("null", method, target, unit, values, spans, chars, "pad", f, 0.0, 0.0, 0.0, True, 1, 1, 0.0,
                       "float32", 0, "0" * 16, {})  # fmt: skip


def post_error_rates(draws: int, seed: int = 0) -> dict[tuple[str, str, str], tuple[float, int]]:
    """(check, method, kind of map) -> (share of p <= 0.05, posts where the check had a p-value that could reach it)."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for kind in ("smooth", "words"):
        for _ in range(draws):
            for check in examine(**null_post(rng, kind)).report.checks:
                if check.p is not None:
                    found[check.name, check.method, kind].append(check.p <= LEVEL + 1e-12)
    return {key: (float(np.mean(hits)), len(hits)) for key, hits in found.items()}


def null_evidence(rng: np.random.Generator, user: str | None, effect: float = 0.0) -> Evidence:
    """What a post contributes to the data set when nothing is true, or, with ``effect``, part of it.

    Args:
        effect: share of the label's saliency that sits in the cited clause whatever the rest does; 0 is the null.
    """
    k = int(rng.integers(4, 9))
    lengths = rng.integers(6, 18, size=k).astype(np.float64)
    cited = np.arange(k) == rng.integers(k)
    maps = {m: rng.gamma(0.3, size=k) + 1e-9 for m in ("ig", "erase")}
    maps = {m: (1 - effect) * v / v.sum() + effect * cited for m, v in maps.items()}
    other = {m: rng.gamma(0.3, size=k) for m in ("ig", "erase")}
    other = {m: (1 - effect) * v / v.sum() + effect * cited for m, v in other.items()}
    excess = {m: stats.rotations(v, lengths, cited) for m, v in maps.items()}
    report = Report("null", (), "inconclusive", ())
    return Evidence(report, "high", excess, maps, dict(maps), other, lengths, cited, {}, user)


def data_set_error_rates(draws: int, seed: int = 0, posts: int = 12, authors: int = 0) -> dict[tuple[str, str], float]:
    """(test, method) -> share of p <= 0.05 over null data sets; "any (Holm)" is the family-wise error.

    Args:
        authors: 0 for independent posts; else every author repeats one post ``posts / authors`` times, the worst case.
    """
    rng = np.random.default_rng(seed)
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(draws):
        if authors:
            own = [null_evidence(rng, str(author)) for author in range(authors)]
            evidence = [one for one in own for _ in range(posts // authors)]
        else:
            evidence = [null_evidence(rng, None) for _ in range(posts)]
        tests = summarise_tests(evidence, ("ig", "erase"), draws=199, seed=int(rng.integers(2**31)))
        for (name, method), p in tests.items():
            if p is not None:
                hits[name, method].append(p <= LEVEL + 1e-12)
    return {key: float(np.mean(found)) for key, found in hits.items()}


def power(effect: float, posts: int, draws: int, seed: int = 0) -> float:
    """Share of data sets in which the excess test of integrated gradients rejects (p <= 0.05)."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(draws):
        nulls = [null_evidence(rng, None, effect).excess["ig"] for _ in range(posts)]
        test = stats.mean_test(nulls, 199, int(rng.integers(2**31)))
        hits += test is not None and test.p <= LEVEL
    return hits / draws
