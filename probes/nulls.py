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
from probes.model import Attribution, Check, Citation, Report, Span
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


def null_post(rng: np.random.Generator, kind: str, clauses: tuple[int, int] = (5, 41)) -> dict[str, Any]:
    """Arguments of ``examine`` for a post where maps and citation have nothing to do with each other.

    Args:
        kind: smooth | words: of the map on characters; the erasure map lives on clauses in both.
        clauses: fewest, and one more than most.
    """
    k = int(rng.integers(*clauses))
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
    maps = [_char_map("ig", "label", values), _char_map("ig", "explanation", other)]
    maps += [clause_map("erase", v, units, t) for t, v in zip(("label", "explanation"), clause, strict=True)]
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


def clause_map(method: str, values: np.ndarray, units: list[Span], target: str = "label") -> Attribution:
    """A map with one value per clause."""
    chars = np.concatenate([np.full(b - a, v / (b - a)) for (a, b), v in zip(units, values, strict=True)])
    return _made(method, target, "clause", values, tuple(units), chars)


def _char_map(method: str, target: str, values: np.ndarray) -> Attribution:
    return _made(method, target, "char", values, tuple((i, i + 1) for i in range(len(values))), values)


def _made(
    method: str, target: str, unit: str, values: np.ndarray, spans: tuple[Span, ...], chars: np.ndarray
) -> Attribution:
    f = float(np.abs(values).sum()) + 1.0
    return Attribution("null", method, target, unit, values, spans, chars, "pad", f, 0.0, 0.0, 0.0, True, 1, 1, 0.0,
                       "float32", 0, "0" * 16, {})  # fmt: skip


def post_error_rates(draws: int, seed: int = 0) -> dict[tuple[str, str, str], tuple[float, int]]:
    """(check, method, kind of map) -> (share of p <= 0.05, posts where the check had a p-value that could reach it).

    As many posts of 5 to 19 clauses as of 20 to 40, ``draws`` each: below 20 a test over clauses can not reach 0.05.
    """
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for kind in ("smooth", "words"):
        for at in range(2 * draws):
            post = null_post(rng, kind, ((20, 41), (5, 20))[at % 2])
            for check in examine(**post).report.checks:
                if check.p is not None and 1 / check.n <= LEVEL:
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
    report = Report("null", _measured(rng), "inconclusive", ())
    return Evidence(report, "high", excess, maps, dict(maps), other, lengths, cited, {}, user)


def _measured(rng: np.random.Generator) -> tuple[Check, ...]:
    """Checks that run the model, when nothing is true; their size differs from post to post."""
    size = float(rng.gamma(1.0))
    made = [_check("weight_of_evidence", "model", size * float(rng.standard_t(2)), ())]
    for name in ("necessity", "sufficiency"):
        value, *draws = (size * rng.gamma(0.3, size=21)).tolist()
        made.append(_check(name, "erase", value, tuple(draws)))
    return tuple(made)


def _check(name: str, method: str, value: float, draws: tuple[float, ...]) -> Check:
    return Check(name, method, value, None, None, None, None, None, len(draws), "ok", (), draws)


def null_insertions(rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Insertions of one post: how much the label moves and what is mentioned go together between posts, not within."""
    strength = rng.random()
    shifts = strength * rng.beta(0.5, 2.0, size=8)
    said = rng.random(8) < strength
    return tuple(zip(shifts.tolist(), said.astype(float).tolist(), strict=True))


def data_set_error_rates(draws: int, seed: int = 0, posts: int = 12, authors: int = 0) -> dict[tuple[str, str], float]:
    """(test, method) -> share of p <= 0.05 over null data sets; "any (Holm)" is the family-wise error.

    Args:
        authors: 0 for independent posts; else every author repeats one post ``posts / authors`` times, the worst case.
    """
    rng = np.random.default_rng(seed)
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(draws):
        if authors:
            own = [(null_evidence(rng, str(author)), null_insertions(rng)) for author in range(authors)]
            made = [one for one in own for _ in range(posts // authors)]
        else:
            made = [(null_evidence(rng, None), null_insertions(rng)) for _ in range(posts)]
        evidence, moved = [one for one, _ in made], [pairs for _, pairs in made]
        tests = summarise_tests(evidence, ("ig", "erase"), 199, int(rng.integers(2**31)), moved)
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
