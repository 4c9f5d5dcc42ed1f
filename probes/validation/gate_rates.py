"""Error rates of the gates (V10): maps that know nothing of the model, or nothing but how long its clauses are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from probes.checks.agreement import pearson
from probes.citations.clauses import pieces
from probes.probe import Probe
from probes.saliency.settings import Settings
from probes.validation.error_rates import clause_map, smooth
from probes.validation.rows import Row, false_alarms, row


def gate_rates(draws: int, seed: int) -> list[Row]:
    """P-values of the gates for a map that knows nothing of the model, where neighbouring clauses are alike in both.

    Beside them, for information, what the same checks would reject if the map's values were put in random order.
    """
    from probes.checks.gates import judge
    from probes.validation.selftest import closed_form_probe

    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    hits: dict[str, list[bool]] = {}
    passed: list[bool] = []
    for at in range(draws):
        k = int(rng.integers(20, 27))  # fewer clauses have fewer than 20 rotations and cannot reach 0.05
        weights = smooth(rng, k, 2.0)
        probe = closed_form_probe({c: [float(w)] for c, w in zip(letters, weights, strict=False)}, lambda s: s[..., 0])
        ids, post = probe.token_bytes.encode, ", ".join(letters[:k])
        given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
        example = probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
        found = clause_map("erase", smooth(rng, k, 2.0), pieces(post))
        for check in judge(probe, example, [found], Settings(seed=at)):
            if check.p is not None:
                hits.setdefault(check.name, []).append(check.p <= 0.05)
            if check.name == "faithfulness_corr":
                passed.append(check.status == "ok")
        hits.setdefault("shuffled", []).append(_shuffled_p(found.values, weights, rng) <= 0.05)
    shuffled = float(np.mean(hits.pop("shuffled")))
    rows = [
        row(
            f"V10.{name}.erase",
            f"P(p <= 0.05), one post, {len(found)} smooth maps",
            float(np.mean(found)),
            false_alarms(len(found)),
        )
        for name, found in hits.items()
    ]
    rows.append(
        row(
            "V10.gate",
            f"maps unrelated to the model that pass the gate, {len(passed)} maps",
            float(np.mean(passed)),
            0.15,
        )
    )
    return [*rows, row("V10.shuffled", "the same, clauses in random order (not used: rejects true nulls)", shuffled)]


def _shuffled_p(values: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> float:
    """P-value of the correlation of map and effects against the map in random order, the shortcut that is refused."""
    found = pearson(values, weights)
    return (1 + sum(pearson(rng.permutation(values), weights) >= found for _ in range(99))) / 100


def length_rates(
    draws: int, seed: int = 0, name: str = "V10.gate", made: Callable[[Probe], Probe] = lambda probe: probe
) -> list[Row]:
    """Which maps of gradients pass the gate where any token taken away costs half a nat, and clauses differ in length.

    The eraser that judges a map of gradients leaves holes, so longer clauses cost more, whatever they say.

    Args:
        name: what the rows begin with. made: what is probed in place of each closed form.
    """
    from probes.checks.gates import judge
    from probes.validation.selftest import closed_form_probe

    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    passed: dict[str, list[bool]] = {"length": [], "unrelated": [], "true": []}
    for at in range(draws):
        k = int(rng.integers(6, 27))
        sizes, effects = rng.integers(1, 10, k), 0.2 * rng.normal(size=k)
        effects[rng.integers(k)] += 2.0
        known = {c: [float(e) / n, 0.5] for c, e, n in zip(letters, effects, sizes, strict=False)}
        probe = made(closed_form_probe(known | {c: [0.0, 0.5] for c in ("", ",", " ")}, lambda seen: seen.sum(-1)))
        ids = probe.token_bytes.encode
        post = ", ".join(letter * int(size) for letter, size in zip(letters, sizes, strict=False))
        given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
        example = probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
        maps = {
            "length": (sizes + 2.0) * np.exp(0.1 * rng.normal(size=k)),
            "unrelated": rng.gamma(0.3, size=k),
            "true": effects + 0.05 * rng.normal(size=k),
        }
        for kind, values in maps.items():
            checks = judge(probe, example, [clause_map("ig", values, pieces(post))], Settings(seed=at))
            passed[kind] += [c.status == "ok" for c in checks if c.name == "faithfulness_corr"]
    what = "maps of gradients that {} pass the gate, 0.5 nats for any token hidden, clauses of 1 to 9 letters, {} posts"
    told = {"length": "know lengths only", "unrelated": "know nothing", "true": "are true"}
    return [
        row(f"{name}.{kind}", what.format(told[kind], draws), float(np.mean(found)), 0.9 if kind == "true" else 0.15,
            ">=" if kind == "true" else "<=")
        for kind, found in passed.items()
    ]  # fmt: skip
