"""The adapter of one module, and what becomes of it where modules are fused, split or have their rows reordered.

Fused to split: A is copied, the rows of B are cut; ranks that only one part uses go to that part alone. Split to fused:
the same when all A are equal; else the ranks add up, A is stacked and B has the parts' B on its diagonal. All of it is
the same map exactly, and splitting what was so fused gives the parts back bit for bit (if they had one scale).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mentalglm_jax.model.lora import Spec


@dataclasses.dataclass(frozen=True)
class Low:
    """One module's adapter on the host: ``a [r, in]``, ``b [out, r]``, DoRA's ``magnitude [out]``, what it means."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    spec: Spec


def fuse(parts: list[Low | None], outputs: list[int], rslora: bool) -> Low:
    """The adapter of modules whose outputs are concatenated; None is a part without one."""
    present = [part for part in parts if part is not None]
    first = present[0]
    magnitude = None
    if all(part.magnitude is not None for part in present):
        magnitude = np.concatenate([part.magnitude for part in present if part.magnitude is not None])
    if len(present) == len(parts) and all(
        part.spec == first.spec and np.array_equal(part.a, first.a) for part in present
    ):
        return Low(first.a, np.concatenate([part.b for part in present]), magnitude, first.spec)
    rank = sum(part.spec.rank for part in present)
    scale = next((part.spec.scale for part in present if part.spec.scale), 1.0)
    b, row, column = np.zeros((sum(outputs), rank), np.float32), 0, 0
    for part, rows in zip(parts, outputs, strict=True):
        if part is not None:
            factor = np.float32(part.spec.scale / scale)
            b[row : row + rows, column : column + part.spec.rank] = part.b * factor
            column += part.spec.rank
        row += rows
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return Low(np.concatenate([part.a for part in present]), b, magnitude, Spec(rank, alpha, scale))


def halves(low: Low, rslora: bool) -> list[Low | None]:
    """The adapters of the two modules whose outputs are the halves of one; None is a half that is not changed."""
    parts = np.split(low.b, 2)
    magnitudes = [None, None] if low.magnitude is None else np.split(low.magnitude, 2)
    used = [part.any(axis=0) for part in parts]
    idle = [not each.any() for each in used]
    if (used[0] & used[1]).any() or all(idle) or (any(idle) and low.magnitude is not None):
        return [dataclasses.replace(low, b=b, magnitude=m) for b, m in zip(parts, magnitudes, strict=True)]
    found: list[Low | None] = []
    for b, ranks, magnitude in zip(parts, used, magnitudes, strict=True):
        rank, scale = int(ranks.sum()), low.spec.scale
        spec = Spec(rank, scale * (math.sqrt(rank) if rslora else rank), scale)
        found.append(Low(low.a[ranks], b[:, ranks], magnitude, spec) if rank else None)
    return found


def reordered(low: Low, order: Callable[[np.ndarray], np.ndarray]) -> Low:
    """``low`` with the outputs of its module in another order."""
    return dataclasses.replace(low, b=order(low.b), magnitude=None if low.magnitude is None else order(low.magnitude))
