"""Pairs of answers for the tiny model."""

from typing import Any

import numpy as np

from mentalglm_jax.data.batches import Example
from mentalglm_jax.data.pairs import Pair, encode_pairs
from mentalglm_jax.train.preference import Objective
from tests.mentalglm_jax.tiny import VOCAB

LENGTH = 48


def tiny_pairs(count: int = 12, seed: int = 0) -> list[Pair]:
    """Prompts of 3 to 8 tokens, answers of 1 to 6, unevenly long."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(1, VOCAB, rng.integers(low, high + 1))))

    return [Pair(f"pair-{n}", ids(3, 8), (*ids(1, 6), 1), (*ids(1, 6), 2), n) for n in range(count)]


def tiny_pair_examples(count: int = 12, seed: int = 0) -> list[Example]:
    return encode_pairs(tiny_pairs(count, seed), LENGTH)[0]


def objective(kind: str = "dpo", **changes: Any) -> Objective:
    return Objective(**({"kind": kind, "pairs": "pairs.jsonl", "beta": 0.3} | changes))
