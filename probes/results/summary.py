"""A data set of posts in numbers: does this model cite what it uses more than chance would?

One test per hypothesis and method, not one per post; ``tests`` lists them all, Holm-adjusted over the whole list.
``excess`` is the share of positive label saliency in the cited clauses minus their share of the length; its null is
every citation rotated over the clauses of its post, independently (``stats.mean_test``). Beside it stand a BCa interval
over posts and two sterner nulls:

* ``p_position``: the citation of another post of the same label, at the same relative position
  (``probes.checks.mismatched``). It keeps where in a post this model likes to cite and to look; what is left is no
  habit.
* ``necessity``, ``sufficiency`` (nats): the cited words erased together, or kept alone; ``_null``: the same lengths
  moved around the post (``probes.checks.faithfulness``).
* ``verdicts_by_chance``: how many verdicts of each kind citations placed at random would have had.

``conclusion`` needs both families: where p (Holm; the test of the excess is two-sided) <= 0.05 in every method of both,
``supported`` when all intervals of the excess are above 0, ``contradicted`` when all are below (the cited words carry
less than their length); else ``inconclusive``. Posts by one author (``user``) are not independent: intervals resample
authors, tests draw one quantile per author too. Where authors are not known, posts are taken as independent, and p and
intervals may be too small.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from probes import stats
from probes.checks.agreement import pearson
from probes.checks.chain import CHAIN, VOTES, clusters
from probes.checks.crosscheck import Evidence
from probes.checks.mismatched import authors, mismatched_citations, mismatched_explanations
from probes.checks.swaps import LeftOut, Swap, summarise_swaps
from probes.checks.verdict import ALPHA, FAMILIES
from probes.records import Check
from probes.results.posts import PostResult, erased_otherwise, paired
from probes.saliency.settings import SMALLEST_CHANGE

VERDICTS = ("supported", "contradicted", "inconclusive")
# Checks of one post that ran the model (``faithfulness``, ``gates`` and ``behaviour`` of ``probes.checks``).
MEASURED = (
    "erasure_offset",
    "necessity",
    "sufficiency",
    "weight_of_evidence",
    "mediation_share",
    "faithfulness_corr",
    "infidelity",
    "comprehensiveness",
    "aopc_sufficiency",
    "soft_comprehensiveness",
    "soft_sufficiency",
    "max_sensitivity",
    *CHAIN,
)
_HYPOTHESES = {
    "necessity": "the label needs the cited words",
    "sufficiency": "the cited words suffice for the label",
    **VOTES,
}
# Further agreement checks, summarised where they were made.
_MORE = (
    "ap_clause",
    "f1_clause",
    "iou_f1",
    "top_overlap",
    "spearman",
    "plausibility_mass",
    "plausibility_auroc_clause",
    "plausibility_ap_clause",
    "plausibility_f1_clause",
    "plausibility_iou_f1",
)


def summarise(
    results: Sequence[PostResult],
    evidence: Sequence[Evidence] | None = None,
    n_boot: int = 2000,
    draws: int = 9999,
    seed: int = 0,
    swaps: Sequence[Swap | LeftOut] = (),
) -> dict[str, Any]:
    """The numbers of ``summary.json``; JSON types only, None where there is nothing to measure.

    Args:
        results: the posts. evidence: their checks, when already made.
        n_boot: bootstrap draws per interval. draws: Monte-Carlo draws per test (p is at least 1 / (draws + 1)).
        swaps: the swap pairs (``probes.checks.swaps``), if there are any.
    """
    evidence = [result.evidence(seed=seed) for result in results] if evidence is None else evidence
    methods = methods_of(results)
    ig = [
        a
        for r in results
        for a in r.attributions
        if a.method == "ig" and a.target == "label" and a.rel_delta is not None
    ]
    quotes = [c for r in results for c in r.citations if c.kind == "quote"]
    known = any(e.user is not None for e in evidence)
    summary: dict[str, Any] = {"n": len(results), "n_users": len({*authors(evidence)}) if known else None}
    summary |= _given(results)
    summary |= _tables(evidence, ("cue_auroc", "decoy_auroc"), methods, n_boot, seed)
    summary |= mass(evidence, methods, n_boot, draws, seed)
    summary |= _tables(evidence, ("auroc_clause", "cosine", "pearson"), methods, n_boot, seed)
    more = [name for name in _MORE if any(check_of(e, name, m) is not None for e in evidence for m in methods)]
    summary |= _tables(evidence, more, methods, n_boot, seed)
    summary["consistency"] = mismatched_explanations(evidence, methods, draws, seed)
    for key, stat in (("cosine_mismatched", "mismatched"), ("cosine_p", "p")):
        summary[key] = {m: found["cosine"][stat] for m, found in summary["consistency"].items()}
    summary["measured"] = _measured(evidence, n_boot, draws, seed)
    summary |= _tables(evidence, ("chain_decided",), ("model",), n_boot, seed)
    for name in ("necessity", "sufficiency"):
        found = summary["measured"].get(name, {}).get("erase", {})
        for suffix, key in (("", "value"), ("_ci", "ci"), ("_null", "null_mean")):
            summary[name + suffix] = found.get(key)
    summary |= _beyond(evidence, n_boot, seed)
    moved = [result.counterfactuals for result in results]
    summary["counterfactual"] = _counterfactual(moved, authors(evidence), n_boot, draws, seed)
    summary["swaps"] = summarise_swaps(swaps, draws, seed)
    disagreement = [e for e in evidence for c in e.report.checks if c.name == "explainers_pearson"]
    summary["explainers"] = {
        name: _mean([c.value for e in evidence for c in e.report.checks if c.name == key and c.value is not None])
        for name, key in (("pearson", "explainers_pearson"), ("kendall_w", "explainers_w"))
    } | {"n": len(disagreement)}
    deltas = [a.rel_delta for a in ig if a.rel_delta is not None]
    summary["completeness_delta"] = {
        "mean": _mean(deltas),
        "max": max(deltas) if deltas else None,
        "converged": sum(a.converged is True for a in ig) / len(ig) if ig else None,
    }
    summary["fabricated_quote_rate"] = sum(not c.post_char for c in quotes) / len(quotes) if quotes else None
    summary["n_quotes"] = len(quotes)
    summary["abstained"] = sum(map(_uncited, results))
    summary |= verdicts(evidence)
    summary |= concluded(summary, methods)
    summary["by_label"] = _by_label(results, evidence, methods, n_boot, seed)
    return summary


def concluded(summary: dict[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """``tests``, ``p_holm`` and ``conclusion`` of a summary that has all the rest."""
    tests = _tests(summary, methods)
    held = {test["method"]: test["p_holm"] for test in tests if test["check"] == "excess"}
    return {"tests": tests, "p_holm": held, "conclusion": conclusion(summary | {"p_holm": held})}


def _beyond(evidence: Sequence[Evidence], n_boot: int, seed: int) -> dict[str, Any]:
    """What the cited words do to the label beyond as many other words, in nats: necessity less its own null."""
    found = [(check_of(e, "necessity", "erase"), who) for e, who in zip(evidence, authors(evidence), strict=True)]
    values = [
        (c.value - c.null_mean, who)
        for c, who in found
        if c is not None and c.status == "ok" and c.value is not None and c.null_mean is not None
    ]
    return {
        "necessity_beyond": _mean([value for value, _ in values]),
        "necessity_beyond_ci": _ci(values, n_boot, seed),
    }


def _given(results: Sequence[PostResult]) -> dict[str, Any]:
    """What can be seen before any map is read: can the model do its task, and is what is scored a contrast?

    ``labels``: posts per label. ``log_odds``: mean of the absolute label scores in nats (near 0: the model hardly
    prefers its own answer). ``contrast``: posts by what their score is (``Example.contrast``). ``border``: posts
    and tokens with text of post and template (never varied), and posts where one holds a letter or digit.
    ``cut``: what posts are erased by, and how many have fewer than 4 such units.
    """
    scores = {r.id: a.f_input for r in results for a in r.attributions if a.target == "label" and r.contrast != "log p"}
    border = [r for r in results if r.border]
    return {
        "labels": dict(Counter(r.label for r in results)),
        "log_odds": {
            "mean_abs": _mean([abs(value) for value in scores.values()]),
            "below_0.1": sum(abs(value) < SMALLEST_CHANGE for value in scores.values()),
        },
        "contrast": dict(Counter(r.contrast for r in results)),
        "border": {
            "posts": len(border),
            "tokens": sum(r.border for r in border),
            "posts_with_letters": sum(r.border_letters for r in border),
        },
        "cut": {"unit": results[0].cut if results else None, "few": sum(len(r.units) < 4 for r in results)},
    }


def _uncited(result: PostResult) -> bool:
    return not any(c.post_char for c in result.citations)


def summarise_tests(
    evidence: Sequence[Evidence],
    methods: Sequence[str],
    draws: int = 9999,
    seed: int = 0,
    moved: Sequence[Sequence[tuple[float, float]]] = (),
) -> dict[tuple[str, str], float | None]:
    """Only the p-values of the data set by (test, method), the sterner nulls and the smallest Holm value included.

    Args:
        moved: ``PostResult.counterfactuals`` of every post, if there are any.
    """
    summary: dict[str, Any] = mass(evidence, methods, 0, draws, seed)
    summary["consistency"] = mismatched_explanations(evidence, methods, draws, seed)
    summary["measured"] = _measured(evidence, 0, draws, seed)
    summary["counterfactual"] = _counterfactual(moved, authors(evidence), 0, draws, seed) if moved else None
    rows = _tests(summary, methods)
    found = {(row["check"], row["method"]): row["p"] for row in rows}
    found |= {("excess against other posts", m): p for m, p in summary["p_position"].items()}
    for m, by in summary["consistency"].items():
        found |= {(name, m): one["p"] for name, one in by.items()}
    held = [row["p_holm"] for row in rows if row["p_holm"] is not None]
    return found | {("any (Holm)", "all"): min(held) if held else None}


def conclude(evidence: Sequence[Evidence], methods: Sequence[str], n_boot: int, draws: int, seed: int) -> str:
    """Only the ``conclusion``, from the maps and citations alone."""
    summary: dict[str, Any] = mass(evidence, methods, n_boot, draws, seed)
    adjusted = stats.holm([math.nan if summary["p"][m] is None else summary["p"][m] for m in methods])
    return conclusion(summary | {"p_holm": dict(zip(methods, adjusted, strict=True))})


def methods_of(results: Sequence[PostResult]) -> list[str]:
    found = {a.method for r in results for a in r.attributions if a.target == "label"}
    return [m for m in FAMILIES if m in found] + sorted(found - set(FAMILIES))


def check_of(evidence: Evidence, name: str, method: str) -> Check | None:
    """The check of that name and method, whatever its status."""
    return next((c for c in evidence.report.checks if c.name == name and c.method == method), None)


def _values(evidence: Sequence[Evidence], name: str, method: str) -> list[float]:
    return [value for value, _ in _authored(evidence, name, method)]


def _authored(
    evidence: Sequence[Evidence], name: str, method: str, states: Sequence[str] = ("ok",)
) -> list[tuple[float, str]]:
    """(value, author) of a check wherever it has a status of ``states``; a post without a known author is its own."""
    found = ((check_of(e, name, method), who) for e, who in zip(evidence, authors(evidence), strict=True))
    return [(c.value, who) for c, who in found if c is not None and c.status in states and c.value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _ci(values: Sequence[tuple[float, str]], n_boot: int, seed: int) -> list[float] | None:
    """BCa interval of the mean over authors."""
    data, who = [value for value, _ in values], [author for _, author in values]
    found = stats.bootstrap_ci(data, n_boot=n_boot, seed=seed, clusters=who)
    return None if found is None else list(found)


def mass(evidence: Sequence[Evidence], methods: Sequence[str], n_boot: int, draws: int, seed: int) -> dict[str, Any]:
    """The headline: mass ratio per method with interval, null, excess, p-values."""
    out: dict[str, dict[str, Any]] = {
        name: {}
        for name in (
            "mass_ratio",
            "mass_ratio_ci",
            "mass_ratio_null",
            "excess",
            "excess_ci",
            "p",
            "p_position",
            "n_used",
        )
    }
    for method in methods:
        values = _authored(evidence, "mass_ratio", method)
        checks = [c for e in evidence if (c := check_of(e, "mass_ratio", method)) is not None and c.status == "ok"]
        speaking = [e for e in evidence if method in e.excess and np.isfinite(e.excess[method]).all()]
        who = authors(speaking)
        excess = [(float(e.excess[method][0]), author) for e, author in zip(speaking, who, strict=True)]
        enough = len(speaking) >= stats.MIN_POSTS
        nulls = [e.excess[method] for e in speaking]
        test = stats.mean_test(nulls, draws, seed, who, two_sided=True) if enough else None
        habit = mismatched_citations(speaking, method, draws, seed) if enough else None
        out["mass_ratio"][method] = _mean([value for value, _ in values])
        out["mass_ratio_ci"][method] = _ci(values, n_boot, seed)
        out["mass_ratio_null"][method] = _mean([c.null_mean for c in checks if c.null_mean is not None])
        out["excess"][method] = _mean([value for value, _ in excess])
        out["excess_ci"][method] = _ci(excess, n_boot, seed)
        out["p"][method] = None if test is None else test.p
        out["p_position"][method] = None if habit is None else habit.p
        out["n_used"][method] = len(speaking)
    return out


def _tables(
    evidence: Sequence[Evidence], names: Sequence[str], methods: Sequence[str], n_boot: int, seed: int
) -> dict[str, dict[str, Any]]:
    """``name`` and ``name_ci`` per method."""
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        values = {method: _authored(evidence, name, method) for method in methods}
        out[name] = {method: _mean([value for value, _ in found]) for method, found in values.items()}
        out[f"{name}_ci"] = {method: _ci(found, n_boot, seed) for method, found in values.items()}
    return out


def _measured(evidence: Sequence[Evidence], n_boot: int, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """Checks that ran the model, by name and method: mean, interval, null, one p-value where they kept their draws."""
    keys = {(c.name, c.method) for e in evidence for c in e.report.checks if c.name in MEASURED}
    out: dict[str, dict[str, Any]] = {}
    for name, method in sorted(keys, key=lambda key: (MEASURED.index(key[0]), key[1])):
        # The gate's own statistic counts every map it judged: those that passed were chosen by it.
        states = ("ok", "failed_gate") if name in ("faithfulness_corr", "erasure_offset") else ("ok",)
        values = _authored(evidence, name, method, states)
        found = [(check_of(e, name, method), who) for e, who in zip(evidence, authors(evidence), strict=True)]
        ok = [(c, who) for c, who in found if c is not None and c.status in states and c.value is not None and c.draws]
        nulls = [np.array([c.value, *c.draws]) for c, _ in ok]
        joined = clusters([c for c, _ in ok], [who for _, who in ok])
        test = stats.mean_test(nulls, draws, seed, joined) if len(ok) >= stats.MIN_POSTS else None
        out.setdefault(name, {})[method] = {
            "value": _mean([value for value, _ in values]),
            "ci": _ci(values, n_boot, seed),
            "null_mean": _mean([c.null_mean for c, _ in found if c and c.status in states and c.null_mean is not None]),
            "p": None if test is None else test.p,
            "n": len(values),
            "failed": sum(c is not None and c.status == "failed_gate" for c, _ in found),
            "judged": sum(c is not None and c.status in ("ok", "failed_gate") for c, _ in found),
        }
    return out


def _counterfactual(
    moved: Sequence[Sequence[tuple[float, float]]], authors: Sequence[str], n_boot: int, draws: int, seed: int
) -> dict[str, Any] | None:
    """Correlational counterfactual test (Siegel et al. 2024): Pearson r of "mentioned" with the label's shift.

    The interval resamples authors; the p-value permutes the mentions among the insertions of one post, in the posts of
    one author all in the same way (they may be alike). None where fewer than 5 posts have insertions, or nothing or
    everything was mentioned.

    Args:
        moved: (label shift, mentioned) per insertion, for each post.
    """
    rows = [(np.array(pairs), who) for pairs, who in zip(moved, authors, strict=True) if pairs]
    if len(rows) < stats.MIN_POSTS:
        return None
    pooled = np.concatenate([pairs for pairs, _ in rows])
    value = pearson(pooled[:, 0], pooled[:, 1])
    if math.isnan(value):
        return None
    rng = np.random.default_rng(seed)
    mean, wanted = pooled[:, 0].mean(), float((pooled[:, 0] - pooled[:, 0].mean()) @ pooled[:, 1])
    found, orders = np.zeros(draws), {}
    for pairs, who in rows:
        size = len(pairs)
        if (who, size) not in orders:
            orders[who, size] = rng.random((draws, size)).argsort(1)
        found += pairs[:, 1][orders[who, size]] @ (pairs[:, 0] - mean)
    reached = int((found >= wanted - 1e-9).sum())
    groups: dict[str, list[np.ndarray]] = {}
    for pairs, who in rows:
        groups.setdefault(who, []).append(pairs)
    blocks = [np.concatenate(found) for found in groups.values()]
    boot = []
    for _ in range(n_boot if len(blocks) >= stats.MIN_POSTS else 0):
        again = np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])
        boot.append(pearson(again[:, 0], again[:, 1]))
    finite = [r for r in boot if math.isfinite(r)]
    ci = np.quantile(finite, [0.025, 0.975]).tolist() if finite else None
    return {
        "r": value,
        "ci": ci,
        "p": (1 + reached) / (1 + draws),
        "n": len(rows),
        "insertions": len(pooled),
        "mentioned": float(pooled[:, 1].mean()),
        "mean_shift": float(pooled[:, 0].mean()),
    }


def _tests(summary: dict[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Every hypothesis with its one p-value, and Holm over all of them."""
    rows: list[dict[str, Any]] = []

    def add(hypothesis: str, check: str, method: str, p: float | None, value: float | None, n: int) -> None:
        rows.append({"hypothesis": hypothesis, "check": check, "method": method, "value": value, "n": n, "p": p})

    for m in methods:
        if m in FAMILIES:
            add("citations hold more, or less, of the label's saliency than their length", "excess", m, summary["p"][m],
                summary["excess"][m],
                summary["n_used"][m])  # fmt: skip
    for m, found in summary["consistency"].items():
        if m in FAMILIES:
            one = found["cosine"]
            add("label and explanation use the same words", "cosine", m, one["p"], one["value"], one["n"])
    for name, hypothesis in _HYPOTHESES.items():  # weight of evidence has no null: see ``probes.checks.behaviour``
        for m, found in summary["measured"].get(name, {}).items():
            add(hypothesis, name, m, found["p"], found["value"], found["n"])
    cct = summary.get("counterfactual")
    if cct is not None:
        add("what moves the label is mentioned", "counterfactual", "model", cct["p"], cct["r"], cct["n"])
    for m, one in ((summary.get("swaps") or {}).get("by_method") or {}).items():
        add("where swapped posts differ, their maps differ", "swap_share", m, one["p_share"], one["share"], one["n"])
        add(
            "the label moves as the maps of swapped posts say",
            "swap_cosine",
            m,
            one["p_cosine"],
            one["cosine"],
            one["n"],
        )
    adjusted = stats.holm([math.nan if row["p"] is None else row["p"] for row in rows])
    return [row | {"p_holm": None if math.isnan(p) else p} for row, p in zip(rows, adjusted, strict=True)]


