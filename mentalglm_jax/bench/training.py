"""The training step of a recipe on random weights and packed rows: tokens per second, FLOP/s, memory, compilation."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mentalglm_jax.bench.target import PER_ROW, Target, examples
from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.devices.distributed import spread
from mentalglm_jax.devices.hardware import TPUS, chip_of
from mentalglm_jax.planning.cost import bound, estimate_memory, shape_of
from mentalglm_jax.train.speed import train_flops
from mentalglm_jax.train.step import make_optimizer, make_step

STEPS = 20  # that are timed at most, after one that is not


def measure(target: Target, seconds: float, rows_file: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Times steps until ``seconds`` are over. ``rows_file`` (npz) gets the first batch, for others to train on.

    Rates are of the median step and of all devices together: ``tokens_per_second`` (real ones), ``answer_tokens_...``,
    ``model_flops`` (4 per parameter of the frozen base and token, see ``train.speed``) and ``executed_flops`` (with
    what is computed twice) per second. Memory is of the first device, in bytes: what the compiler laid out, what the
    allocator saw, and what the plan's arithmetic had said.
    """
    deadline = time.monotonic() + seconds
    config, mesh = target.train, target.mesh
    batches = PackedBatches(
        examples(PER_ROW * config.rows, config.sequence_length, target.config.vocab_size), rows=config.rows,
        sequence_length=config.sequence_length, targets_per_row=config.targets_per_row, seed=0,
    )  # fmt: skip
    feed = iter(batches)
    placed = [spread(next(feed), config.rows, config.accumulate, mesh, None) for _ in range(2)]
    first: Any = next(iter(batches))
    np.savez(rows_file, tokens=first["tokens"], positions=first["positions"], segments=first["segment_ids"],
             target_index=first["target_index"], target_weights=first["target_weights"])  # fmt: skip
    shapes, shape = target.shapes(), shape_of(config.model_copy(update={"targets_per_row": batches.targets_per_row}),
                                              dict(mesh.shape))  # fmt: skip
    found: dict[str, Any] = {
        "parameters": target.parameters(), "rows": config.rows, "accumulate": config.accumulate,
        "sequence_length": config.sequence_length, "mesh": dict(mesh.shape), "packed": str(batches.lengths),
        "dtype": target.recipe.model.dtype, "quantize": target.recipe.model.quantize,
        "remat": target.recipe.model.remat,
        "planned_bytes": estimate_memory(shapes, shape).total,
    }  # fmt: skip
    tell(found)
    model = target.model()
    step, state, frozen = make_step(model, make_optimizer(config, 1000), config, "lora", mesh)
    del model
    key = jax.random.key(0)
    began = time.perf_counter()
    compiled = step.lower(state.trainable, state.optimizer, frozen, placed[0], key).compile()
    found["compile_seconds"] = time.perf_counter() - began
    memory = compiled.memory_analysis()
    if memory is not None:
        found["compiled_bytes"] = (memory.argument_size_in_bytes + memory.output_size_in_bytes
                                   - memory.alias_size_in_bytes + memory.temp_size_in_bytes)  # fmt: skip
    tell(found)
    trainable, optimizer, times, counts = state.trainable, state.optimizer, [], []
    while len(times) <= STEPS and (len(times) < 2 or time.monotonic() < deadline):
        began = time.perf_counter()
        trainable, optimizer, out = compiled(trainable, optimizer, frozen, placed[len(times) % 2], key)
        out = {name: float(value) for name, value in out.items()}
        times.append(time.perf_counter() - began)
        counts.append(out)
        if len(times) > 1:
            found |= _rates(target, times[1:], counts[1:])
            found["executed_flops"] = found["model_flops"] * _executed(shapes, shape)
            found["peak_bytes"] = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            tell(found)
    if not np.isfinite(counts[-1]["loss"]):
        raise FloatingPointError(f"the loss of step {len(times)} is {counts[-1]['loss']}")


def _rates(target: Target, times: list[float], counts: list[dict[str, float]]) -> dict[str, Any]:
    """Of the median step; the batches differ by a few tokens, so its tokens are the mean."""
    seconds = statistics.median(times)
    tokens, targets, pairs = (statistics.mean(out[name] for out in counts) for name in ("tokens", "targets", "pairs"))
    flops = train_flops(target.config, tokens=tokens, targets=targets, pairs=pairs, frozen=True)
    return {"steps": len(times), "step_seconds": seconds, "slowest_step_seconds": max(times),
            "tokens_per_second": tokens / seconds, "answer_tokens_per_second": targets / seconds,
            "model_flops": flops / seconds, "loss": counts[-1]["loss"]}  # fmt: skip


def _executed(shapes: Any, shape: Any) -> float:
    """What the program computes over what the mathematics needs, by the plan's arithmetic."""
    chip = chip_of(jax.devices()[0].device_kind) or next(iter(TPUS.values()))  # FLOPs do not depend on it
    found = bound(shapes, shape, chip)
    return found.executed_flops / found.model_flops
