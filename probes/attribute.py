"""Saliency over the post with Captum's plain classes and our own batched forward.

Captum's LLM wrappers are not used: with transformers >= 5.3 their default path returns wrong numbers without an error
(``probes selftest`` shows it on the installed versions), and they can neither batch nor report a completeness delta.

* ``ig``: integrated gradients (Sundararajan et al. 2017) over the embeddings of the post's tokens.
* ``erase``: leave-one-clause-out (``FeatureAblation`` over a 0/1 mask of clauses).
* ``gradnorm``: L2 norm of the gradient per post token. A screening method: it has no sign and no completeness.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import FeatureAblation, IntegratedGradients, Saliency

from probes.clauses import clause_tokens, clauses
from probes.errors import ProbeInputError
from probes.model import Attribution, Example, Probe, Span
from probes.score import Forward

__all__ = ["METHODS", "Settings", "attribute", "clause_tokens", "clauses"]

METHODS = ("ig", "erase", "gradnorm")
# A change of the score below this many nats counts as none when an error is put in relation to it.
SMALLEST_CHANGE = 0.1
# Gauss-Legendre nodes per stretch of the path, and the stretches one starts with: 16 steps. Many short stretches beat
# few long ones: with RMSNorm and a pad embedding of zero, all the change is in the first percent of the path.
_NODES, _STRETCHES = 4, 4


@dataclass(frozen=True)
class Settings:
    """What an attribution depends on besides model, row and target.

    Attributes:
        baseline: IG path start: "pad" (embedding of the pad token at every post position) or "zero".
        tolerance: IG stops refining when the summed completeness errors are below this share of the score change.
        max_steps: most gradient evaluations per IG.
        eraser: "attention" or "neutral" (``Forward.kept``).
        units: "clause", or "token" for one erasure per token (slower, finer).
        max_units: most clauses.
        seed: recorded; none of the methods draws random numbers.
    """

    baseline: str = "pad"
    tolerance: float = 0.05
    max_steps: int = 256
    eraser: str = "attention"
    units: str = "clause"
    max_units: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("baseline", ("pad", "zero")), ("units", ("clause", "token"))):
            if getattr(self, name) not in known:
                raise ProbeInputError(f"{name} {getattr(self, name)!r}: not one of {', '.join(known)}")
        if not 0 < self.tolerance < 1 or self.max_steps < _NODES * _STRETCHES or self.max_units < 1:
            raise ProbeInputError(
                f"settings: tolerance must be in (0, 1), max_steps at least {_NODES * _STRETCHES}, max_units at least 1"
            )


def attribute(
    probe: Probe,
    example: Example,
    methods: Sequence[str] = METHODS,
    targets: Sequence[str] = ("label", "explanation"),
    settings: Settings | None = None,
) -> list[Attribution]:
    """Saliency maps of one row.

    Args:
        methods: out of ig, erase, gradnorm.
        targets: out of label, explanation, ``explanation[a:b]`` (``Scorer.forward``).
    Returns:
        one per method and target, methods outermost; the same numbers, up to rounding, whatever else is asked for.
    Raises:
        ProbeInputError: unknown method, target or setting, or the row lacks the target.
    """
    settings = settings or Settings()
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ProbeInputError(f"method {unknown[0]!r}: not one of {', '.join(METHODS)}")
    results: list[Attribution] = []
    alone = {target: probe.scorer.forward(example, (target,)) for target in targets}
    for method in methods:
        if method == "erase":
            results += _erase(probe, probe.scorer.forward(example, targets), settings)
            continue
        run = _integrated_gradients if method == "ig" else _gradient_norm
        results += [run(probe, alone[target], settings) for target in targets]
    return results


def _integrated_gradients(probe: Probe, forward: Forward, settings: Settings) -> Attribution:
    """Captum's ``IntegratedGradients`` over stretches of the path, the stretches with the largest error cut in half.

    The path is straight, so attributions of consecutive stretches add up to the attribution of the whole, and each
    stretch has its own completeness error, (sum of its values) - (change of the score over it), at no extra gradient.
    A score that jumps somewhere along the path gets its steps there, where doubling would put them everywhere.
    """
    began, rows_before = time.perf_counter(), forward.rows_run
    ig = IntegratedGradients(lambda post: forward(post)[:, 0])
    end = forward.post
    start = forward.neutral if settings.baseline == "pad" else torch.zeros_like(end)
    scores: dict[float, float] = {}
    steps = 0

    def point(alpha: float) -> torch.Tensor:
        return start + alpha * (end - start)

    def fill(alphas: Sequence[float]) -> None:
        new = sorted({alpha for alpha in alphas if alpha not in scores})

        def part(chosen: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return forward(torch.stack([point(alpha) for alpha in chosen.tolist()]))[:, 0].double().cpu()

        if new:
            found = probe.scorer.chunked(part, torch.tensor(new, dtype=torch.float64), forward.tokens)
            scores.update(zip(new, found.tolist(), strict=True))

    def integrate(stretches: Sequence[tuple[float, float]]) -> list[np.ndarray]:
        def part(chosen: torch.Tensor) -> torch.Tensor:
            values = ig.attribute(
                torch.stack([point(b) for _, b in chosen.tolist()]),
                torch.stack([point(a) for a, _ in chosen.tolist()]),
                n_steps=_NODES,
                internal_batch_size=max(len(chosen), probe.scorer.batch_rows(forward.tokens)),
            )
            return values.detach().double().sum(-1).cpu()

        per_call = forward.tokens * min(_NODES, probe.scorer.batch_rows(forward.tokens))
        found = probe.scorer.chunked(part, torch.tensor(stretches, dtype=torch.float64), per_call)
        return list(found.numpy())

    edges = np.linspace(0.0, 1.0, _STRETCHES + 1).tolist()
    todo = list(itertools.pairwise(edges))
    done: dict[tuple[float, float], np.ndarray] = {}
    errors: dict[tuple[float, float], float] = {}
    while True:
        fill([alpha for stretch in todo for alpha in stretch])
        done.update(zip(todo, integrate(todo), strict=True))
        steps += _NODES * len(todo)
        for a, b in todo:
            errors[a, b] = float(done[a, b].sum()) - (scores[b] - scores[a])
        allowed = settings.tolerance * max(abs(scores[1.0] - scores[0.0]), SMALLEST_CHANGE)
        room = (settings.max_steps - steps) // (2 * _NODES)
        worst = _worst(errors, allowed)[: max(room, 0)]
        if not worst:
            break
        for stretch in worst:
            del done[stretch], errors[stretch]
        todo = [half for a, b in worst for half in ((a, (a + b) / 2), ((a + b) / 2, b))]
    # Summed in path order, so that the result does not depend on the order of refinement.
    values = np.sum([done[stretch] for stretch in sorted(done)], axis=0)
    change = scores[1.0] - scores[0.0]
    delta = float(values.sum()) - change
    return _record(
        probe,
        forward.example,
        ("ig", forward.targets[0], settings),
        char_values=forward.example.post_chars(values),
        baseline=settings.baseline,
        f=(scores[1.0], scores[0.0]),
        delta=delta,
        converged=sum(abs(error) for error in errors.values()) <= allowed,
        counts=(forward.rows_run - rows_before, steps),
        began=began,
        params={
            "n_steps": steps,
            "edges": [0.0, *(b for _, b in sorted(done))],
            "sum_abs_delta": float(sum(abs(error) for error in errors.values())),
            "tolerance": settings.tolerance,
            "label_retokenised": forward.label_retokenised,
        },
    )


def _worst(errors: dict[tuple[float, float], float], allowed: float) -> list[tuple[float, float]]:
    """Stretches to halve: the largest errors, until the rest sum to at most half of what is allowed."""
    if sum(abs(error) for error in errors.values()) <= allowed:
        return []
    ranked = sorted(errors, key=lambda stretch: (-abs(errors[stretch]), stretch))
    left = sum(abs(error) for error in errors.values())
    for count, stretch in enumerate(ranked, start=1):
        left -= abs(errors[stretch])
        if left <= allowed / 2:
            return ranked[:count]
    return ranked


def _gradient_norm(probe: Probe, forward: Forward, settings: Settings) -> Attribution:
    began, rows_before = time.perf_counter(), forward.rows_run
    with torch.no_grad():
        f_input, f_baseline = forward(torch.stack([forward.post, forward.neutral]))[:, 0].double().tolist()
    gradient = Saliency(lambda post: forward(post)[:, 0]).attribute(
        forward.post[None].clone().requires_grad_(), abs=False
    )
    values = gradient[0].detach().double().norm(dim=-1).cpu().numpy()
    return _record(
        probe,
        forward.example,
        ("gradnorm", forward.targets[0], settings),
        char_values=forward.example.post_chars(values),
        baseline="pad",
        f=(f_input, f_baseline),
        counts=(forward.rows_run - rows_before, 1),
        began=began,
        params={"label_retokenised": forward.label_retokenised},
    )


def _erase(probe: Probe, forward: Forward, settings: Settings) -> list[Attribution]:
    """One pass per erased clause gives the effect on every target: the scores are kept and read again per target."""
    example = forward.example
    if settings.units == "clause":
        spans, unit = clause_tokens(example, settings.max_units)
    else:
        spans, unit = [], np.arange(len(forward.post))
    owner = torch.as_tensor(unit)
    count = int(unit.max()) + 1
    table: dict[bytes, torch.Tensor] = {}

    def scores(mask: torch.Tensor) -> torch.Tensor:
        """float ``[B, units]`` of 0 (erased) and 1 -> ``[B, targets]``."""
        kept = mask.detach().bool().cpu()
        keys = [row.numpy().tobytes() for row in kept]
        new = [index for index, key in enumerate(keys) if key not in table]
        if new:
            found = forward.kept(kept[new][:, owner], settings.eraser).double().cpu()
            table.update(zip((keys[index] for index in new), found, strict=True))
        return torch.stack([table[key] for key in keys])

    results = []
    for column, target in enumerate(forward.targets):
        began = time.perf_counter()
        ablation = FeatureAblation(lambda mask, column=column: scores(mask)[:, column])
        ones = torch.ones(1, count, dtype=torch.float64)
        batch = max(1, min(count, 256))
        values = ablation.attribute(ones, baselines=0, perturbations_per_eval=batch)[0].double().numpy()
        f_input, f_baseline = scores(torch.stack([ones[0], torch.zeros(count, dtype=torch.float64)]))[
            :, column
        ].tolist()
        if spans:
            char_values = np.concatenate([np.full(b - a, v / (b - a)) for (a, b), v in zip(spans, values, strict=True)])
        else:
            char_values = example.post_chars(values)
        results.append(
            _record(
                probe,
                example,
                ("erase", target, settings),
                char_values=char_values,
                units=(values, tuple(spans)) if spans else None,
                baseline=settings.eraser,
                f=(f_input, f_baseline),
                counts=(len(table), 0),
                began=began,
                params={"units": settings.units, "label_retokenised": forward.label_retokenised},
            )
        )
    return results


def _record(
    probe: Probe,
    example: Example,
    what: tuple[str, str, Settings],
    *,
    char_values: np.ndarray,
    baseline: str,
    f: tuple[float, float],
    counts: tuple[int, int],
    began: float,
    params: dict[str, Any],
    units: tuple[np.ndarray, tuple[Span, ...]] | None = None,
    delta: float | None = None,
    converged: bool | None = None,
) -> Attribution:
    method, target, settings = what
    values, spans = units or (char_values, tuple((i, i + 1) for i in range(len(char_values))))
    return Attribution(
        example_id=example.id,
        method=method,
        target=target,
        unit="char" if units is None else "clause",
        values=np.asarray(values, dtype=np.float64),
        unit_spans=spans,
        char_values=char_values,
        baseline=baseline,
        f_input=f[0],
        f_baseline=f[1],
        delta=delta,
        rel_delta=None if delta is None else abs(delta) / max(abs(f[0] - f[1]), SMALLEST_CHANGE),
        converged=converged,
        n_fwd=counts[0],
        n_bwd=counts[1],
        seconds=time.perf_counter() - began,
        dtype=str(probe.dtype).removeprefix("torch."),
        seed=settings.seed,
        model_fp=probe.fingerprint,
        params=params,
    )