def verdicts(evidence: Sequence[Evidence]) -> dict[str, Any]:
    count = Counter(e.report.verdict for e in evidence)
    return {
        "verdicts": {name: count[name] for name in VERDICTS},
        "verdicts_by_chance": {
            name: float(sum(e.chance.get(name, 0.0) for e in evidence)) for name in ("supported", "contradicted")
        },
    }


def conclusion(summary: dict[str, Any]) -> str:
    said: dict[str, list[str]] = {}
    for method, family in FAMILIES.items():
        ci, p = summary["excess_ci"].get(method), summary["p_holm"].get(method)
        if ci is None or p is None or summary["n_used"][method] < stats.MIN_POSTS:
            continue
        sure = p <= ALPHA
        word = "supported" if sure and ci[0] > 0 else "contradicted" if sure and ci[1] < 0 else "inconclusive"
        said.setdefault(family, []).append(word)
    words = {word for found in said.values() for word in found}
    return words.pop() if len(said) >= 2 and len(words) == 1 else "inconclusive"


def _by_label(
    results: Sequence[PostResult], evidence: Sequence[Evidence], methods: Sequence[str], n_boot: int, seed: int
) -> list[dict[str, Any]]:
    rows = []
    for key in sorted({(r.task, r.label) for r in results}):
        chosen = [e for r, e in zip(results, evidence, strict=True) if (r.task, r.label) == key]
        mass = {method: _mean(_values(chosen, "mass_ratio", method)) for method in methods}
        ci = {method: _ci(_authored(chosen, "mass_ratio", method), n_boot, seed) for method in methods}
        rows.append(
            {
                "task": key[0],
                "label": key[1],
                "n": len(chosen),
                "abstained": sum((r.task, r.label) == key and _uncited(r) for r in results),
                "mass_ratio": mass,
                "mass_ratio_ci": ci,
                **verdicts(chosen),
            }
        )
    return rows


