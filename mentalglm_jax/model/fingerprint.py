"""Which model it is: one short name for configuration and weights."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt32

from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import LoraParam


def model_fingerprint(model: Glm) -> str:
    """A hash of configuration and weights, adapter included: integers are summed, so that it is exact on every device
    and mesh."""
    return _named(model, nnx.split(model)[1])


def base_fingerprint(model: Glm) -> str:
    """The same of what an adapter is trained on: without the adapter, and without quantised kernels, whose last bits
    may be other ones on another device."""
    return _named(model, nnx.split(model, LoraParam, nnx.Param, ...)[2])


def _named(model: Glm, state: Any) -> str:
    sums = jax.tree.leaves_with_path(_sums(state))
    parts = [(jax.tree_util.keystr(path), int(value)) for path, value in sums]
    return hashlib.sha256(repr((model.config, str(model.dtype), parts)).encode()).hexdigest()[:16]


@jax.jit
def _sums(state: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sum(_mixed(x), dtype=jnp.uint32), state)


def _mixed(x: Array) -> UInt32[Array, "..."]:
    """The bits of every element, mixed with its place: of weights that only change places, as of two layers that are
    swapped, the plain sum is the same."""
    bits = (x.view(f"uint{8 * x.dtype.itemsize}") if jnp.issubdtype(x.dtype, jnp.floating) else x).astype(jnp.uint32)
    for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        bits = _scattered(bits ^ (place * jnp.uint32(0x9E3779B1)))
    return _scattered(bits)


def _scattered(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last steps of MurmurHash3 (Appleby 2011, https://github.com/aappleby/smhasher): invertible, and every bit of
    the input moves about half of the output."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
