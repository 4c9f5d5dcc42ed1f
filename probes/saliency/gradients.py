"""Maps from gradients of the score by the post's embeddings, several targets from the same passes.

Captum's classes differentiate one number per row. Where several targets are asked for they are given the post with one
axis more, a copy per target, and a ``gradient_func`` that runs the model once and goes back once per target.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency

from probes.models.probed import Probed
from probes.models.score import Forward
from probes.records import Attribution, Example
from probes.saliency.settings import SMALLEST_CHANGE, Settings, record

# Gauss-Legendre nodes per stretch of the path, and the stretches one starts with: 16 steps. Many short stretches beat
# few long ones: with RMSNorm and a pad embedding of zero, all the change is in the first percent of the path.
_NODES, _STRETCHES = 4, 4
Stretch = tuple[float, float]
Group = tuple[str, ...]


class Passes:
    """The score functions of one row, of single targets and of several at once, each laid out once."""

    def __init__(self, probe: Probed, example: Example) -> None:
        self.probe, self.example = probe, example
        self._made: dict[Group, Forward] = {}

    def of(self, targets: Group) -> Forward:
        """The score function of these targets."""
        if targets not in self._made:
            self._made[targets] = self.probe.scorer.forward(self.example, targets)
        return self._made[targets]

    def groups(self, targets: Group) -> list[Group]:
        """Who shares a pass: all or nobody, whichever runs fewer tokens. Weights are frozen, so that the way back takes
        about what the pass takes; a shared one runs the longest row, and back once per target."""
        alone = [(target,) for target in targets]
        if len(targets) < 2:
            return alone
        together = self.of(targets).tokens * (1 + len(targets))
        return [targets] if together < sum(2 * self.of(one).tokens for one in alone) else alone


def _captum(kind: Callable[..., Any], forward: Forward) -> Any:
    """A Captum method over ``[B, n, D, targets]``, copies of the post, with one gradient per copy."""

    def stacked(forward_fn: Any, inputs: Any, target_ind: Any = None, additional_forward_args: Any = None) -> Any:
        with torch.enable_grad():
            post = inputs[0][..., 0].detach().requires_grad_()
            columns = forward_fn(post).sum(0).unbind()
            last = len(columns) - 1
            found = [torch.autograd.grad(c, post, retain_graph=i < last)[0] for i, c in enumerate(columns)]
        return (torch.stack(found, -1),)

    method = kind(forward)
    method.gradient_func = stacked
    return method


def _copies(post: torch.Tensor, forward: Forward) -> torch.Tensor:
    """``[B, n, D]`` -> ``[B, n, D, targets]``."""
    return post[..., None].expand(*post.shape, len(forward.targets))


def start(forward: Forward, settings: Settings, fillers: Sequence[str]) -> torch.Tensor:
    """Post embeddings ``[n, D]`` where the path of integrated gradients begins."""
    if settings.baseline == "filler":
        return forward.filler(fillers, 1, settings.seed)[0]
    return forward.neutral if settings.baseline == "pad" else torch.zeros_like(forward.post)


class _Path:
    """What is known along the path of one target: scores by place, sums of gradients and errors by stretch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scores: dict[float, float] = {}
        self.done: dict[Stretch, np.ndarray] = {}
        self.errors: dict[Stretch, float] = {}
        self.todo: list[Stretch] = list(itertools.pairwise(np.linspace(0.0, 1.0, _STRETCHES + 1).tolist()))
        self.steps = self.rows = 0

    def take(self, stretches: Sequence[Stretch], values: np.ndarray) -> None:
        """``values [stretches, n]``, the integrals over each."""
        self.steps += _NODES * len(stretches)
        for (a, b), found in zip(stretches, values, strict=True):
            self.done[a, b] = found
            self.errors[a, b] = float(found.sum()) - (self.scores[b] - self.scores[a])

    @property
    def change(self) -> float:
        """The score at the end of the path less that at its start."""
        return self.scores[1.0] - self.scores[0.0]

    @property
    def error(self) -> float:
        """Sum of the sizes of all errors."""
        return sum(abs(error) for error in self.errors.values())

    @property
    def allowed(self) -> float:
        """What that sum may be."""
        return self.settings.tolerance * max(abs(self.change), SMALLEST_CHANGE)

    def refine(self) -> None:
        """Cuts the stretches with the largest errors in half, as far as there are steps left."""
        room = (self.settings.max_steps - self.steps) // (2 * _NODES)
        worst = _worst(self.errors, self.allowed)[: max(room, 0)]
        for stretch in worst:
            del self.done[stretch], self.errors[stretch]
        self.todo = [half for a, b in worst for half in ((a, (a + b) / 2), ((a + b) / 2, b))]


