"""Keys and values of the tokens before the post, computed once and used in every pass.

A causal model computes them from those tokens alone: no perturbation of the post reaches them, and neither does its
gradient. Where instruction and examples stand before the post they are most of the row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from probes.errors import ProbeInputError

MIN_TOKENS = 8  # shorter prefixes save less than handling them costs


class NoPrefix(ProbeInputError):
    """The model's cache is of a kind that is not kept here."""


class Prefix:
    """What one prefix left in the model's cache, for batches of any size.

    Attributes:
        tokens: its length.
        size: bytes that it holds.
    """

    def __init__(self, cache: Any, tokens: int) -> None:
        """Takes the cache of one sequence of ``tokens`` tokens.

        Raises:
            NoPrefix: it is no ``DynamicCache`` of plain and sliding-window layers. State-space and hybrid models keep
                states instead of tokens, and write into them where they are.
        """
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        if type(cache) is not DynamicCache:
            raise NoPrefix(f"its cache is {type(cache).__name__}, not DynamicCache")
        kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if kinds:
            raise NoPrefix(f"its cache holds {', '.join(sorted(kind.__name__ for kind in kinds))}")
        self._cache: Any = cache
        self.tokens = tokens
        layers: Any = cache.layers
        filled = [layer for layer in layers if layer.is_initialized]
        self.size = sum(part.nbytes for layer in filled for part in (layer.keys, layer.values))

    def cache(self, batch: int) -> Any:
        """A ``DynamicCache`` of ``batch`` equal rows that a model may go on from; this one stays as it is."""
        found = copy.copy(self._cache)
        found.layers = [copy.copy(layer) for layer in self._cache.layers]
        for layer in found.layers:
            if layer.is_initialized:  # models that share keys among layers leave some empty
                layer.keys = layer.keys.expand(batch, -1, -1, -1)
                layer.values = layer.values.expand(batch, -1, -1, -1)
        return found


def read_prefix(model: Any, inputs: dict[str, Any]) -> Prefix:
    """Runs a model over ``inputs`` (``inputs_embeds [1, P, D]`` or ``input_ids [1, P]``, and what it needs beside) and
    keeps its cache.

    Raises:
        NoPrefix: the model gives no cache that can be kept.
    """
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise NoPrefix("it gives no past_key_values")
    return Prefix(cache, next(inputs[name].shape[1] for name in ("inputs_embeds", "input_ids") if name in inputs))
