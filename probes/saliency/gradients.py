"""Maps from gradients of the score by the post's embeddings, several targets from the same passes.

Captum's classes differentiate one number per row. Where several targets are asked for they are given the post with one
axis more, a copy per target, and a ``gradient_func`` that runs the model once and goes back once per target.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import InputXGradient, Saliency

from probes.models.forward import Forward
from probes.models.probed import Probed
from probes.records import Attribution, Example
from probes.saliency.settings import SMALLEST_CHANGE, Settings, record

# Stretches one starts with: 17 places. Many short ones beat few long ones: with RMSNorm and a pad embedding of zero
# all the change is in the first percent of the path.
_STRETCHES = 8
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
        alone: list[Group] = [(target,) for target in targets]
        if len(targets) < 2:
            return alone
        together = self.of(targets).tokens * (1 + len(targets))
        return [targets] if together < sum(2 * self.of(one).tokens for one in alone) else alone


def _captum(kind: Callable[..., Any], forward: Forward, scores: list[torch.Tensor] | None = None) -> Any:
    """A Captum method over ``[B, n, D, targets]``, copies of the post, with one gradient per copy. What the passes
    score, ``[B, targets]`` each, is added to ``scores``."""

    def stacked(forward_fn: Any, inputs: Any, target_ind: Any = None, additional_forward_args: Any = None) -> Any:
        with torch.enable_grad():
            post = inputs[0][..., 0].detach().requires_grad_()
            found = forward_fn(post)
            columns = found.sum(0).unbind()
            last = len(columns) - 1
            slopes = [torch.autograd.grad(c, post, retain_graph=i < last)[0] for i, c in enumerate(columns)]
        if scores is not None:
            scores.append(found.detach())
        return (torch.stack(slopes, -1),)

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
    """What is known along the path of one target: scores and slopes by place, integrals by stretch.

    A slope is the gradient times the way from start to end, ``[n]``. Simpson's rule takes it at both ends of a stretch
    and in its middle, so that halving one takes two new places and none is lost.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scores: dict[float, float] = {}
        self.slopes: dict[float, np.ndarray] = {}
        count = min(_STRETCHES, (settings.max_steps - 1) // 2)
        self.stretches: list[Stretch] = list(itertools.pairwise(np.linspace(0.0, 1.0, count + 1).tolist()))
        self.rows = 0

    @property
    def wanted(self) -> set[float]:
        """Places whose slopes are not known yet."""
        return {place for a, b in self.stretches for place in (a, (a + b) / 2, b)} - self.slopes.keys()

    def integral(self, stretch: Stretch) -> np.ndarray:
        """What each token gains over a stretch, ``[n]``."""
        a, b = stretch
        return (b - a) / 6 * (self.slopes[a] + 4 * self.slopes[(a + b) / 2] + self.slopes[b])

    def error(self, stretch: Stretch) -> float:
        """How far the integrals miss the change of the score."""
        a, b = stretch
        return float(self.integral(stretch).sum()) - (self.scores[b] - self.scores[a])

    @property
    def change(self) -> float:
        """The score at the end of the path less that at its start."""
        return self.scores[1.0] - self.scores[0.0]

    @property
    def allowed(self) -> float:
        """What ``_size`` of all errors may be."""
        return self.settings.tolerance * max(abs(self.change), SMALLEST_CHANGE)

    def refine(self) -> float:
        """Cuts the stretches with the largest errors in half, as far as there are steps left, unless the error is
        allowed. Returns that error."""
        errors = {stretch: self.error(stretch) for stretch in self.stretches}
        room = (self.settings.max_steps - len(self.slopes)) // 2
        for stretch in _worst(errors, self.allowed)[: max(room, 0)]:
            a, b = stretch
            self.stretches.remove(stretch)
            self.stretches += [(a, (a + b) / 2), ((a + b) / 2, b)]
        return _size(errors.values())


def integrated_gradients(
    passes: Passes, targets: Group, name: str, settings: Settings, fillers: Sequence[str]
) -> list[Attribution]:
    """Integrated gradients by Simpson's rule over stretches of the path, the stretches with the largest error halved.

    The path is straight, so attributions of consecutive stretches add up to the attribution of the whole, and each
    stretch has its own completeness error, (sum of its values) - (change of the score over it), at no extra pass.
    A score that jumps somewhere along the path gets its steps there, where doubling would put them everywhere. Each
    target cuts its own path; where several need the same place, one pass serves them. Gradients are Captum's
    (``Saliency``). V3 compares the whole with brute force, a test with Captum's ``IntegratedGradients``.

    It has converged when ``_size`` of the errors is at most ``settings.tolerance`` of the change: neither their sum,
    which is the completeness error, nor the root of the sum of their squares, which errors that cancel do not lower.
    """
    began = time.perf_counter()
    paths, errors = {target: _Path(settings) for target in targets}, dict.fromkeys(targets, 0.0)
    while wanted := {target: places for target, path in paths.items() if (places := path.wanted)}:
        shared: dict[Group, list[float]] = {}
        for place in sorted(set().union(*wanted.values())):
            for group in passes.groups(tuple(target for target in wanted if place in wanted[target])):
                shared.setdefault(group, []).append(place)
        for group, places in shared.items():
            _run(passes.of(group), places, [paths[target] for target in group], settings, fillers)
        errors |= {target: paths[target].refine() for target in wanted}
    results = []
    for target, path in paths.items():
        # Summed in path order, so that the result does not depend on the order of refinement.
        stretches = sorted(path.stretches)
        values = np.sum([path.integral(stretch) for stretch in stretches], axis=0)
        results.append(
            record(
                passes.probe,
                passes.example,
                (name, target, settings),
                char_values=passes.example.post_chars(values),
                baseline=settings.baseline,
                f=(path.scores[1.0], path.scores[0.0]),
                delta=float(values.sum()) - path.change,
                converged=errors[target] <= path.allowed,
                counts=(path.rows, len(path.slopes)),
                began=began,
                params={
                    "n_steps": len(path.slopes),
                    "edges": [0.0, *(b for _, b in stretches)],
                    "error": errors[target],
                    "tolerance": settings.tolerance,
                    "label_retokenised": passes.of((target,)).label_retokenised,
                },
            )
        )
        began = time.perf_counter()  # shared passes are booked once, with the first target they serve
    return results


def _run(
    forward: Forward, places: Sequence[float], paths: Sequence[_Path], settings: Settings, fillers: Sequence[str]
) -> None:
    """Scores and slopes at ``places`` of the path, for the paths of ``forward``'s targets."""
    before = forward.rows_run
    end, begin = forward.post, start(forward, settings, fillers)

    def measured(chosen: torch.Tensor) -> torch.Tensor:
        """``[B, n + 1, targets]``: the slopes, then the score."""
        scores: list[torch.Tensor] = []
        posts = torch.stack([begin + place * (end - begin) for place in chosen.tolist()]).requires_grad_()
        gradient = _captum(Saliency, forward, scores).attribute(_copies(posts, forward), abs=False)
        slopes = (gradient * (end - begin)[..., None]).detach().double().sum(2)
        return torch.cat([slopes, scores[-1].double()[:, None]], 1).cpu()

    found = forward.scorer.chunked(measured, torch.tensor(places, dtype=torch.float64), forward.tokens).numpy()
    for column, path in enumerate(paths):
        path.slopes.update(zip(places, found[:, :-1, column], strict=True))
        path.scores.update(zip(places, found[:, -1, column].tolist(), strict=True))
    paths[0].rows += forward.rows_run - before


def _size(errors: Iterable[float]) -> float:
    """How large errors are together: the size of their sum, or the root of the sum of their squares if that is more."""
    found = np.fromiter(errors, dtype=np.float64)
    return max(abs(float(found.sum())), float(np.linalg.norm(found)))


def _worst(errors: dict[Stretch, float], allowed: float) -> list[Stretch]:
    """Stretches to halve: the largest errors, until the rest come to at most half of what is allowed."""
    if _size(errors.values()) <= allowed:
        return []
    ranked = sorted(errors, key=lambda stretch: (-abs(errors[stretch]), stretch))
    for count in range(1, len(ranked)):
        if _size(errors[stretch] for stretch in ranked[count:]) <= allowed / 2:
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
