"""Does the map depend on what the model learned? Parameters or adapter randomised, maps compared (Adebayo et al. 2018).

A map that stays the same when the weights are noise is a picture of the text, not of the model. Every change is undone
when the block ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from probes.checks.agreement import pearson, rotated
from probes.errors import ProbeInputError
from probes.models.probed import Probed
from probes.records import Example
from probes.stats import bootstrap_ci

KINDS = ("weights", "top_half", "adapter_off", "adapter_b")
Keep = Callable[[Callable[[], Any]], Any]


def kinds(probe: Probed) -> tuple[str, ...]:
    """What can be randomised: the adapter kinds only where an adapter is attached and not merged."""
    return KINDS if hasattr(probe.model, "disable_adapter") else KINDS[:2]


@contextlib.contextmanager
def randomised(probe: Probed, kind: str, seed: int = 0) -> Iterator[None]:
    """The model of ``probe`` with part of it randomised, while the block lasts.

    Args:
        kind: "weights" (every matrix drawn anew: normal, same mean and spread, embeddings too), "top_half" (the upper
            half of the layers and the head only), "adapter_off", "adapter_b" (lora_B drawn
            anew with the same norm).
    Raises:
        ProbeInputError: unknown kind, or no adapter to switch off (load it with ``merge=False``).
    """
    import torch

    if kind not in kinds(probe):
        raise ProbeInputError(f"randomise {kind!r}: not one of {', '.join(kinds(probe))} for this model")
    if kind == "adapter_off":
        try:
            with probe.model.disable_adapter():
                probe.scorer.changed()
                yield
        finally:
            probe.scorer.changed()
        return
    chosen = [(name, weight) for name, weight in probe.model.named_parameters() if _meant(name, weight, kind, probe)]
    kept = [weight.detach().clone() for _, weight in chosen]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for _, weight in chosen:
                if kind == "adapter_b":
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.copy_(noise * (weight.norm() / noise.norm()))
                else:
                    _redraw(weight, generator)
        probe.scorer.changed()
        yield
    finally:
        with torch.no_grad():
            for (_, weight), before in zip(chosen, kept, strict=True):
                weight.copy_(before)
        probe.scorer.changed()


def _meant(name: str, weight: Any, kind: str, probe: Probed) -> bool:
    if kind == "adapter_b":
        return "lora_B" in name or "lora_embedding_B" in name
    if weight.ndim < 2:
        return False
    if kind == "weights":
        return True
    layer = _layer(name)
    if layer is None:
        return _part(probe, name) == "head"
    return layer >= int(getattr(probe.model.config, "num_hidden_layers", 0)) / 2


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _part(probe: Probed, name: str) -> str:
    """embeddings (of tokens and positions), layer N or head: where in the network a weight is."""
    layer = _layer(name)
    if layer is not None:
        return f"layer {layer}"
    head = probe.model.get_output_embeddings()
    own = {} if head is None else {id(weight) for weight in head.parameters()}
    inputs = {id(weight) for weight in probe.model.get_input_embeddings().parameters()}
    weight = dict(probe.model.named_parameters())[name]
    return "head" if id(weight) in own and id(weight) not in inputs else "embeddings"


def _redraw(weight: Any, generator: Any) -> None:
    """Normal, with the mean and spread the weight has."""
    import torch

    noise = torch.randn(weight.shape, generator=generator).to(weight)
    weight.copy_(noise * weight.float().std() + weight.float().mean())


def _clause_maps(probe: Probed, examples: Sequence[Example], methods: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Label maps on clauses: method -> float64 ``[k]`` per example."""
    from probes.checks.crosscheck import unit_sums
    from probes.citations.clauses import pieces
    from probes.saliency.attribute import attribute
    from probes.saliency.settings import Settings

    maps: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    for example in examples:
        for found in attribute(probe, example, methods, ("label",), Settings(max_steps=64)):
            maps[found.method].append(unit_sums(found.char_values, pieces(example.post, cut=example.cut)))
    return maps


def _cue_auroc(values: np.ndarray, example: Example) -> float:
    from probes.checks.crosscheck import units_hit
    from probes.citations.clauses import pieces
    from probes.stats import auroc

    return auroc(values, units_hit(example.cues or (), pieces(example.post, cut=example.cut)))


