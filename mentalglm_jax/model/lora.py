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
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import FLOAT32_MAX, pattern, short, some
from mentalglm_jax.model.glm import Glm, Linear, matmul

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
TARGETS = (*ALL_LINEAR, "lm_head")
SAVABLE = ("embed_tokens", "lm_head")
EMBEDDING = "model.embed_tokens"
MAX_RANK = 1 << 16
MAX_ENTRIES = 10_000  # of a list of names or a table of patterns; a model has a few hundred modules


class LoraParam(nnx.Param):
    """A trainable adapter weight, float32."""


class LoraScale(nnx.Variable):
    """The factor ``s`` of one adapter, per layer; part of the adapter, not trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What PEFT's ``LoraConfig`` says, under its names except ``rank`` (r), ``alpha`` (lora_alpha), ``dropout``
    (lora_dropout), with its meaning. Hashable.

    ``target_modules`` and ``exclude_modules``: names or ends of names (``q_proj``, ``mlp.down_proj``,
    ``layers.3.self_attn.q_proj``), or one regular expression for a whole name (``model.layers.0.self_attn.q_proj``);
    "all-linear" is every linear map of the layers. ``layers_to_transform``: the layers that ends of names are meant
    for, None is all; whole names, and ``lm_head`` is one, stand for themselves. ``rank_pattern``, ``alpha_pattern``:
    pairs of a regular expression for the end of a name, the first that matches counts, and a value. Expressions are
    matched in time linear in the name (RE2), so look-around and back references are refused.
    ``modules_to_save``: ``embed_tokens``, ``lm_head``, trained whole.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    KNOWN: ClassVar[tuple[str, ...]] = TARGETS
    SAVABLE: ClassVar[tuple[str, ...]] = SAVABLE

    def __post_init__(self) -> None:
        if self.target_modules == "all-linear":
            object.__setattr__(self, "target_modules", ALL_LINEAR)
        if not self.target_modules:
            raise InputError("LoRA: target_modules is empty, nothing would be trained")
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            if type(rank) is not int or not 1 <= rank <= MAX_RANK:
                raise InputError(f"LoRA: rank must be at least 1 and at most {MAX_RANK}, got {rank}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA: dropout must be in [0, 1), got {self.dropout}")
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            if not abs(alpha) <= FLOAT32_MAX:  # NaN is not
                raise InputError(f"LoRA: alpha must be a finite number in float32, got {alpha}")
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            if not isinstance(value := getattr(self, name), str) and len(value) > MAX_ENTRIES:
                raise InputError(f"LoRA: {name} has {len(value)} entries, more than {MAX_ENTRIES}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise InputError("LoRA: layers_to_transform goes with a list of target_modules, not with an expression")
        plain = [name for name, _ in (*self.rank_pattern, *self.alpha_pattern) if re.fullmatch(r"\w+", name)]
        listed = [name.rpartition(".")[2] for rule in (self.target_modules, self.exclude_modules)
                  if not isinstance(rule, str) for name in rule]  # fmt: skip
        if unknown := sorted({*listed, *plain} - set(self.KNOWN)):
            halves = " (gate and up are one module here, gate_up_proj)" if {"gate_proj", "up_proj"} & {*unknown} else ""
            raise InputError(f"LoRA: no module named {some(unknown)}{halves}; this model has {', '.join(TARGETS)}")
        if unknown := sorted(set(self.modules_to_save) - set(self.SAVABLE)):
            raise InputError(
                f"LoRA: modules_to_save {', '.join(unknown)}: only {', '.join(SAVABLE)} can be trained whole"
            )
        rules = [rule for rule in (self.target_modules, self.exclude_modules) if isinstance(rule, str)]
        try:
            for rule in rules:
                pattern(rule)
            for key, _ in (*self.rank_pattern, *self.alpha_pattern):
                _ending(key)
        except InputError as error:
            raise InputError(f"LoRA: {error}") from None
        # Lists of names, and tables of them, say the same in any order; one order makes equal ones equal.
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if not isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, tuple(sorted(set(value), key=_order)))
        for name in ("rank_pattern", "alpha_pattern"):
            pairs = dict(getattr(self, name)).items()
            if all(re.fullmatch(r"\w+", key) for key, _ in pairs):
                pairs = sorted(pairs, key=lambda pair: _order(pair[0]))
            object.__setattr__(self, name, tuple(pairs))
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", tuple(sorted(set(self.layers_to_transform))))

    def spec_of(self, name: str) -> "Spec | None":
        """Rank, alpha and scale of the module that transformers calls ``name``, or None when it is not targeted."""
        if selects(self.exclude_modules, name) or name.rpartition(".")[2] in self.modules_to_save:
            return None
        # As in PEFT, a whole name says its layer itself: layers_to_transform is for the ends of names.
        if not isinstance(self.target_modules, tuple) or name not in self.target_modules:
            layer = re.match(r".*?\.layers\.(\d+)\.", f".{name}")
            wanted = self.layers_to_transform
            if not selects(self.target_modules, name) or (
                wanted is not None and (layer is None or int(layer[1]) not in wanted)
            ):
                return None
        rank, alpha = _first(self.rank_pattern, name, self.rank), _first(self.alpha_pattern, name, self.alpha)
        return Spec(rank, alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank))


class Spec(NamedTuple):
    """What one module of one layer is adapted with; ``scale`` is the factor ``s``."""

    rank: int
    alpha: float
    scale: float


def _order(name: str) -> tuple[int, str]:
    last = name.rpartition(".")[2]
    known = (*TARGETS, *SAVABLE)
    return (known.index(last) if last in known else len(known), name)


def selects(rule: tuple[str, ...] | str, module: str) -> bool:
    """PEFT's matching: a string is a regular expression for the whole name, a list holds names or endings of names."""
    if isinstance(rule, str):
        return pattern(rule).fullmatch(module) is not None
    return any(module == item or module.endswith(f".{item}") for item in rule)