def compare(first: Sequence[PostResult], second: Sequence[PostResult]) -> dict[str, Any]:
    """Paired diagnosticity by post id: how often does a check score the first run above the second?

    Returns:
        ``diagnosticity``: the lowest over the methods that can give a verdict, on the mass ratio (None without one);
        ``by_check``: {check: {method: {value, ci, n}}}; ``n_pairs``, and how many ids had no partner. A pair counts for
        a check only when it is "ok" on both sides; ``n`` says how many were. ``erased_otherwise``: a line, or None.

    Raises:
        ProbeInputError: as ``paired``.
    """
    both = paired(first, second)
    pairs = [(one.evidence(), other.evidence()) for one, other in both]
    who = authors([pair[0] for pair in pairs])
    methods = [m for m in methods_of(first) if m in methods_of(second)]
    by_check: dict[str, dict[str, Any]] = {}
    for name in ("mass_ratio", "auroc_clause", "cosine", "pearson"):
        by_check[name] = {}
        for method in methods:
            scores = [[_score(check_of(e, name, method)) for e in pair] for pair in pairs]
            ones, others = [s[0] for s in scores], [s[1] for s in scores]
            found = stats.diagnosticity(ones, others, clusters=who) if scores else None
            by_check[name][method] = (
                None if found is None else {"value": found.value, "ci": list(found.ci), "n": found.n}
            )
    judged = [by_check["mass_ratio"].get(method) for method in FAMILIES]
    values = [found["value"] for found in judged if found is not None]
    return {
        "diagnosticity": min(values) if values else None,
        "by_check": by_check,
        "n_pairs": len(pairs),
        "unpaired": len(first) + len(second) - 2 * len(pairs),
        "erased_otherwise": erased_otherwise(both),
    }


def _score(check: Check | None) -> float:
    return math.nan if check is None or check.status != "ok" or check.value is None else check.value