def integrated_gradients(
    passes: Passes, targets: Group, name: str, settings: Settings, fillers: Sequence[str]
) -> list[Attribution]:
    """Captum's ``IntegratedGradients`` over stretches of the path, the stretches with the largest error cut in half.

    The path is straight, so attributions of consecutive stretches add up to the attribution of the whole, and each
    stretch has its own completeness error, (sum of its values) - (change of the score over it), at no extra gradient.
    A score that jumps somewhere along the path gets its steps there, where doubling would put them everywhere. Each
    target cuts its own path; where several need the same stretch, one pass serves them.
    """
    began = time.perf_counter()
    paths = {target: _Path(settings) for target in targets}
    while any(path.todo for path in paths.values()):
        wanted: dict[Group, list[Stretch]] = {}
        for stretch in sorted({stretch for path in paths.values() for stretch in path.todo}):
            for group in passes.groups(tuple(target for target in targets if stretch in paths[target].todo)):
                wanted.setdefault(group, []).append(stretch)
        for path in paths.values():
            path.todo = []
        for group, stretches in wanted.items():
            _run(passes.of(group), stretches, [paths[target] for target in group], settings, fillers)
        for path in paths.values():
            path.refine()
    results = []
    for target, path in paths.items():
        # Summed in path order, so that the result does not depend on the order of refinement.
        values = np.sum([path.done[stretch] for stretch in sorted(path.done)], axis=0)
        results.append(
            record(
                passes.probe,
                passes.example,
                (name, target, settings),
                char_values=passes.example.post_chars(values),
                baseline=settings.baseline,
                f=(path.scores[1.0], path.scores[0.0]),
                delta=float(values.sum()) - path.change,
                converged=path.error <= path.allowed,
                counts=(path.rows, path.steps),
                began=began,
                params={
                    "n_steps": path.steps,
                    "edges": [0.0, *(b for _, b in sorted(path.done))],
                    "sum_abs_delta": path.error,
                    "tolerance": settings.tolerance,
                    "label_retokenised": passes.of((target,)).label_retokenised,
                },
            )
        )
        began = time.perf_counter()  # shared passes are booked once, with the first target they serve
    return results


def _run(
    forward: Forward, stretches: Sequence[Stretch], paths: Sequence[_Path], settings: Settings, fillers: Sequence[str]
) -> None:
    """Scores at the ends of ``stretches`` and integrals over them, for the paths of ``forward``'s targets."""
    scorer, before = forward.scorer, forward.rows_run
    ig = _captum(IntegratedGradients, forward)
    end, begin = forward.post, start(forward, settings, fillers)

    def points(alphas: Sequence[float]) -> torch.Tensor:
        return torch.stack([begin + alpha * (end - begin) for alpha in alphas])

    def scores(chosen: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return forward(points(chosen.tolist())).double().cpu()

    def integrals(chosen: torch.Tensor) -> torch.Tensor:
        values = ig.attribute(
            _copies(points([b for _, b in chosen.tolist()]), forward),
            _copies(points([a for a, _ in chosen.tolist()]), forward),
            n_steps=_NODES,
            internal_batch_size=max(len(chosen), scorer.batch_rows(forward.tokens)),
        )
        return values.detach().double().sum(2).cpu()

    new = sorted({alpha for stretch in stretches for alpha in stretch if any(alpha not in p.scores for p in paths)})
    if new:
        found = scorer.chunked(scores, torch.tensor(new, dtype=torch.float64), forward.tokens)
        for column, path in enumerate(paths):
            path.scores.update(zip(new, found[:, column].tolist(), strict=True))
    chosen = torch.tensor(stretches, dtype=torch.float64)
    values = scorer.chunked(integrals, chosen, forward.tokens, _NODES).numpy()
    for column, path in enumerate(paths):
        path.take(stretches, values[:, :, column])
    paths[0].rows += forward.rows_run - before


def _worst(errors: dict[Stretch, float], allowed: float) -> list[Stretch]:
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


def one_gradient(passes: Passes, targets: Group, name: str, settings: Settings) -> list[Attribution]:
    """``gradnorm`` and ``gxi``, from one gradient at the post as it is."""
    results = []
    for group in passes.groups(targets):
        began, forward = time.perf_counter(), passes.of(group)
        before = forward.rows_run
        with torch.no_grad():
            scores = forward(torch.stack([forward.post, forward.neutral])).double().cpu()
        post = _copies(forward.post[None].clone().requires_grad_(), forward)
        if name == "gxi":
            values = _captum(InputXGradient, forward).attribute(post)[0].detach().double().sum(1)
        else:
            gradient = _captum(Saliency, forward).attribute(post, abs=False)
            values = gradient[0].detach().double().norm(dim=1)
        for column, target in enumerate(group):
            results.append(
                record(
                    passes.probe,
                    passes.example,
                    (name, target, settings),
                    char_values=passes.example.post_chars(values[:, column].cpu().numpy()),
                    baseline="pad",
                    f=(float(scores[0, column]), float(scores[1, column])),
                    counts=(forward.rows_run - before, 1),
                    began=began,
                    params={"label_retokenised": forward.label_retokenised},
                )
            )
            began, before = time.perf_counter(), forward.rows_run
    return results
