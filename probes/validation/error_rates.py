"""Error rates and power of every p-value that is printed, measured on maps and citations drawn independently.

The worlds here are made of numbers only: saliency that is smooth along the text or constant on words, heavy-tailed
over clauses of unequal length, and citations that are stretches or whole words. A p-value is right when it is at most
0.05 in at most 5 % of such worlds; the bound is 7.5 % (``probes validate``, V10).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from probes import stats
from probes.checks.crosscheck import Evidence, examine
from probes.citations.clauses import pieces
from probes.nulls import rotations
from probes.probe import Probe
from probes.records import Attribution, Check, Citation, Report, Span
from probes.results.summary import conclude, summarise_tests

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

    As many posts of 5 to 19 clauses as of 20 to 40, ``draws`` each: below 20 a test over clauses cannot reach 0.05.
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


def null_evidence(
    rng: np.random.Generator,
    user: str | None,
    effect: float = 0.0,
    shape: float = 0.3,
    clauses: tuple[int, int] = (4, 16),
    alike: bool = False,
) -> Evidence:
    """What a post contributes to the data set when nothing is true, or, with ``effect``, part of it.

    Args:
        effect: share of the label's saliency that sits in the cited clause whatever the rest does; 0 is the null.
        shape: of the gamma distribution of saliency: 0.3 is nearly all in one clause, 3 is even.
        clauses: fewest, and one more than most.
        alike: both methods have one map, with 95 % of it in one clause: what a model with one cue gives them.
    """
    k = int(rng.integers(*clauses))
    lengths = rng.integers(6, 18, size=k).astype(np.float64)
    cited = np.arange(k) == rng.integers(k)
    maps = {m: rng.gamma(shape, size=k) + 1e-9 for m in ("ig", "erase")}
    if alike:
        one = 0.05 * rng.dirichlet(np.ones(k))
        one[rng.integers(k)] += 0.95
        maps = dict.fromkeys(maps, one)
    maps = {m: (1 - effect) * v / v.sum() + effect * cited for m, v in maps.items()}
    other = {m: rng.gamma(shape, size=k) + 1e-9 for m in ("ig", "erase")}
    other = {m: (1 - effect) * v / v.sum() + effect * cited for m, v in other.items()}
    excess = {m: rotations(v, lengths, cited) for m, v in maps.items()}
    report = Report("null", _measured(rng), "inconclusive", ())
    return Evidence(report, "high", excess, maps, dict(maps), other, lengths, cited, {}, user)


def _measured(rng: np.random.Generator) -> tuple[Check, ...]:
    """Checks that run the model, when nothing is true; their size differs from post to post."""
    size, made = float(rng.gamma(1.0)), []
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


def data_set_error_rates(
    draws: int, seed: int = 0, posts: int = 12, authors: int = 0, shape: float = 0.3
) -> dict[tuple[str, str], float]:
    """(test, method) -> share of p <= 0.05 over null data sets; "any (Holm)" is the family-wise error.

    Args:
        authors: 0 for independent posts; else every author repeats one post ``posts / authors`` times.
        shape: see ``null_evidence``.
    """
    rng = np.random.default_rng(seed)
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(draws):
        if authors:
            own = [(null_evidence(rng, str(author), shape=shape), null_insertions(rng)) for author in range(authors)]
            made = [one for one in own for _ in range(posts // authors)]
        else:
            made = [(null_evidence(rng, None, shape=shape), null_insertions(rng)) for _ in range(posts)]
        evidence, moved = [one for one, _ in made], [pairs for _, pairs in made]
        tests = summarise_tests(evidence, ("ig", "erase"), 199, int(rng.integers(2**31)), moved)
        for (name, method), p in tests.items():
            if p is not None:
                hits[name, method].append(p <= LEVEL + 1e-12)
    return {key: float(np.mean(found)) for key, found in hits.items()}


def coverage(posts: int, shape: float, draws: int, seed: int = 0) -> float:
    """Share of data sets whose 95 % interval of the excess (``stats.bootstrap_ci``) holds the truth, which is 0.

    Args:
        shape: see ``null_evidence``.
    """
    rng, inside = np.random.default_rng(seed), 0
    for at in range(draws):
        values = [null_evidence(rng, None, shape=shape).excess["ig"][0] for _ in range(posts)]
        interval = stats.bootstrap_ci(values, n_boot=400, seed=at)
        inside += interval is not None and interval[0] <= 0 <= interval[1]
    return inside / draws


def conclusion_rates(posts: int, clauses: tuple[int, int], draws: int, seed: int = 0) -> dict[str, float]:
    """supported, contradicted -> share of null data sets with that conclusion: citations at random, one cue a post."""
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    for _ in range(draws):
        evidence = [null_evidence(rng, None, clauses=clauses, alike=True) for _ in range(posts)]
        found[conclude(evidence, ("ig", "erase"), 500, 199, int(rng.integers(2**31)))] += 1
    return {name: found[name] / draws for name in ("supported", "contradicted")}


def erasure_rates(
    draws: int, sets: int, seed: int = 0, made: Callable[[Probe], Probe] = lambda probe: probe, fades: float = 1.0
) -> dict[str, tuple[float, int]]:
    """Necessity and sufficiency of one clause at random, where clauses differ in length and in what each letter weighs.

    Args:
        made: what is probed in place of the closed form. fades: see ``closed_form_probe``.
    Returns:
        "necessity", "necessity, sets" and so on -> (share of p <= 0.05, posts or sets of 20 posts).
    """
    from probes.checks.faithfulness import cited_effects
    from probes.validation.selftest import closed_form_probe

    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    probe = made(closed_form_probe({c: [float(rng.gamma(0.3))] for c in letters}, lambda seen: seen[..., 0], fades))
    ids = probe.token_bytes.encode

    def checks(clauses: int) -> tuple[Check, ...]:
        chosen = rng.permutation(list(letters))[:clauses]
        post = ", ".join(letter * int(size) for letter, size in zip(chosen, rng.integers(1, 6, clauses), strict=True))
        given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
        example = probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
        a, b = pieces(post)[int(rng.integers(clauses))]
        said = post[a:b].strip(", ")
        return cited_effects(probe, example, [(post.index(said, a), post.index(said, a) + len(said))])

    hits: dict[str, list[bool]] = defaultdict(list)
    for _ in range(draws):
        for check in checks(int(rng.integers(20, 27))):  # fewer clauses cannot reach 0.05 alone
            if check.p is not None:
                hits[check.name].append(check.p <= LEVEL)
    for _ in range(sets):
        found = [checks(int(rng.integers(6, 13))) for _ in range(20)]
        for name, column in zip(("necessity", "sufficiency"), zip(*found, strict=True), strict=True):
            nulls = [np.array([c.value, *c.draws]) for c in column if c.value is not None]
            test = stats.mean_test(nulls, 199, int(rng.integers(2**31)))
            hits[f"{name}, sets"].append(test is not None and test.p <= LEVEL)
    return {name: (float(np.mean(found)), len(found)) for name, found in hits.items()}


def power(effect: float, posts: int, draws: int, seed: int = 0) -> float:
    """Share of data sets in which the excess test of integrated gradients rejects (p <= 0.05)."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(draws):
        nulls = [null_evidence(rng, None, effect).excess["ig"] for _ in range(posts)]
        test = stats.mean_test(nulls, 199, int(rng.integers(2**31)), two_sided=True)
        hits += test is not None and test.p <= LEVEL
    return hits / draws
