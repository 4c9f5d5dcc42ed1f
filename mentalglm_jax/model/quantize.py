"""A frozen base in 8 or 4 bits per weight, dequantised inside each matrix product.

    int8   one float32 scale per output channel, symmetric: w = s q, q in -127..127 (the scale follows the product)
    int4   blocks of 64 inputs with one bfloat16 scale per block and output, symmetric: w = s q, q in -7..7
    nf4    the same blocks, q one of 16 normal-distribution quantiles in -1..1 (Dettmers et al. 2023, arXiv 2305.14314)

Quantised are the kernels of the decoder layers, 94 % of glm-4-9b. Embedding, ``lm_head``, norms and biases keep their
dtype, as in QLoRA. A quantised kernel takes the place of ``Linear.kernel``; its arrays have the leading layer axis
``[L, ...]`` that the scan over layers slices, so one layer at a time is ever dequantised, in the backward pass too.

Two 4-bit codes share a byte of a uint8 array, because that is half a byte per weight on every backend, whereas
``jnp.int4`` is one on hosts and has no NumPy or safetensors form. Low nibbles are the first half of a block, high ones
the second: unpacking is a concatenation inside the block and needs no interleaving. Blocks are an axis of their own, so
that a shard boundary can only fall between blocks.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8, UInt8

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm, GlmConfig, Linear, matmul
from mentalglm_jax.model.lora import linears

METHODS = ("int8", "int4", "nf4")
BLOCK = 64
# Levels of NF4, Dettmers et al. 2023, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Frozen(nnx.Variable):
    """Part of a quantised weight; never trained."""


class Int8Kernel(nnx.Module):
    """A kernel ``[*stack, in, out]`` as ``values`` int8 of that shape and ``channel_scales`` float32
    ``[*stack, out]``."""

    method = "int8"

    def __init__(self, values: Int8[Array, "*stack in out"], channel_scales: Float[Array, "*stack out"], dtype: Any):
        self.values, self.channel_scales = Frozen(values), Frozen(channel_scales)
        self.dtype = jnp.dtype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel it stands for."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Float[Array, "*stack in out"]:
        """The dequantised kernel in ``dtype``; ``index`` is ``...``, as for a parameter."""
        return (self.values[...].astype(jnp.float32) * self.channel_scales[...][..., None, :]).astype(self.dtype)[index]

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``x @ kernel`` in the dtype of ``x``."""
        return _int8_matmul(x, self.values[...], self.channel_scales[...])


class BlockKernel(nnx.Module):
    """A kernel ``[*stack, in, out]`` in N blocks of b inputs: ``codes`` uint8 ``[*stack, N, b / 2, out]``, two codes a
    byte, and ``scales`` bfloat16 ``[*stack, N, out]``. ``method`` is "int4" or "nf4"."""

    def __init__(self, codes: UInt8[Array, "*stack N half out"], scales: Float[Array, "*stack N out"], dtype: Any,
                 method: str):  # fmt: skip
        self.codes, self.scales = Frozen(codes), Frozen(scales)
        self.dtype, self.method = jnp.dtype(dtype), method

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel it stands for."""
        *stack, blocks, half, outputs = self.codes.shape
        return (*stack, blocks * half * 2, outputs)

    def __getitem__(self, index: Any) -> Float[Array, "*stack in out"]:
        """The dequantised kernel in ``dtype``; ``index`` is ``...``, as for a parameter."""
        return _dequantise(self.method, self.codes[...], self.scales[...], self.dtype)[index]

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``x @ kernel`` in the dtype of ``x``."""
        return _block_matmul(self.method, x, self.codes[...], self.scales[...])


# Both products have a backward pass of their own. Left to JAX, the scan over layers would keep the dequantised kernel
# of every layer for it, which is the whole base in the activations' dtype; kept are the quantised arrays themselves.
@jax.custom_vjp
def _int8_matmul(x: Array, values: Array, scale: Array) -> Array:
    return matmul(x, values.astype(x.dtype)) * scale.astype(x.dtype)


