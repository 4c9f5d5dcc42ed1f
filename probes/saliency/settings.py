"""What a saliency map depends on, what the methods are called, and the record that is made of each map."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.errors import ProbeInputError
from probes.models.loaded import LoadedModel
from probes.records import Attribution, Example, Span

# A change of the score below this many nats counts as none when an error is put in relation to it.
SMALLEST_CHANGE = 0.1

# name -> the method behind it and what it changes in the settings.
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ig": ("ig", {}),
    "ig_zero": ("ig", {"baseline": "zero"}),
    "ig_filler": ("ig", {"baseline": "filler"}),
    "gradshap": ("gradshap", {}),
    "erase": ("erase", {}),
    "erase_neutral": ("erase", {"eraser": "neutral"}),
    "erase_resample": ("erase", {"eraser": "resample"}),
    "shap": ("shap", {}),
    "kernelshap": ("kernelshap", {}),
    "gradnorm": ("gradnorm", {}),
    "gxi": ("gxi", {}),
}
NEED_GRADIENTS = tuple(name for name, (kind, _) in METHODS.items() if kind not in ("erase", "shap", "kernelshap"))
NEED_FILLERS = ("ig_filler", "gradshap", "erase_resample")


@dataclass(frozen=True)
class Settings:
    """What an attribution depends on besides model, row and target.

    Attributes:
        baseline: IG path start: "pad" (embedding of the pad token at every post position), "zero", or "filler"
            (clauses of other posts).
        tolerance: IG stops refining when the completeness errors of its stretches come to less than this share of the
            score change (``gradients.integrated_gradients``).
        max_steps: most gradient evaluations per IG.
        eraser: "attention" (for a model that cannot hide tokens: cut out), "neutral" or "resample" (``Forward.kept``).
        units: clause | word | char | token (``citations.clauses.unit_tokens``): what erasure and Shapley values count.
        max_units: most clauses.
        draws: fillers per erasure by resampling, over which the score's median is taken.
        shap_samples: permutations per Shapley value; samples of gradient SHAP are as many.
        seed: of everything that is drawn.
    """

    baseline: str = "pad"
    tolerance: float = 0.05
    max_steps: int = 256
    eraser: str = "attention"
    units: str = "clause"
    max_units: int = 30
    draws: int = 12
    shap_samples: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "baseline": ("pad", "zero", "filler"),
            "eraser": ("attention", "neutral", "resample"),
            "units": ("clause", "word", "char", "token"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ProbeInputError(f"{name} {getattr(self, name)!r}: not one of {', '.join(values)}")
        if not 0 < self.tolerance < 1 or self.max_steps < 16 or min(self.max_units, self.draws, self.shap_samples) < 1:
            raise ProbeInputError(
                "settings: tolerance must be in (0, 1), max_steps at least 16, max_units, draws and shap_samples "
                "at least 1"
            )


def record(
    probe: LoadedModel,
    example: Example,
    what: tuple[str, str, Settings],
    *,
    char_values: np.ndarray,
    baseline: str,
    f: tuple[float, float],
    counts: tuple[int, int],
    began: float,
    params: dict[str, Any],
    units: tuple[np.ndarray, tuple[Span, ...], str] | None = None,
    delta: float | None = None,
    converged: bool | None = None,
) -> Attribution:
    """The record of one map.

    Args:
        what: method name, target, settings. units: values, spans and kind of the units, None for a map on characters.
        f: score of the row as it is and with the whole post replaced. counts: sequences run forward, and backward.
        began: ``time.perf_counter()`` at the start.
    """
    method, target, settings = what
    values, spans, unit = units or (char_values, tuple((i, i + 1) for i in range(len(char_values))), "char")
    return Attribution(
        example_id=example.id,
        method=method,
        target=target,
        unit=unit,
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
