"""LoRA, rsLoRA and DoRA as trainable modules beside a frozen base.

``add_lora`` hangs an ``Adapter`` on every targeted ``Linear``; its parameters are ``LoraParam``s, so that
``nnx.split(model, LoraParam, ...)`` yields the adapter as a parameter tree of its own. Initial values, scaling and
target names are PEFT's, so that an adapter is the same object on both sides (``adapters.py`` moves it across).

    LoRA    y = x W + s (drop(x) A) B          s = alpha / rank       (Hu et al. 2021, arXiv 2106.09685)
    rsLoRA  the same with                      s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)
    DoRA    y = m / |W + s A B| * (x W + s (x A) B), norms per output (Liu et al. 2024, arXiv 2402.09353)
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mentalglm_jax.errors import InputError
from mentalglm_jax.glm import Glm, Linear, matmul

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
TARGETS = (*ALL_LINEAR, "lm_head")


class LoraParam(nnx.Param):
    """A trainable adapter weight, float32."""


class LoraScale(nnx.Variable):
    """The factor ``s`` of one adapter, per layer; part of the adapter, not trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What PEFT's ``LoraConfig`` calls r, lora_alpha, lora_dropout, target_modules, use_rslora, use_dora,
    rank_pattern and alpha_pattern (pairs of a module name, e.g. ``down_proj``, and its value). Hashable."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        patterns = [name for name, _ in (*self.rank_pattern, *self.alpha_pattern)]
        unknown = sorted({*self.target_modules, *patterns} - set(TARGETS))
        if unknown:
            raise InputError(f"LoRA: no module named {', '.join(unknown)}; GLM-4 has {', '.join(TARGETS)}")
        if not self.target_modules:
            raise InputError("LoRA: target_modules is empty, nothing would be trained")
        if min([self.rank, *dict(self.rank_pattern).values()]) < 1 or not 0 <= self.dropout < 1:
            raise InputError(f"LoRA: rank must be at least 1 and dropout in [0, 1), got {self.rank}, {self.dropout}")
        for name in ("rank_pattern", "alpha_pattern"):  # mappings: an order of their own says nothing
            pairs = sorted(dict(getattr(self, name)).items(), key=lambda pair: TARGETS.index(pair[0]))
            object.__setattr__(self, name, tuple(pairs))

    def rank_of(self, name: str) -> int:
        """The rank used for the module called ``name``."""
        return dict(self.rank_pattern).get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha used for the module called ``name``."""
        return dict(self.alpha_pattern).get(name, self.alpha)

    def scale_of(self, name: str) -> float:
        """The factor ``s`` of the module called ``name``."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