def _int8_forward(x: Array, values: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _int8_matmul(x, values, scale), (values, scale)


def _int8_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    values, scale = kept
    return matmul(dy * scale.astype(dy.dtype), values.astype(dy.dtype).T), None, None


_int8_matmul.defvjp(_int8_forward, _int8_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_matmul(method: str, x: Array, codes: Array, scales: Array) -> Array:
    return matmul(x, _dequantise(method, codes, scales, x.dtype))


def _block_forward(method: str, x: Array, codes: Array, scales: Array) -> tuple[Array, tuple[Array, Array]]:
    return _block_matmul(method, x, codes, scales), (codes, scales)


def _block_backward(method: str, kept: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    return matmul(dy, _dequantise(method, *kept, dy.dtype).T), None, None


_block_matmul.defvjp(_block_forward, _block_backward)


def _dequantise(method: str, codes: Array, scales: Array, dtype: Any) -> Array:
    """The kernel ``[*stack, in, out]``: multiplied in float32, rounded once."""
    *stack, blocks, half, outputs = codes.shape
    wide = codes.astype(jnp.int32)
    levels = jnp.concatenate([_levels(method, wide & 15), _levels(method, wide >> 4)], axis=-2)
    kernel = (levels * scales.astype(jnp.float32)[..., None, :]).astype(dtype)
    return kernel.reshape(*stack, blocks * half * 2, outputs)


def _levels(method: str, codes: Array) -> Array:
    if method == "int4":
        return (codes - 8).astype(jnp.float32)
    table: list[Any] = [jnp.float32(level) for level in NF4]
    for bit in range(4):  # a tree of selections: element by element, where a table look-up would be a gather
        table = [jnp.where(codes >> bit & 1 == 1, high, low) for low, high in zip(table[::2], table[1::2], strict=True)]
    return table[0]


def encode(kernel: Float[Array, "*stack in out"], method: str) -> tuple[Array, Array]:
    """The two arrays of ``Int8Kernel`` or ``BlockKernel`` nearest to ``kernel``, scales from the largest magnitude.

    The block is 64 inputs, or for a width that 64 does not divide their greatest common divisor.

    Raises:
        InputError: an unknown method, or an odd number of inputs for a 4-bit one.
    """
    check_method(method)
    weights = kernel.astype(jnp.float32)
    if method == "int8":
        largest = jnp.max(jnp.abs(weights), axis=-2)
        scale = jnp.where(largest > 0, largest / 127, 1)
        return jnp.round(weights / scale[..., None, :]).astype(jnp.int8), scale
    *stack, inputs, outputs = kernel.shape
    block = math.gcd(inputs, BLOCK)
    if block % 2:
        raise InputError(f"quantize={method!r}: a kernel of {inputs} inputs has no even block; use int8")
    blocks = weights.reshape(*stack, inputs // block, block, outputs)
    top = 7 if method == "int4" else 1
    scales = (jnp.max(jnp.abs(blocks), axis=-2) / top).astype(jnp.bfloat16)
    scales = jnp.where(scales > 0, scales, 1)
    ratio = blocks / scales.astype(jnp.float32)[..., None, :]
    if method == "int4":
        codes = (jnp.clip(jnp.round(ratio), -7, 7) + 8).astype(jnp.uint8)
    else:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
        codes = functools.reduce(jnp.add, [(ratio > middle).astype(jnp.uint8) for middle in middles])
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-2)
    return low | high << 4, scales


def decoded(first: Array, second: Array, method: str, dtype: Any) -> Int8Kernel | BlockKernel:
    """The kernel module of what ``encode`` returned; ``dtype`` is the one it dequantises to."""
    if method == "int8":
        return Int8Kernel(first, second, dtype)
    return BlockKernel(first, second, dtype, method)


def check_method(method: str) -> None:
    """Raises InputError unless ``method`` is one of ``METHODS``."""
    if method not in METHODS:
        raise InputError(f"quantize={method!r} is not one of {', '.join(METHODS)} (or None: weights kept in dtype)")


def layer_linears(model: Glm) -> dict[str, Linear]:
    """The ``Linear``s that are quantised, by the dotted path of their kernel."""
    return {f"{path}.kernel": linear for path, linear in linears(model) if path.startswith("layers.")}


def quantization(model: Glm) -> str | None:
    """The method ``model``'s base is quantised with, or None."""
    return getattr(model.layers.self_attn.q_proj.kernel, "method", None)


def parts_of(kernel: Int8Kernel | BlockKernel) -> dict[str, Frozen]:
    """The two variables of a quantised kernel by attribute name, in the order of ``encode``."""
    names = ("values", "channel_scales") if isinstance(kernel, Int8Kernel) else ("codes", "scales")
    return {name: getattr(kernel, name) for name in names}


def quantize_model(model: Glm, method: str) -> None:
    """Quantises the base in place, kernel by kernel. ``load(quantize=...)`` does it without ever holding the whole.

    Raises:
        InputError: an unknown method, the base is quantised already, or the model carries an adapter.
    """
    check_method(method)
    if quantization(model) is not None:
        raise InputError(f"quantize_model: the base is already quantised ({quantization(model)})")
    found = layer_linears(model)
    if any(linear.adapter is not None for linear in found.values()):
        raise InputError("quantize_model: the model has an adapter; quantise the base first, then add the adapter")
    for linear in found.values():
        kernel = linear.kernel[...]
        first, second = _encode_stack(kernel, method)
        linear.kernel = decoded(first, second, method, kernel.dtype)


@functools.partial(jax.jit, static_argnames="method")
def _encode_stack(kernel: Array, method: str) -> tuple[Array, Array]:
    return jax.lax.map(lambda layer: encode(layer, method), kernel)


def abstract_quantized(config: GlmConfig, method: str | None, **options: Any) -> Glm:
    """As ``glm.abstract_model``, with a quantised base: shapes and dtypes only; for loading and for planning."""

    def build() -> Glm:
        model = Glm(config, rngs=nnx.Rngs(0), **options)
        if method is not None:
            quantize_model(model, method)
        return model

    return nnx.eval_shape(build)
