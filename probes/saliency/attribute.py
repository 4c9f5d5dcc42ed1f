"""Saliency over the post with Captum's plain classes and our own batched forward.

Captum's LLM wrappers are not used: with transformers >= 5.3 their default path returns wrong numbers without an error
(``probes selftest`` shows it on the installed versions), and they can neither batch nor report a completeness delta.

* ``ig``, ``ig_zero``, ``ig_filler``: integrated gradients (Sundararajan et al. 2017) over the embeddings of the post's
  tokens, from the pad token, from zero, or from clauses of other posts.
* ``gradshap``: gradient SHAP (Lundberg & Lee 2017) over the same three kinds of start.
* ``erase``, ``erase_neutral``, ``erase_resample``, ``shap``, ``kernelshap``: ``probes.saliency.erase``.
* ``gradnorm``: L2 norm of the gradient per post token. A screening method: it has no sign and no completeness.
* ``gxi``: gradient times input. A baseline that is known to point at the wrong words (docs/validation.md); it is never
  evidence.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from captum.attr import GradientShap

from probes.citations.align import align, merge_spans
from probes.citations.clauses import clause_tokens, clauses
from probes.errors import ProbeInputError
from probes.models.forward import Forward
from probes.models.probed import Probed
from probes.records import Attribution, Example
from probes.saliency.erase import erasure_maps, seeded
from probes.saliency.gradients import Passes, integrated_gradients, one_gradient
from probes.saliency.settings import METHODS, NEED_FILLERS, NEED_GRADIENTS, Settings, record

__all__ = ["DEFAULT_METHODS", "METHODS", "Settings", "attribute", "clause_tokens", "clauses"]

DEFAULT_METHODS = ("ig", "erase", "gradnorm")
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
        ProbeInputError: unknown method, target or setting, no fillers for a method that needs them, the row lacks the
            target, or a map from gradients of a model that has none (``Abilities.ungraded``).
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
    if graded := [method for method in methods if method in NEED_GRADIENTS]:
        probe.scorer.check(example)
        if why := probe.scorer.can.ungraded:
            others = ", ".join(name for name in METHODS if name not in NEED_GRADIENTS)
            raise probe.scorer.refused(f"method {graded[0]!r}, a map from gradients", f"{why}; it has {others}")
    with probe.scorer.unchanged():
        passes = Passes(probe, example)
        for name in methods:
            kind, changes = METHODS[name]
            chosen = dataclasses.replace(settings, **changes)
            if kind in ("erase", "shap", "kernelshap"):
                results += erasure_maps(passes.of(targets), kind, name, chosen, tuple(fillers))
            elif kind == "ig":
                results += integrated_gradients(passes, targets, name, chosen, fillers)
            elif kind == "gradshap":
                results += [_gradient_shap(probe, passes.of((one,)), name, chosen, fillers) for one in targets]
            else:
                results += one_gradient(passes, targets, name, chosen)
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