class Adapter(nnx.Module):
    """The low-rank update of one ``Linear`` (or of L stacked ones: every array has a leading layer axis).

    ``a [in, r]`` starts uniform in ±1/sqrt(in) (PEFT's kaiming_uniform(a=sqrt 5)), ``b [r, out]`` at zero, so that a
    fresh adapter changes nothing. Its float32 weights are cast to the activations' dtype for the products.
    """

    def __init__(self, kernel: Any, *, rank: int, scale: float, dropout: float, dora: bool, name: str,
                 rngs: nnx.Rngs):  # fmt: skip
        *stack, inputs, outputs = kernel.shape
        bound = 1 / math.sqrt(inputs)
        self.a = LoraParam(jax.random.uniform(rngs.params(), (*stack, inputs, rank), jnp.float32, -bound, bound))
        self.b = LoraParam(jnp.zeros((*stack, rank, outputs), jnp.float32))
        self.scale = LoraScale(jnp.full(tuple(stack), scale, jnp.float32))
        self.magnitude = LoraParam(_norms_of(kernel)) if dora else None
        self.dropout = dropout
        self.salt = zlib.crc32(name.encode())

    def __call__(
        self, x: Float[Array, "... in"], y: Float[Array, "... out"], kernel: Float[Array, "in out"], key: Array | None
    ) -> Float[Array, "... out"]:
        """``y = x @ kernel`` with the update added. ``key`` turns dropout on."""
        base = y
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
            base = y if self.magnitude is None else matmul(x, kernel)
        update = self.scale[...].astype(y.dtype) * matmul(matmul(x, self.a[...]), self.b[...])
        if self.magnitude is None:
            return y + update
        norms = jax.lax.stop_gradient(column_norms(kernel.astype(jnp.float32) + self.delta()))
        factor = (self.magnitude[...] / norms).astype(y.dtype)
        # As in PEFT: y itself stays whole, dropout thins only what DoRA adds to it.
        return y + (factor - 1) * base + factor * update

    def delta(self) -> Float[Array, "*stack in out"]:
        """``s A B`` in float32."""
        scale = self.scale[...][..., None, None]
        return scale * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)

    def merged(self, kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
        """The kernel with the update folded in: summed in float32, cast once."""
        weight = kernel.astype(jnp.float32) + self.delta()
        if self.magnitude is not None:
            weight = weight * (self.magnitude[...] / column_norms(weight))[..., None, :]
        return weight.astype(kernel.dtype)


def column_norms(kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack out"]:
    """L2 norm over the inputs, one per output."""
    return jnp.linalg.norm(kernel, axis=-2)


def _norms_of(kernel: Any) -> Float[Array, "*stack out"]:
    """``column_norms`` of a parameter or quantised kernel, layer by layer: all layers in float32 might not fit."""
    graph, arrays = nnx.split(kernel)

    def norms(arrays: Any) -> Array:
        return column_norms(nnx.merge(graph, arrays)[...].astype(jnp.float32))

    return jax.jit(norms if len(kernel.shape) == 2 else partial(jax.lax.map, norms))(arrays)


def linears(model: Glm) -> Iterator[tuple[str, Linear]]:
    """Every ``Linear`` with its path, e.g. ``layers.self_attn.q_proj``."""
    for group in ("self_attn", "mlp"):
        for name in ALL_LINEAR:
            if hasattr(module := getattr(model.layers, group), name):
                yield f"layers.{group}.{name}", getattr(module, name)
    if model.lm_head is not None:
        yield "lm_head", model.lm_head


def add_lora(model: Glm, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Adds a fresh adapter to ``model`` in place.

    Raises:
        InputError: the model already has an adapter, or tied embeddings are targeted as ``lm_head``.
    """
    if has_lora(model):
        raise InputError("LoRA: the model already has an adapter; merge or remove it first")
    found = {path.rpartition(".")[2] for path, _ in linears(model)}
    if missing := sorted(set(config.target_modules) - found):
        raise InputError(f"LoRA: this model has no module {', '.join(missing)} to adapt")
    for path, linear in linears(model):
        name = path.rpartition(".")[2]
        if name in config.target_modules:
            linear.adapter = Adapter(
                linear.kernel, rank=config.rank_of(name), scale=config.scale_of(name), dropout=config.dropout,
                dora=config.use_dora, name=path, rngs=rngs
            )  # fmt: skip
    model.lora_config = config


def has_lora(model: Glm) -> bool:
    """Whether ``add_lora`` was called."""
    return any(linear.adapter is not None for _, linear in linears(model))


def remove_lora(model: Glm) -> None:
    """Drops the adapter in place; the base weights were never changed."""
    for _, linear in linears(model):
        linear.adapter = nnx.data(None)
    model.lora_config = None


def refuse_quantized(model: Glm, what: str) -> None:
    """Raises InputError when the base is quantised: nothing can be folded into weights that are no longer there."""
    if (method := getattr(model.layers.self_attn.q_proj.kernel, "method", None)) is not None:
        raise InputError(
            f"{what}: the base is quantised ({method}), its own weights are not in memory; save_adapter, then load "
            "the base without quantize and with that adapter"
        )


def merge_lora(model: Glm) -> Glm:
    """A copy of ``model`` without adapter whose kernels have it folded in; the original keeps base and adapter.

    Raises:
        InputError: the base is quantised, so there is nothing to fold into.
    """
    refuse_quantized(model, "merge_lora")
    merged = nnx.clone(model)  # merging a split would share the Variables, and the base would change too
    for _, linear in linears(merged):
        if isinstance(linear.adapter, Adapter):
            linear.kernel.set_value(linear.adapter.merged(linear.kernel[...]))
    remove_lora(merged)
    return merged


def parameter_count(tree: Any) -> int:
    """Number of scalars in a parameter tree or model."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree))
