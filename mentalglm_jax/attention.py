"""Rotary positions, and causal, segment-aware attention behind one function whose backend is chosen by platform.

* ``xla``: plain JAX, runs everywhere, the reference the others are compared with.
* ``cudnn``: the fused cuDNN kernel (NVIDIA GPUs, bfloat16), through ``jax.nn.dot_product_attention``.

``auto`` is ``cudnn`` on a GPU in bfloat16 and ``xla`` everywhere else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mentalglm_jax.errors import InputError

BACKENDS = ("auto", "xla", "cudnn")


def apply_rope(x: Float[Array, "B S N h"], cos: Float[Array, "B S r"], sin: Float[Array, "B S r"]) -> Array:
    """Rotates interleaved pairs ``(2i, 2i+1)`` of the first ``2r`` dimensions; the others pass through.

    GLM's pairs are neighbours, unlike Llama's half-split pairs; the two agree at position 0 only.
    """
    rotated, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(rotated.shape), rest], axis=-1)


def attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    *,
    segment_ids: Int[Array, "B S"],
    kv_segment_ids: Int[Array, "B T"],
    offset: Int[Array, ""] | None = None,
    backend: str = "auto",
) -> Float[Array, "B S H h"]:
    """Softmax attention, scale ``h ** -0.5``, in the dtype of ``q`` with a float32 softmax.

    Query ``i`` sits in slot ``offset + i`` and sees slot ``t`` when ``t <= offset + i``, both carry the same segment id
    and that id is not 0 (padding). A padding query sees every slot with equal weight; its output means nothing.

    Raises:
        InputError: unknown ``backend``.
    """
    backend = chosen_backend(backend, q.dtype)
    mask = causal_segment_mask(segment_ids, kv_segment_ids, offset)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    return _xla(q, k, v, mask)


def chosen_backend(backend: str, dtype: Any) -> str:
    """The backend that ``backend`` ("auto" or a name) means on this platform for activations of ``dtype``."""
    if backend not in BACKENDS:
        raise InputError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    return "cudnn" if jax.default_backend() == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 else "xla"


def causal_segment_mask(
    segment_ids: Int[Array, "B S"], kv_segment_ids: Int[Array, "B T"], offset: Int[Array, ""] | None
) -> Bool[Array, "B S T"]:
    """True where query ``i`` may look at slot ``t``."""
    slots = jnp.arange(segment_ids.shape[1]) + (0 if offset is None else offset)
    causal = slots[:, None] >= jnp.arange(kv_segment_ids.shape[1])[None, :]
    same = (segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)
    return causal[None] & same


def _xla(q: Array, k: Array, v: Array, mask: Array) -> Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # Query head j reads key/value head j // (H / K). The H / K query heads of a group are laid out as rows of one
    # matrix, so that both products are plain batched matrix products: a third faster on CPU than the grouped einsum.
    q = q.transpose(0, 2, 1, 3).reshape(batch, groups, heads // groups * length, width)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k, precision=precision).reshape(batch, heads, length, -1) * width**-0.5
    # A finite floor keeps rows without any visible slot (padding) free of NaN.
    scores = jnp.where(mask[:, None], scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, groups, heads // groups * length, -1)
    out = jnp.matmul(weights, v, precision=precision)
    return out.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
