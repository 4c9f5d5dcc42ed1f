"""Decoding on random weights: tokens per second at several batch sizes, and how fast the weights go by."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mentalglm_jax.bench.target import Target
from mentalglm_jax.inference.decode import generate_ids
from mentalglm_jax.planning.cost import weight_bytes

BATCHES = (1, 8, 32)
PROMPT = 120


def measure(target: Target, seconds: float, tell: Callable[[dict[str, Any]], None]) -> None:
    """Per batch size ``tokens_per_second`` over a whole answer (prompt included in the time), ``step_seconds`` (what
    twice as many tokens take more) and ``weights_per_second`` in bytes: every step reads all of them once."""
    deadline = time.monotonic() + seconds
    model = target.model()
    new, read = (128, sum(weight_bytes(target.shapes())))
    found: dict[str, Any] = {"new_tokens": new, "prompt_tokens": PROMPT, "weight_bytes": read, "batches": {}}
    tell(found)
    rng = np.random.default_rng(0)
    for number, batch in enumerate(BATCHES):
        if number and time.monotonic() > deadline:
            break
        prompts = rng.integers(4, target.config.vocab_size, (batch, PROMPT)).tolist()

        def taken(count: int, batch: int = batch, prompts: list[list[int]] = prompts) -> float:
            began = time.perf_counter()
            generate_ids(model, prompts, max_new_tokens=count, eos_ids=[], batch_size=batch)
            return time.perf_counter() - began

        first = {count: taken(count) for count in (new, new // 2)}  # these compile
        long, short = (min(taken(count) for _ in range(2)) for count in (new, new // 2))
        step = max(long - short, 1e-9) / (new - new // 2)
        found["batches"][str(batch)] = {
            "tokens_per_second": batch * new / long, "step_seconds": step, "weights_per_second": read / step,
            "first_seconds": first[new],
        }  # fmt: skip
        tell(found)
