"""Soft comprehensiveness and sufficiency are confounded by how many words are kept: shown where the truth is known.

As published (Zhao & Aletras 2023) a map is scaled to a largest value of 1, and each token is erased (comprehensiveness)
or kept (sufficiency) with that probability. So the map that says nothing, 1 everywhere, erases all or keeps all, and
wins both. ``probes.checks.gates`` erases and keeps the same share of the post by every map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from probes import stats
from probes.checks.gates import SOFT_SHARE, at_equal_share, on_tokens
from probes.probe import Probe
from probes.records import Example
from probes.validation.selftest import closed_form_probe

_DRAWS, _CLAUSES = 64, 12


def soft_maps(seed: int = 0) -> list[dict[str, Any]]:
    """Three maps of one post in closed form: half a nat for every token, and three more for each letter of one clause.

    Returns:
        per map its name, and as published and at equal expected retention: the share erased (the share kept is the
        same), the nats lost when that is erased (comprehensiveness: more is better), and when the rest is
        (sufficiency: less is better).
    """
    letters = "abcdefghijkl"[:_CLAUSES]
    probe = closed_form_probe({c: [3.5 if c == "d" else 0.5] for c in letters}, lambda seen: seen[..., 0])
    ids, post = probe.token_bytes.encode, ", ".join(c * 4 for c in letters)
    given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
    example = probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
    score, found = _scored(probe, example, _DRAWS, seed), []
    for name, values in _maps(np.array([c == "d" for c in post]), seed).items():
        row: dict[str, Any] = {"map": name}
        for kind, weight in zip(("published_", ""), _weights(example, values), strict=True):
            comprehensiveness, sufficiency = score(weight)
            row |= {
                f"{kind}share": float(weight.mean()),
                f"{kind}comp": comprehensiveness,
                f"{kind}suff": sufficiency,
            }
        found.append(row)
    return found


def soft_planted(probe: Probe, examples: Sequence[Example], seed: int = 0, draws: int = 8) -> list[dict[str, Any]]:
    """The same on a trained model: how often the true map (the words that decide) beats one that is not.

    Args:
        examples: rows with ``cues``.
    Returns:
        per rival map its name, and P(the true map scores better) over posts, ties half, of soft comprehensiveness and
        sufficiency, as published and ours.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for at, example in enumerate(examples):
        score = _scored(probe, example, draws, seed + at)
        marked = np.zeros(len(example.post), bool)
        for a, b in example.cues or ():
            marked[a:b] = True
        for name, values in _maps(marked, seed + at).items():
            for kind, weight in zip(("published_", ""), _weights(example, values), strict=True):
                comprehensiveness, sufficiency = score(weight)
                scores.setdefault(name, {}).setdefault(f"{kind}comp", []).append(comprehensiveness)
                scores.setdefault(name, {}).setdefault(f"{kind}suff", []).append(-sufficiency)
    true, *rivals = scores
    found = []
    for rival in rivals:
        row: dict[str, Any] = {"map": rival}
        for key, values in scores[true].items():
            wins = stats.diagnosticity(values, scores[rival][key])
            row[key] = np.nan if wins is None else wins.value
        found.append(row)
    return found


def _maps(marked: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Maps on characters, the true one first."""
    return {
        "true: the words that decide": marked + 0.05,
        "flat: says nothing": np.ones(len(marked)),
        "unrelated": np.random.default_rng(seed).gamma(0.3, size=len(marked)),
    }


def _weights(example: Example, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities per token: as published, and at equal expected retention."""
    tokens = on_tokens(example, values)
    return tokens / tokens.max(), at_equal_share(tokens, SOFT_SHARE)


def _scored(probe: Probe, example: Example, draws: int, seed: int) -> Callable[[np.ndarray], tuple[float, float]]:
    """(nats lost when each dimension of a token is zeroed with its probability, and when it is kept with it), means
    over draws."""
    forward = probe.scorer.forward(example, ("label",))
    noise = torch.rand(draws, *forward.post.shape, generator=torch.Generator().manual_seed(seed))

    def score(weight: np.ndarray) -> tuple[float, float]:
        erased = noise < torch.as_tensor(weight, dtype=torch.float32)[:, None]
        rows = torch.cat([forward.post[None], forward.post * ~erased, forward.post * erased])
        with torch.no_grad():
            found = forward(rows)[:, 0].double().numpy()
        return float(found[0] - found[1 : draws + 1].mean()), float(found[0] - found[draws + 1 :].mean())

    return score
