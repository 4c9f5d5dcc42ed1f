"""Does the map depend on what the model learned? Parameters or adapter randomised, maps compared (Adebayo et al. 2018).

A map that stays the same when the weights are noise is a picture of the text, not of the model. Every change is undone
when the block ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probes.agreement import mean_pairwise, pearson
from probes.errors import ProbeInputError
from probes.model import Example, Probe

KINDS = ("weights", "top_half", "adapter_off", "adapter_b")


def kinds(probe: Probe) -> tuple[str, ...]:
    """What can be randomised: the adapter kinds only where an adapter is attached and not merged."""
    return KINDS if hasattr(probe.model, "disable_adapter") else KINDS[:2]


@contextlib.contextmanager
def randomised(probe: Probe, kind: str, seed: int = 0) -> Iterator[None]:
    """The model of ``probe`` with part of it randomised, while the block lasts.

    Args:
        kind: "weights" (every matrix drawn anew: normal, same mean and spread, embeddings too), "top_half" (the upper
            half of the layers and the head only: the first step of a cascade), "adapter_off", "adapter_b" (lora_B drawn
            anew with the same norm).
    Raises:
        ProbeInputError: unknown kind, or no adapter to switch off (load it with ``merge=False``).
    """
    import torch

    if kind not in kinds(probe):
        raise ProbeInputError(f"randomise {kind!r}: not one of {', '.join(kinds(probe))} for this model")
    if kind == "adapter_off":
        with probe.model.disable_adapter():
            yield
        return
    chosen = [(name, weight) for name, weight in probe.model.named_parameters() if _meant(name, weight, kind, probe)]
    kept = [weight.detach().clone() for _, weight in chosen]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for _, weight in chosen:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                if kind == "adapter_b":
                    weight.copy_(noise * (weight.norm() / noise.norm()))
                else:
                    weight.copy_(noise * weight.float().std() + weight.float().mean())
        yield
    finally:
        with torch.no_grad():
            for (_, weight), before in zip(chosen, kept, strict=True):
                weight.copy_(before)


def _meant(name: str, weight: Any, kind: str, probe: Probe) -> bool:
    if kind == "adapter_b":
        return "lora_B" in name
    if weight.ndim < 2:
        return False
    if kind == "weights":
        return True
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if layer is None:
        return "lm_head" in name
    return layer >= int(getattr(probe.model.config, "num_hidden_layers", 0)) / 2


def compare(
    probe: Probe, examples: Sequence[Example], kind: str, methods: Sequence[str] = ("ig", "erase"), seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Label maps before and after, over posts.

    Returns:
        method -> ``correlation`` (mean Pearson r of the clause maps; near 0 is right), ``cue_auroc_before`` and
        ``cue_auroc_after`` (None without marked cues; 0.5 is chance), ``n``.
    """
    from probes.attribute import attribute
    from probes.clauses import pieces
    from probes.crosscheck import unit_sums, units_hit
    from probes.record import Settings
    from probes.stats import auroc

    settings = Settings(max_steps=64)
    found: dict[str, list[tuple[float, float, float]]] = {method: [] for method in methods}
    for at, example in enumerate(examples):
        units = pieces(example.post)
        before = attribute(probe, example, methods, ("label",), settings)
        with randomised(probe, kind, seed + at):
            after = attribute(probe, example, methods, ("label",), settings)
        for one, other in zip(before, after, strict=True):
            a, b = (unit_sums(m.char_values, units) for m in (one, other))
            marked = units_hit(example.cues or (), units)
            found[one.method].append((mean_pairwise(pearson, [a, b]), auroc(a, marked), auroc(b, marked)))

    def mean(values: Sequence[float]) -> float | None:
        finite = [value for value in values if np.isfinite(value)]
        return float(np.mean(finite)) if finite else None

    names = ("correlation", "cue_auroc_before", "cue_auroc_after")
    return {
        method: {name: mean(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        | {"n": float(len(rows))}
        for method, rows in found.items()
    }
