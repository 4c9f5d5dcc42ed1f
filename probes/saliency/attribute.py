"""Saliency over the post with Captum's plain classes and our own batched forward.

Captum's LLM wrappers are not used: with transformers >= 5.3 their default path returns wrong numbers without an error
(``probes selftest`` shows it on the installed versions), and they can neither batch nor report a completeness delta.

* ``ig``, ``ig_zero``, ``ig_filler``: integrated gradients (Sundararajan et al. 2017) over the embeddings of the post's
  tokens, from the pad token, from zero, or from clauses of other posts.
* ``gradshap``: gradient SHAP (Lundberg & Lee 2017) over the same three kinds of start.
* ``erase``, ``erase_neutral``, ``erase_resample``, ``shap``, ``kernelshap``: ``probes.saliency.perturb``.
* ``gradnorm``: L2 norm of the gradient per post token. A screening method: it has no sign and no completeness.
* ``gxi``: gradient times input. A baseline that is known to point at the wrong words (docs/validation.md); it is never
  evidence.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch
from captum.attr import GradientShap, InputXGradient, IntegratedGradients, Saliency

from probes.citations.align import align, merge_spans
from probes.citations.clauses import clause_tokens, clauses
from probes.errors import ProbeInputError
from probes.models.probed import Probed
from probes.models.score import Forward
from probes.records import Attribution, Example
from probes.saliency.perturb import perturb, seeded
from probes.saliency.settings import METHODS, NEED_FILLERS, SMALLEST_CHANGE, Settings, record

__all__ = ["DEFAULT_METHODS", "METHODS", "Settings", "attribute", "clause_tokens", "clauses"]

DEFAULT_METHODS = ("ig", "erase", "gradnorm")
# Gauss-Legendre nodes per stretch of the path, and the stretches one starts with: 16 steps. Many short stretches beat
# few long ones: with RMSNorm and a pad embedding of zero, all the change is in the first percent of the path.
_NODES, _STRETCHES = 4, 4
_SHAP_FILLERS = 4  # starts of gradient SHAP that are other text, beside the pad token and zero
_SHAP_ROWS = 8  # samples of gradient SHAP per batch: fixed, so that what Captum draws does not depend on the memory


def attribute(
    probe: Probed,
    example: Example,
    methods: Sequence[str] = DEFAULT_METHODS,
    targets: Sequence[str] = ("label", "explanation"),
    settings: Settings | None = None,
    fillers: Sequence[str] = (),
) -> list[Attribution]:
    """Saliency maps of one row.

    Args:
        methods: names of ``METHODS``.
        targets: out of label, explanation, ``explanation[a:b]`` (``Scorer.forward``), and "citations": each place of
            the explanation that cites the post, as one ``explanation[a:b]``.
        fillers: clauses of other posts, needed by ``ig_filler``, ``gradshap`` and ``erase_resample``.
    Returns:
        one per method and target, methods outermost; the same numbers, up to rounding, whatever else is asked for.
    Raises:
        ProbeInputError: unknown method, target or setting, no fillers for a method that needs them, or the row lacks
            the target.
    """
    settings = settings or Settings()
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ProbeInputError(f"method {unknown[0]!r}: not one of {', '.join(METHODS)}")
    starved = [method for method in methods if method in NEED_FILLERS and not fillers]
    if starved:
        raise ProbeInputError(f"method {starved[0]!r} needs fillers: clauses of other posts")
    targets = expand_targets(example, targets)
    results: list[Attribution] = []
    if not targets:
        return results
    alone: dict[str, Forward] = {}
    for name in methods:
        kind, changes = METHODS[name]
        chosen = dataclasses.replace(settings, **changes)
        if kind in ("erase", "shap", "kernelshap"):
            results += perturb(probe.scorer.forward(example, targets), kind, name, chosen, tuple(fillers))
            continue
        for target in targets:
            if target not in alone:
                alone[target] = probe.scorer.forward(example, (target,))
            if kind == "ig":
                results.append(_integrated_gradients(probe, alone[target], name, chosen, fillers))
            elif kind == "gradshap":
                results.append(_gradient_shap(probe, alone[target], name, chosen, fillers))
            else:
                results.append(_one_gradient(probe, alone[target], name, chosen))
    return results


def expand_targets(example: Example, targets: Sequence[str]) -> tuple[str, ...]:
    """``targets`` with "citations" replaced by the cited segments of the explanation, each target once."""
    found: list[str] = []
    for target in targets:
        if target != "citations":
            found.append(target)
            continue
        spans = merge_spans(c.expl_char for c in align(example) if c.post_char)
        found += [f"explanation[{a}:{b}]" for a, b in spans]
    return tuple(dict.fromkeys(found))


def _start(forward: Forward, settings: Settings, fillers: Sequence[str]) -> torch.Tensor:
    """Post embeddings ``[n, D]`` where the path of integrated gradients begins."""
    if settings.baseline == "filler":
        return forward.filler(fillers, 1, settings.seed)[0]
    return forward.neutral if settings.baseline == "pad" else torch.zeros_like(forward.post)


def _integrated_gradients(
    probe: Probed, forward: Forward, name: str, settings: Settings, fillers: Sequence[str]
) -> Attribution:
    """Captum's ``IntegratedGradients`` over stretches of the path, the stretches with the largest error cut in half.

    The path is straight, so attributions of consecutive stretches add up to the attribution of the whole, and each
    stretch has its own completeness error, (sum of its values) - (change of the score over it), at no extra gradient.
    A score that jumps somewhere along the path gets its steps there, where doubling would put them everywhere.
    """
    began, rows_before = time.perf_counter(), forward.rows_run
    ig = IntegratedGradients(lambda post: forward(post)[:, 0])
    end = forward.post
    start = _start(forward, settings, fillers)
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
    return record(
        probe,
        forward.example,
        (name, forward.targets[0], settings),
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


def _one_gradient(probe: Probed, forward: Forward, name: str, settings: Settings) -> Attribution:
    """``gradnorm`` and ``gxi``, from one gradient at the post as it is."""
    began, rows_before = time.perf_counter(), forward.rows_run
    with torch.no_grad():
        f_input, f_baseline = forward(torch.stack([forward.post, forward.neutral]))[:, 0].double().tolist()
    post = forward.post[None].clone().requires_grad_()
    if name == "gxi":
        values = InputXGradient(lambda post: forward(post)[:, 0]).attribute(post)[0].detach().double().sum(-1)
    else:
        gradient = Saliency(lambda post: forward(post)[:, 0]).attribute(post, abs=False)
        values = gradient[0].detach().double().norm(dim=-1)
    return record(
        probe,
        forward.example,
        (name, forward.targets[0], settings),
        char_values=forward.example.post_chars(values.cpu().numpy()),
        baseline="pad",
        f=(f_input, f_baseline),
        counts=(forward.rows_run - rows_before, 1),
        began=began,
        params={"label_retokenised": forward.label_retokenised},
    )


def _gradient_shap(
    probe: Probed, forward: Forward, name: str, settings: Settings, fillers: Sequence[str]
) -> Attribution:
    """Captum's ``GradientShap`` with pad, zero and filler starts; the error of completeness is that of sampling."""
    began, rows_before = time.perf_counter(), forward.rows_run
    starts = [forward.neutral[None], torch.zeros_like(forward.post)[None]]
    starts = torch.cat([*starts, forward.filler(fillers, _SHAP_FILLERS, settings.seed)])
    shap = GradientShap(lambda post: forward(post)[:, 0])
    total, samples = torch.zeros(len(forward.post), dtype=torch.float64), 0
    with seeded(settings.seed):
        while samples < settings.shap_samples:
            rows = min(_SHAP_ROWS, settings.shap_samples - samples)
            found = shap.attribute(forward.post[None], starts, n_samples=rows, stdevs=0.0)
            total += rows * found[0].detach().double().sum(-1).cpu()
            samples += rows
    with torch.no_grad():
        scores = forward(torch.cat([forward.post[None], starts]))[:, 0].double().cpu()
    values = (total / samples).numpy()
    f_input, f_baseline = float(scores[0]), float(scores[1:].mean())
    return record(
        probe,
        forward.example,
        (name, forward.targets[0], settings),
        char_values=forward.example.post_chars(values),
        baseline="pad, zero, filler",
        f=(f_input, f_baseline),
        delta=float(values.sum()) - (f_input - f_baseline),
        counts=(forward.rows_run - rows_before, samples),
        began=began,
        params={"samples": samples, "label_retokenised": forward.label_retokenised},
    )
