"""Which rows of which checkpoint tensor a parameter is, and those rows in our order.

Checkpoints store a linear map as ``[out, in]``. A parameter (or one layer of a stacked one) may be some rows of a
tensor, may lie in several tensors, and may have the rows of each head in another order: the dimensions that rotary
positions turn as a pair are (2i, 2i + 1) here and in GLM, (i, i + head / 2) in Llama and its kin.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mentalglm_jax.checkpoints.hf_files import Checkpoint


class Part(NamedTuple):
    """The rows ``start:stop`` of a checkpoint tensor: the rows from ``first`` on of a parameter of the tree, or of one
    layer of a stacked one. ``head``: 0, or the rows of a head where the tensor has its rotary pairs half-split."""

    path: str
    layer: int | None
    start: int
    stop: int
    first: int = 0
    head: int = 0


class Tensor(NamedTuple):
    """A checkpoint tensor as the configuration implies it, and what its rows are, first to last."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def interleaved(rows: np.ndarray, head: int) -> np.ndarray:
    """Rows of whole heads, from half-split pairs to neighbouring ones."""
    return rows.reshape(-1, 2, head // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def half_split(rows: np.ndarray, head: int) -> np.ndarray:
    """The inverse of ``interleaved``."""
    return rows.reshape(-1, head // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class Rows:
    """Reads rows of parameters, in our order, out of a checkpoint whose tensors are ``tensors``."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]):
        self._checkpoint = checkpoint
        self._places: dict[tuple[str, int | None], list[tuple[str, Part]]] = {}
        for name, tensor in tensors.items():
            for part in tensor.parts:
                self._places.setdefault((part.path, part.layer), []).append((name, part))

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        """Every parameter and layer, in the order of the tensors."""
        return iter(self._places)

    def names(self, path: str, layer: int | None) -> list[str]:
        """The tensors that hold it."""
        return [name for name, _ in self._places[path, layer]]

    def read(self, path: str, layer: int | None, start: int, stop: int, *rest: slice) -> np.ndarray:
        """The rows ``start:stop`` ``[stop - start, ...]`` of a parameter; ``rest`` cuts the other axes."""
        found = [
            self._of_part(name, part, max(start - part.first, 0), min(stop - part.first, part.stop - part.start), rest)
            for name, part in self._places[path, layer]
            if start < part.first + part.stop - part.start and part.first < stop
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _of_part(self, name: str, part: Part, start: int, stop: int, rest: tuple[slice, ...]) -> np.ndarray:
        rest = rest or (slice(None),) * (len(self._checkpoint.tensors[name].shape) - 1)
        if not part.head:
            return self._checkpoint.read(name, slice(part.start + start, part.start + stop), *rest)
        low, high = start // part.head * part.head, -(-stop // part.head) * part.head  # whole heads
        rows = self._checkpoint.read(name, slice(part.start + low, part.start + high), *rest)
        return interleaved(rows, part.head)[start - low : stop - low]