def _likeness(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """|Pearson r| of two clause maps, and its mean over the rotations of one: what unrelated maps of that shape have.

    Without the sign: random weights give the log-odds any, and a picture of the text would average to 0 with it.
    """
    found = np.abs(rotated(pearson, before, after))
    return float(found[0]), float(found.mean())


def _mean(values: Sequence[float]) -> float:
    """Of what is finite; NaN when nothing is."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def compare(
    probe: Probed,
    examples: Sequence[Example],
    kind: str,
    methods: Sequence[str] = ("ig", "erase"),
    seed: int = 0,
    draws: int = 1,
) -> dict[str, dict[str, Any]]:
    """Label maps before and after, over posts.

    Args:
        draws: of the weights, for every post its own; a post's value is their mean. One draw of a small network can
            prefer a word, or long clauses, so that few posts with one draw each are no measure of chance.

    Returns:
        method -> ``correlation`` (mean |Pearson r| of the clause maps) and ``correlation_null`` (the same with one map
        rotated; near it is right), ``cue_auroc_before`` and ``cue_auroc_after`` (None without marked cues; 0.5 is
        chance where cues stand anywhere), ``n`` posts, and ``correlation_ci`` and ``cue_auroc_ci`` (after), 95 % over
        authors (posts where they are not known), None with fewer than 5.
    """
    draws = 1 if kind == "adapter_off" else draws
    before = _clause_maps(probe, examples, methods)
    likeness: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    after: dict[str, list[float]] = {method: [] for method in methods}
    for at, example in enumerate(examples):
        found: dict[str, list[np.ndarray]] = {method: [] for method in methods}
        for draw in range(draws):
            with randomised(probe, kind, seed + at + draw * len(examples)):
                for method, maps in _clause_maps(probe, (example,), methods).items():
                    found[method] += maps
        for method, maps in found.items():
            alike = [_likeness(before[method][at], m) for m in maps]
            likeness[method].append((_mean([r for r, _ in alike]), _mean([null for _, null in alike])))
            after[method].append(_mean([_cue_auroc(m, example) for m in maps]))
    authors = [f"post {i}" if e.user is None else f"user {e.user}" for i, e in enumerate(examples)]
    return {
        method: {
            "correlation": _known(_mean([r for r, _ in likeness[method]])),
            "correlation_null": _known(_mean([null for _, null in likeness[method]])),
            "correlation_ci": bootstrap_ci([r for r, _ in likeness[method]], seed=seed, clusters=authors),
            "cue_auroc_before": _known(
                _mean([_cue_auroc(m, e) for m, e in zip(before[method], examples, strict=True)])
            ),
            "cue_auroc_after": _known(_mean(after[method])),
            "cue_auroc_ci": bootstrap_ci(after[method], seed=seed, clusters=authors),
            "n": len(examples),
        }
        for method in methods
    }


def _made(make: Callable[[], Any]) -> Any:
    return make()


def cascade(
    probe: Probed,
    examples: Sequence[Example],
    methods: Sequence[str] = ("ig", "erase"),
    seed: int = 0,
    keep: Keep = _made,
) -> list[dict[str, Any]]:
    """Cascading randomisation: from the output down, one part more at every step, to the embeddings.

    Returns:
        one ``{"down_to", "correlation": {method: |r|}, "correlation_null", "cue_auroc": {method: a}}`` per step, the
        first with nothing drawn anew; means over posts, as in ``compare``. A map of the model loses its likeness to the
        first on the way down. One draw of the weights serves all posts, so a single value can be far from its null by
        chance: repeat it with other seeds.
    """
    import torch

    parts: dict[str, list[Any]] = {}
    for name, weight in probe.model.named_parameters():
        if weight.ndim >= 2:
            parts.setdefault(_part(probe, name), []).append(weight)
    layers = sorted((part for part in parts if part.startswith("layer")), key=lambda part: -int(part.split()[1]))
    order = [part for part in ("head", *layers, "embeddings") if part in parts]
    kept = [(weight, weight.detach().clone()) for part in order for weight in parts[part]]
    generator = torch.Generator().manual_seed(seed)

    def maps_now() -> dict[str, list[np.ndarray]]:
        def made() -> dict[str, list[list[float | None]]]:  # JSON has no NaN
            found = _clause_maps(probe, examples, methods)
            return {m: [[_known(float(x)) for x in values] for values in of] for m, of in found.items()}

        return {m: [np.array(values, dtype=np.float64) for values in of] for m, of in keep(made).items()}

    before = maps_now()
    steps: list[dict[str, Any]] = []

    def note(down_to: str, maps: dict[str, list[np.ndarray]]) -> None:
        pairs = {m: list(zip(before[m], maps[m], examples, strict=True)) for m in methods}
        alike = {m: [_likeness(a, b) for a, b, _ in found] for m, found in pairs.items()}
        steps.append(
            {
                "down_to": down_to,
                "correlation": {m: _known(_mean([r for r, _ in found])) for m, found in alike.items()},
                "correlation_null": {m: _known(_mean([null for _, null in found])) for m, found in alike.items()},
                "cue_auroc": {m: _known(_mean([_cue_auroc(b, e) for _, b, e in found])) for m, found in pairs.items()},
            }
        )

    note("nothing", before)
    try:
        for part in order:
            with torch.no_grad():
                for weight in parts[part]:
                    _redraw(weight, generator)
            probe.scorer.changed()
            note(part, maps_now())
    finally:
        with torch.no_grad():
            for weight, whole in kept:
                weight.copy_(whole)
        probe.scorer.changed()
    return steps


def study(
    probe: Probed,
    examples: Sequence[Example],
    methods: Sequence[str] = ("ig", "erase"),
    seed: int = 0,
    draws: int = 1,
    keep: Keep = _made,
) -> dict[str, Any]:
    """Everything that can be randomised in this model: ``{"n", "kinds": {kind: compare(...)}, "cascade": [...]}``.

    Args:
        keep: gives what each step makes (JSON types), made now or read back from an interrupted study.
    """
    names = [kind for kind in kinds(probe) if kind != "top_half"]
    found = {kind: keep(lambda k=kind: compare(probe, examples, k, methods, seed, draws)) for kind in names}
    return {"n": len(examples), "kinds": found, "cascade": cascade(probe, examples, methods, seed, keep)}
