"""A two-layer model with an adapter, a few examples and a short run: what the training tests train."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mentalglm_jax.data.batches import Batch, Example, PackedBatches
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, add_lora
from mentalglm_jax.model.quantize import quantize_model
from mentalglm_jax.train.recipe import TrainConfig

VOCAB = 96


def tiny_model(*, dropout: float = 0.0, lora: bool = True, dora: bool = False, quantize: str | None = None) -> Glm:
    """Weights drawn at 0.2 and an adapter that already does something show mistakes that a fresh start hides."""
    graph, state = _tiny_model(dropout, lora, dora, quantize)
    return nnx.merge(graph, jax.tree.map(jnp.array, state))  # copies, for a training step takes its arrays


@functools.cache
def _tiny_model(dropout: float, lora: bool, dora: bool, quantize: str | None) -> tuple[nnx.GraphDef, nnx.State]:
    config = GlmConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, head_dim=8,
                       num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    if quantize is not None:
        quantize_model(model, quantize)
    if lora:
        add_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=dropout, use_dora=dora), nnx.Rngs(1))
        down = model.layers.mlp.down_proj.adapter
        down.b.set_value(0.1 * jax.random.normal(jax.random.key(2), down.b.shape))
    graph, state = nnx.split(model)
    return graph, jax.tree.map(np.array, state)


def on_eight_devices(script: str, *arguments: str) -> Any:
    """What ``script`` prints as JSON when it is run in a process with eight CPU devices."""
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:Error reading persistent compilation cache entry",
         script, *arguments], cwd=root, capture_output=True, text=True, timeout=1500,
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": flags}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def tiny_examples(count: int = 40, longest: int = 20, seed: int = 0) -> list[Example]:
    """Random token rows of 4 to ``longest`` tokens; the last few of each are targets, unevenly many."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(rng.integers(4, longest + 1))
        targets = int(rng.integers(1, length))
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        index = np.arange(length - 1 - targets, length - 1, dtype=np.int32)
        found.append(Example(tokens=tokens, target_index=index, target_ids=tokens[index + 1]))
    return found


def tiny_config(**changes: Any) -> TrainConfig:
    """12 steps of 4 rows in 2 micro-batches, saved every 4 steps, all of them logged."""
    values: dict[str, Any] = {"steps": 12, "rows": 4, "accumulate": 2, "sequence_length": 32, "learning_rate": 1e-2,
                              "warmup_ratio": 0.25, "loss_chunk": 8, "save_every": 4, "log_every": 1}  # fmt: skip
    return TrainConfig(**(values | changes))


def tiny_batch(rows: int = 4, seed: int = 0) -> Batch:
    """One packed batch of ``tiny_examples``."""
    examples = tiny_examples(40, seed=seed)
    return next(iter(PackedBatches(examples, rows=rows, sequence_length=32, targets_per_row=None, seed=seed)))


def parameters(model: Glm, kind: Any = ...) -> dict[str, np.ndarray]:
    """Every array of the model (or of one kind of variable) by dotted path, copied to the host."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in flat}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def rows(directory: Path) -> list[dict[str, float]]:
    """``metrics.jsonl`` without the values that depend on the clock."""
    clock = ("tokens_per_second", "answer_tokens_per_second", "mfu")
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]
