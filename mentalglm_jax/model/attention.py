"""Rotary positions, and causal, segment-aware attention behind one function whose backend is chosen by platform.

* ``xla``: plain JAX, runs everywhere, the reference the others are compared with.
* ``cudnn``: the fused cuDNN kernel (NVIDIA GPUs, bfloat16), through ``jax.nn.dot_product_attention``.
* ``splash``: the block-sparse flash kernel of JAX (TPUs), which skips the blocks above the diagonal and holds no
  ``[S, S]`` array. It has no form for a cache: with ``offset``, ``xla`` does the work.

``auto`` is, in bfloat16, ``cudnn`` on a GPU and ``splash`` on a TPU, and ``xla`` everywhere else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.layout import BATCH_AXES, mesh_in_force

BACKENDS = ("auto", "xla", "cudnn", "splash")
_PLATFORM_BACKENDS = {"gpu": "cudnn", "tpu": "splash"}
_LANES = 128  # a TPU vector register's width: what splash's blocks are multiples of
_BLOCK = 512  # the largest block: a quarter of a 2,048-token row
_QUERIES = 192  # of a long row at a time in XLA; on a CPU 64 and 128 are slower, 256 is about equal (benchmarks/LOG.md)


def restarting_positions(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions that start at 0 at every change of ``segment_ids`` along a row."""
    index = jnp.arange(segment_ids.shape[1])[None]
    changes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
    return (index - starts).astype(jnp.int32)


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
    and that id is not 0 (padding). A padding query sees slots with equal weight; its output means nothing.

    Raises:
        InputError: unknown ``backend``.
    """
    backend = chosen_backend(backend, q.dtype)
    if backend == "splash" and offset is None:
        return _splash(q, k, v, segment_ids)
    mask = causal_segment_mask(segment_ids, kv_segment_ids, offset)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    length = q.shape[1]
    if offset is not None or length <= 2 * _QUERIES:
        return _xla(q, k, v, mask)
    # Some queries at a time, and of the keys none that come after them all: nearly half of the scores are never made.
    size = max(_QUERIES, -(-length // 16))
    cuts = [(start, min(start + size, length)) for start in range(0, length, size)]
    parts = [_xla(q[:, a:b], k[:, :b], v[:, :b], mask[:, a:b, :b]) for a, b in cuts]
    return jnp.concatenate(parts, axis=1)


def chosen_backend(backend: str, dtype: Any) -> str:
    """The backend that ``backend`` ("auto" or a name) means on this platform for activations of ``dtype``."""
    if backend not in BACKENDS:
        raise InputError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    return _PLATFORM_BACKENDS.get(jax.default_backend(), "xla") if jnp.dtype(dtype) == jnp.bfloat16 else "xla"


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


def _splash(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    mesh = mesh_in_force()
    if mesh is None:
        return _splash_rows(q, k, v, segment_ids, 0, 1)
    # The partitioner cannot see inside the kernel: each device gets its rows and its heads. Keys and values are cut
    # along with the query heads where their number allows it; where not, each device picks those its heads read.
    parts = mesh.shape["tensor"]
    heads, groups = q.shape[2], k.shape[2]
    if heads % parts or (groups % parts and parts % groups):
        raise InputError(
            f"mesh tensor = {parts} does not divide {heads} attention heads over {groups} key/value heads evenly"
        )
    whole = groups % parts != 0
    queries = PartitionSpec(BATCH_AXES, None, "tensor", None)
    keys = PartitionSpec(BATCH_AXES) if whole else queries

    def local(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        part = jax.lax.axis_index("tensor") if whole else 0
        return _splash_rows(q, k, v, segment_ids, part, parts if whole else 1)

    # Replication is not tracked through a kernel call (check_vma): the specs say it all.
    return jax.shard_map(local, mesh=mesh, in_specs=(queries, keys, keys, PartitionSpec(BATCH_AXES)),
                         out_specs=queries, check_vma=False)(q, k, v, segment_ids)  # fmt: skip


def _splash_rows(q: Array, k: Array, v: Array, segment_ids: Array, part: Array | int, parts: int) -> Array:
    """Splash over whole rows on one device, which holds part ``part`` of ``parts`` of the query heads and all of
    ``k`` and ``v``."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # slow to import
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    length, groups = q.shape[1], k.shape[2]
    if parts > 1:
        k, v = (jax.lax.dynamic_slice_in_dim(x, part * groups // parts, 1, axis=2) for x in (k, v))
    # Padding is a segment of its own (id 0): its queries see padding, real ones never do.
    padding = -length % _LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    size = length + padding
    block = max(b for b in range(_LANES, _BLOCK + 1, _LANES) if size % b == 0)
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((size, size))] * q.shape[1])
    kernel = splash.make_splash_mha(causal, head_shards=1, q_seq_shards=1, block_sizes=blocks)
    out: Any = jax.vmap(kernel)(q * q.shape[-1] ** -0.5, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return out.swapaxes(1, 2)[:, :length]
