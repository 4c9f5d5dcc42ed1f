"""A cut model's logits, for the PyTorch side to compare on the same device in the same dtype."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mentalglm_jax.bench.target import Target
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.model.glm import Glm

LAYERS = 2
LENGTH = 256


def measure(target: Target, directory: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Writes ``model/`` (the first layers' geometry, random weights) and ``logits.npz`` (tokens [1, S], logits
    [1, S, V] float32) into ``directory``."""
    layers = min(LAYERS, target.config.num_hidden_layers)
    config = dataclasses.replace(target.config, num_hidden_layers=layers, pad_token_id=0, eos_token_id=(1,))
    model = Glm(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(target.recipe.model.dtype))
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, (1, LENGTH))
    graph, state = nnx.split(model)
    logits = np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(jnp.asarray(tokens)))(state), np.float32)
    save_pretrained(model, directory / "model")
    np.savez(directory / "logits.npz", tokens=tokens, logits=logits)
    tell({"layers": config.num_hidden_layers, "tokens": LENGTH, "largest_logit": float(np.abs(logits).max())})
