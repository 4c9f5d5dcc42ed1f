"""Saliency by erasing units of the post: leave-one-out and Shapley values, through Captum over a 0/1 mask of units.

Captum sees a function of a mask ``[B, units]`` only; ours maps it to batched passes over the post with those units
erased, and keeps every row it ever computed: one table serves all targets, and no mask is run twice.

* ``erase``: leave-one-out (``FeatureAblation``). Blind to redundancy: where a cue stands twice, neither is missed.
* ``shap``: Shapley values over ``shap_samples`` permutations (``ShapleyValueSampling``; exact below
  ``EXACT_UNITS`` units, ``ShapleyValues``). Shares an effect among redundant cues; sums to the change of the score.
* ``kernelshap``: Shapley values by weighted least squares (``KernelShap``; Lundberg & Lee 2017).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import FeatureAblation, KernelShap, ShapleyValues, ShapleyValueSampling
from torch.utils.data import DataLoader

from probes.citations.clauses import unit_tokens
from probes.models.forward import Forward
from probes.records import Attribution, Example, Span
from probes.saliency.settings import Settings, record

EXACT_UNITS = 4  # 4! orders of 4 units; their 16 masks are all there are
_ROWS = 256  # masks Captum hands over at a time; the engine cuts them to its token budget


@dataclass(frozen=True, eq=False)
class MaskTable:
    """Scores of one example as a function of which units are kept; every mask is scored once.

    Attributes:
        spans: character spans of the units, none where they are tokens or characters.
        owner: int64 ``[post tokens]``, the unit of each.
        count: units.
    """

    forward: Forward
    spans: list[Span]
    owner: torch.Tensor
    count: int
    eraser: str
    filler: torch.Tensor | None
    table: dict[bytes, torch.Tensor]

    @classmethod
    def of(cls, forward: Forward, settings: Settings, fillers: tuple[str, ...] = ()) -> MaskTable:
        """The table of ``forward``'s example in the units and with the eraser of ``settings``."""
        spans, unit = unit_tokens(forward.example, settings.units, settings.max_units)
        resampled = settings.eraser == "resample"
        filler = forward.filler_ids(fillers, settings.draws, settings.seed) if resampled else None
        return cls(forward, spans, torch.as_tensor(unit), int(unit.max()) + 1, settings.eraser, filler, {})

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        """float ``[B, units]`` of 0 (erased) and 1 -> float64 ``[B, targets]`` in nats."""
        kept = mask.detach().bool().cpu()
        keys = [row.numpy().tobytes() for row in kept]
        new = list({key: index for index, key in enumerate(keys) if key not in self.table}.values())
        if new:
            found = self.forward.kept(kept[new][:, self.owner], self.eraser, self.filler).double().cpu()
            self.table.update(zip((keys[index] for index in new), found, strict=True))
        return torch.stack([self.table[key] for key in keys])

    def chars(self, values: np.ndarray, example: Example) -> np.ndarray:
        """Unit values spread over the characters of the post; the sum is kept."""
        if self.spans:  # over the characters that were erased: those of border tokens stayed
            share = example.varied.astype(np.float64)
            return np.concatenate(
                [share[a:b] * (v / share[a:b].sum()) for (a, b), v in zip(self.spans, values, strict=True)]
            )
        size = np.bincount(self.owner.numpy(), minlength=self.count)
        return example.post_chars((values / size)[self.owner.numpy()])