def _first(patterns: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    return next((value for key, value in patterns if matches(key, module)), default)


def matches(key: str, module: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` is meant for a module, as PEFT sees it."""
    return _ending(key).fullmatch(module) is not None


@lru_cache(maxsize=2 * MAX_ENTRIES)
def _ending(key: str) -> Any:
    """PEFT's ``re.match`` of this with a ``$`` behind is a match of the whole, for names have no line breaks. The key
    must be an expression by itself: ``a)|(b`` would be two, the first without that ``$``."""
    pattern(key)
    return pattern(rf"(.*\.)?({key})")


class Adapter(nnx.Module):
    """The low-rank update of one ``Linear`` (or of L stacked ones: every array has a leading layer axis).

    ``a [in, r]`` starts uniform in ±1/sqrt(in) (PEFT's kaiming_uniform(a=sqrt 5)), ``b [r, out]`` at zero, so that a
    fresh adapter changes nothing. Its float32 weights are cast to the activations' dtype for the products.

    Layers may have ranks of their own, 0 for a layer that is not adapted; r is the largest. What a layer does not use
    of A and B is zero in both, so that its gradient is zero too and it stays so. ``active`` keeps DoRA's factor at 1 in
    layers that are not adapted.
    """

    def __init__(self, kernel: Any, *, specs: "tuple[Spec | None, ...]", dropout: float, dora: bool, name: str,
                 rngs: nnx.Rngs):  # fmt: skip
        *stack, inputs, outputs = kernel.shape
        self.ranks = tuple(spec.rank if spec else 0 for spec in specs)
        rank, bound = max(self.ranks), 1 / math.sqrt(inputs)
        a = jax.random.uniform(rngs.params(), (*stack, inputs, rank), jnp.float32, -bound, bound)
        if min(self.ranks) < rank:
            a = jnp.where(np.arange(rank) < np.asarray(self.ranks)[:, None, None], a, 0)
        scales = np.asarray([spec.scale if spec else 0 for spec in specs], np.float32)
        self.a = LoraParam(a)
        self.b = LoraParam(jnp.zeros((*stack, rank, outputs), jnp.float32))
        self.scale = LoraScale(jnp.asarray(scales.reshape(stack)))
        self.magnitude = LoraParam(_norms_of(kernel)) if dora else None
        partly = dora and 0 in self.ranks
        self.active = LoraScale(jnp.asarray(np.asarray(self.ranks) > 0, jnp.float32)) if partly else None
        self.dropout = dropout
        self.salt = zlib.crc32(name.encode())

    def __call__(
        self, x: Float[Array, "... in"], y: Float[Array, "... out"], kernel: Float[Array, "in out"], key: Array | None
    ) -> Float[Array, "... out"]:
        """``y = x @ kernel`` with the update added. ``key`` turns dropout on."""
        base, gain = y, 1.0
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x, gain = jnp.where(keep, x, 0), 1 / (1 - self.dropout)
            base = y if self.magnitude is None else matmul(x, kernel)
        # Factors in float32, where they cost nothing: in bfloat16 4/3 is 0.2 % more, and 1.003 is 1. So B takes them
        # before its cast, as s (x A) B = (x A) (s B).
        update = matmul(matmul(x, self.a[...]), gain * self.scale[...] * self.b[...])
        if self.magnitude is None:
            return y + update
        norms = jax.lax.stop_gradient(column_norms(kernel.astype(jnp.float32) + self.delta()))
        factor = self._factor(norms)
        return _rescaled(y, base, gain * (factor - 1), update, factor)

    def _factor(self, norms: Float[Array, "*stack out"]) -> Float[Array, "*stack out"]:
        """DoRA's ``m / norm``."""
        assert self.magnitude is not None
        factor = self.magnitude[...] / norms
        return factor if self.active is None else jnp.where(self.active[...][..., None] > 0, factor, 1)

    def delta(self) -> Float[Array, "*stack in out"]:
        """``s A B`` in float32."""
        scale = self.scale[...][..., None, None]
        return scale * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)

    def merged(self, kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
        """The kernel with the update folded in: summed in float32, cast once."""
        weight = kernel.astype(jnp.float32) + self.delta()
        if self.magnitude is not None:
            weight = weight * self._factor(column_norms(weight))[..., None, :]
        return weight.astype(kernel.dtype)


class Replacement(nnx.Module):
    """A trained copy of a whole weight, float32: what PEFT's ``modules_to_save`` makes of embed_tokens or lm_head."""

    def __init__(self, weight: Array):
        self.weight = LoraParam(weight.astype(jnp.float32))

    def __call__(
        self, x: Float[Array, "... in"], y: Float[Array, "... out"], kernel: Float[Array, "in out"], key: Array | None
    ) -> Float[Array, "... out"]:
        """The product with the copy; the original's, ``y``, is not used."""
        return matmul(x, self.weight[...])

    def merged(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The copy in the dtype of the original."""
        return self.weight[...].astype(kernel.dtype)


@partial(jax.checkpoint, prevent_cse=False)  # so that no float32 copy of an activation is kept for the backward pass
def _rescaled(
    y: Float[Array, "*batch out"], base: Float[Array, "*batch out"], more: Float[Array, " out"],
    update: Float[Array, "*batch out"], factor: Float[Array, " out"],
) -> Float[Array, "*batch out"]:  # fmt: skip
    """DoRA's sum, in float32 and rounded once. As in PEFT ``y`` stays whole: dropout thins only what is added to it."""
    return (y + more * base + factor * update).astype(y.dtype)


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


def module_names(path: str, layers: int) -> list[str]:
    """transformers' names of one of our linears, layer by layer: ``model.layers.0.self_attn.q_proj`` ..."""
    if not path.startswith("layers."):
        return [path]
    return [f"model.layers.{layer}.{path.removeprefix('layers.')}" for layer in range(layers)]


def resolve(model: Glm, config: LoraConfig) -> dict[str, tuple[Spec | None, ...]]:
    """Path to what each of its layers is adapted with, for the linears of ``model`` that ``config`` targets.

    Raises:
        InputError: ``config`` names modules or layers this model does not have, or selects nothing or embed_tokens.
    """
    count, found = model.config.num_hidden_layers, [path for path, _ in linears(model)]
    names = {path: module_names(path, count) for path in found}
    every = [name for group in names.values() for name in group]
    if isinstance(config.target_modules, tuple):
        here = {path.rpartition(".")[2] for path in found}
        if missing := sorted({name for name in config.target_modules if name.rpartition(".")[2] not in here}):
            raise InputError(f"LoRA: this model has no module {', '.join(missing)} to adapt")
        if missing := [item for item in config.target_modules if not any(selects((item,), name) for name in every)]:
            raise InputError(
                f"LoRA: target_modules {', '.join(missing)} not found in this model ({', '.join(sorted(here))})"
            )
    elif selects(config.target_modules, EMBEDDING) and not selects(config.exclude_modules, EMBEDDING):
        raise InputError("LoRA: target_modules selects embed_tokens; only modules_to_save trains embeddings")
    if beyond := [layer for layer in config.layers_to_transform or () if not 0 <= layer < count]:
        raise InputError(
            f"LoRA: layers_to_transform has {', '.join(map(str, beyond))}, the model has layers 0..{count - 1}"
        )
    specs = {path: tuple(config.spec_of(name) for name in group) for path, group in names.items()}
    specs = {path: group for path, group in specs.items() if any(group)}
    if not specs:
        raise InputError(f"LoRA: target_modules {short(config.target_modules)} selects nothing in this model")
    if config.modules_to_save and model.config.tie_word_embeddings:
        raise InputError(
            f"LoRA: modules_to_save {', '.join(config.modules_to_save)}: this model's embeddings are tied, "
            "training a copy of one would untie them"
        )
    return specs


def add_lora(model: Glm, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Adds a fresh adapter to ``model`` in place.

    Raises:
        InputError: the model already has an adapter, or see ``resolve``.
    """
    if has_lora(model):
        raise InputError("LoRA: the model already has an adapter; merge or remove it first")
    specs = resolve(model, config)
    for path, linear in linears(model):
        if path in specs:
            linear.adapter = Adapter(linear.kernel, specs=specs[path], dropout=config.dropout, dora=config.use_dora,
                                     name=path, rngs=rngs)  # fmt: skip
    if "embed_tokens" in config.modules_to_save:
        model.embed_tokens.adapter = Replacement(model.embed_tokens.embedding[...])
    if "lm_head" in config.modules_to_save and model.lm_head is not None:
        model.lm_head.adapter = Replacement(model.lm_head.kernel[...])
    model.lora_config = config


def has_lora(model: Glm) -> bool:
    """Whether ``add_lora`` was called."""
    return any(linear.adapter is not None for _, linear in linears(model))


def remove_lora(model: Glm) -> None:
    """Drops the adapter in place; the base weights were never changed."""
    for _, linear in linears(model):
        linear.adapter = nnx.data(None)
    model.embed_tokens.adapter = nnx.data(None)
    model.lora_config = None


def refuse_quantized(model: Glm, what: str) -> None:
    """Raises InputError when the base is quantised: nothing can be folded into weights that are no longer there."""
    if (method := getattr(model.layers.self_attn.q_proj.kernel, "method", None)) is not None:
        raise InputError(
            f"{what}: the base is quantised ({method}), its own weights are not in memory; save_adapter, then load "
            "the base without quantize and with that adapter"
        )


def merge_lora(model: Glm, in_place: bool = False) -> Glm:
    """``model`` without adapter, its kernels with it folded in.

    Args:
        in_place: change ``model`` itself, which needs no more memory than a layer. Else the original keeps base and
            adapter.

    Raises:
        InputError: the base is quantised, so there is nothing to fold into.
    """
    refuse_quantized(model, "merge_lora")
    merged = model if in_place else nnx.clone(model)  # merging a split would share the Variables with the original
    for _, linear in linears(merged):
        if isinstance(linear.adapter, Adapter | Replacement):
            linear.kernel.set_value(_merged(linear.adapter, linear.kernel[...], in_place))
    if isinstance(merged.embed_tokens.adapter, Replacement):
        table = merged.embed_tokens.embedding
        table.set_value(merged.embed_tokens.adapter.merged(table[...]))
    remove_lora(merged)
    return merged


def _merged(adapter: Adapter | Replacement, kernel: Array, in_place: bool) -> Array:
    """``adapter.merged(kernel)``, which lies where ``kernel`` lay; ``in_place``: in its memory."""
    graph, arrays = nnx.split(adapter)
    where = kernel.sharding if isinstance(kernel, jax.Array) else None
    return (_fold_in_place if in_place else _fold)(graph, arrays, kernel, where)


def _fold_layers(graph: Any, arrays: Any, kernel: Array, where: Any) -> Array:
    def one(inputs: Any) -> Array:
        module: Any = nnx.merge(graph, inputs[0])
        return module.merged(inputs[1])

    merged = one((arrays, kernel)) if kernel.ndim == 2 else jax.lax.map(one, (arrays, kernel))
    return merged if where is None else jax.lax.with_sharding_constraint(merged, where)


_fold = jax.jit(_fold_layers, static_argnums=(0, 3))
_fold_in_place = jax.jit(_fold_layers, static_argnums=(0, 3), donate_argnums=2)


def parameter_count(tree: Any) -> int:
    """Number of scalars in a parameter tree or model; of a quantised kernel, the weights it stands for."""
    if not isinstance(tree, nnx.Module):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))
    kernels = [node for _, node in nnx.iter_modules(tree) if hasattr(node, "method")]
    packed = sum(leaf.size for kernel in kernels for leaf in jax.tree.leaves(nnx.state(kernel)))
    whole = sum(math.prod(kernel.shape) for kernel in kernels)  # type: ignore[attr-defined]
    return parameter_count(nnx.state(tree)) - packed + whole
