"""Soft comprehensiveness is confounded by how many words are kept: shown where the truth is known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from probes.checks.gates import SOFT_SHARE, at_equal_share
from probes.validation.selftest import closed_form_probe

_DRAWS, _CLAUSES = 64, 12


def soft_maps(seed: int = 0) -> list[dict[str, Any]]:
    """Three maps of one post, judged as published and at equal expected retention.

    The label's log-odds are half a nat for every token there is, and three nats more for each letter of one clause.

    Returns:
        per map its name; share erased and soft comprehensiveness (nats), ``published`` and ours. The map that is true
        has to come out first; as published the one that says nothing does.
    """
    rng = np.random.default_rng(seed)
    letters = "abcdefghijkl"[:_CLAUSES]
    probe = closed_form_probe({c: [3.5 if c == "d" else 0.5] for c in letters}, lambda seen: seen[..., 0])
    ids, post = probe.token_bytes.encode, ", ".join(c * 4 for c in letters)
    given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
    example = probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
    forward = probe.scorer.forward(example, ("label",))
    is_cue = np.array([float(c == "d") for c in post])
    maps = {
        "true: the clause that decides": is_cue + 0.05,
        "flat: says nothing": np.ones(len(post)),
        "unrelated": rng.gamma(0.3, size=len(post)),
    }
    found = []
    for name, values in maps.items():
        published, ours = values / values.max(), at_equal_share(values, SOFT_SHARE)
        scores = [_comprehensiveness(forward, weight, seed) for weight in (published, ours)]
        found.append(
            {
                "map": name,
                "published_share": float(published.mean()),
                "published": scores[0],
                "share": float(ours.mean()),
                "value": scores[1],
            }
        )
    return found


def _comprehensiveness(forward: Any, weight: np.ndarray, seed: int) -> float:
    """Score lost, in nats, when each dimension of a token is zeroed with probability ``weight``, mean over draws."""
    noise = torch.rand(_DRAWS, *forward.post.shape, generator=torch.Generator().manual_seed(seed))
    keep = noise >= torch.as_tensor(weight, dtype=torch.float32)[:, None]
    with torch.no_grad():
        whole, rows = forward(forward.post[None])[0, 0], forward(forward.post * keep)[:, 0]
    return float(whole - rows.mean())