def erasure_maps(
    forward: Forward, kind: str, name: str, settings: Settings, fillers: tuple[str, ...]
) -> list[Attribution]:
    """Maps of all targets of ``forward`` by one method.

    Args:
        kind: erase | shap | kernelshap. name: what the maps are called.
        fillers: clauses of other posts, for resampling.
    """
    example = forward.example
    results = []
    began, rows_before = time.perf_counter(), forward.rows_run
    scores = MaskTable.of(forward, settings, fillers)
    for column, target in enumerate(forward.targets):
        values = _values(scores, column, kind, settings)
        ends = torch.stack([torch.ones(scores.count), torch.zeros(scores.count)])
        f_input, f_baseline = scores(ends)[:, column].tolist()
        shares = kind != "erase"  # Shapley values share out the whole change of the score
        eraser = forward.eraser(settings.eraser)
        params = {"units": settings.units, "eraser": eraser, "label_retokenised": forward.label_retokenised}
        if shares:
            params |= {"samples": settings.shap_samples, "n_units": scores.count}
        results.append(
            record(
                forward.scorer.probe,
                example,
                (name, target, settings),
                char_values=scores.chars(values, example),
                units=(values, tuple(scores.spans), settings.units) if scores.spans else None,
                baseline=eraser,
                f=(f_input, f_baseline),
                delta=float(values.sum()) - (f_input - f_baseline) if shares else None,
                counts=(forward.rows_run - rows_before, 0),
                began=began,
                params=params,
            )
        )
        # All targets are read from the same passes: they are booked once, with the target that made them.
        began, rows_before = time.perf_counter(), forward.rows_run
    return results


def _values(scores: MaskTable, column: int, kind: str, settings: Settings) -> np.ndarray:
    def score(mask: torch.Tensor) -> torch.Tensor:
        return scores(mask)[:, column]

    ones = torch.ones(1, scores.count, dtype=torch.float64)
    rows = max(1, min(scores.count, _ROWS))
    with seeded(settings.seed):
        if kind == "erase" or scores.count == 1:
            found = FeatureAblation(score).attribute(ones, baselines=0, perturbations_per_eval=rows)
        elif kind == "kernelshap":
            kernel: Any = KernelShap(score)
            kernel.interpretable_model = LeastSquares()
            found = kernel.attribute(ones, baselines=0, n_samples=_kernel_samples(scores.count, settings),
                                     perturbations_per_eval=_ROWS)  # fmt: skip
        elif scores.count <= EXACT_UNITS:
            found = ShapleyValues(score).attribute(ones, baselines=0, perturbations_per_eval=rows)
        else:
            sampling = ShapleyValueSampling(score)
            found = sampling.attribute(ones, baselines=0, n_samples=settings.shap_samples, perturbations_per_eval=rows)
    return found[0].double().numpy()


def _kernel_samples(count: int, settings: Settings) -> int:
    """As many masks as the permutations would visit, and never fewer than the unknowns want."""
    return max(2 * count + 64, settings.shap_samples * count)


class LeastSquares:
    """The linear model ``KernelShap`` fits; Captum's own needs scikit-learn."""

    def __init__(self) -> None:
        self._weights = torch.empty(0)

    def fit(self, train_data: DataLoader) -> None:
        """Weighted least squares with an intercept over all batches, in float64."""
        x, y, weight = (torch.cat(column).double() for column in zip(*train_data, strict=True))
        design = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], 1)
        root = weight.sqrt()[:, None]
        self._weights = torch.linalg.lstsq(root * design, root[:, 0] * y, driver="gelsd").solution[1:]

    def representation(self) -> torch.Tensor:
        """float64 ``[units]``."""
        return self._weights


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Captum draws from the global generators; what it draws must depend on the seed only, and leave no trace."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


def subset_masks(count: int, rows: int, seed: int) -> torch.Tensor:
    """float64 ``[rows, count]`` of 0 and 1: random subsets of random size between 1 and count - 1, none twice in a row.

    Sizes are uniform, so that faithfulness is judged from nearly whole posts down to nearly empty ones.
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros((rows, count))
    for row in masks:
        row[rng.permutation(count)[: int(rng.integers(1, max(2, count)))]] = 1.0
    if count <= 12 and rows >= 2**count - 2:  # all of them, where that is fewer
        masks = np.array([[(code >> bit) & 1 for bit in range(count)] for code in range(1, 2**count - 1)], dtype=float)
    return torch.as_tensor(masks, dtype=torch.float64).reshape(-1, count)
