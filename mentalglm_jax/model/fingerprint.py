"""Which model it is: one short name for configuration and weights."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from mentalglm_jax.model.glm import Glm


def model_fingerprint(model: Glm) -> str:
    """A hash of configuration and weights, adapter included: bits are summed, so that it is exact on every device."""
    sums = jax.tree.leaves_with_path(_bit_sums(nnx.split(model)[1]))
    parts = [(jax.tree_util.keystr(path), int(value)) for path, value in sums]
    return hashlib.sha256(repr((model.config, str(model.dtype), parts)).encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(state: Any) -> Any:
    def bit_sum(x: Array) -> Array:
        bits = x.view(f"uint{8 * x.dtype.itemsize}") if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bit_sum, state)
