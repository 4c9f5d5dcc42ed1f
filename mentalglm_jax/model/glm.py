"""GLM-4 in Flax: configuration, modules, forward pass. One model, one file.

``Glm`` covers glm-4-9b, -chat, -chat-1m and GLM-Edge; with ``sandwich_norm`` it is ``Glm4`` (the 0414 and Z1 releases).
The formulas follow ``transformers.models.glm`` to the order of every cast, so that logits agree with it.

Modules only hold parameters and forward code. All layers live stacked on a leading axis and run in one
``jax.lax.scan``, so that neither tracing time nor program size grows with depth. Transformations (jit, grad, sharding)
are plain JAX over ``nnx.split(model)``.

Array axes, by letter:  B batch   S sequence   T cache slots   L layers   D hidden   H query heads   K key/value heads
                        h head_dim   F feed-forward   V vocabulary
Logical axes of parameters (``PARAMETER_AXES``), mapped to mesh axes in ``sharding.py``:
                        vocab, embed, layers, heads, kv_heads, mlp, rank, norm
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import short
from mentalglm_jax.model.attention import apply_rope, attention, restarting_positions
from mentalglm_jax.model.layout import spread_hidden
from mentalglm_jax.model.published import MAX_TOKEN_ID, MOST, MOST_WIDTH, SIZES, published_fields
from mentalglm_jax.model.relatives import FAMILIES, RELATIVES, relative_config
from mentalglm_jax.model.rope import RopeScaling, rope_frequencies, written
from mentalglm_jax.model.spellings import check_agreement, llama_cpp_names

Rope = tuple[Array, Array]  # cosines and sines, see rope_tables
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.embedding": ("vocab", "embed"),
    "layers.input_layernorm.weight": ("layers", "norm"),
    "layers.post_attention_layernorm.weight": ("layers", "norm"),
    "layers.post_self_attn_layernorm.weight": ("layers", "norm"),
    "layers.post_mlp_layernorm.weight": ("layers", "norm"),
    "layers.self_attn.q_proj.kernel": ("layers", "embed", "heads"),
    "layers.self_attn.k_proj.kernel": ("layers", "embed", "kv_heads"),
    "layers.self_attn.v_proj.kernel": ("layers", "embed", "kv_heads"),
    "layers.self_attn.o_proj.kernel": ("layers", "heads", "embed"),
    "layers.self_attn.q_proj.bias": ("layers", "heads"),
    "layers.self_attn.k_proj.bias": ("layers", "kv_heads"),
    "layers.self_attn.v_proj.bias": ("layers", "kv_heads"),
    "layers.mlp.gate_up_proj.kernel": ("layers", "embed", "mlp"),
    "layers.mlp.down_proj.kernel": ("layers", "mlp", "embed"),
    "norm.weight": ("norm",),
    "lm_head.kernel": ("embed", "vocab"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmConfig:
    """Geometry and constants of a GLM-4 model or of a relative; the defaults are glm-4-9b-chat's published native
    configuration. ``family`` (one of ``relatives.FAMILIES``) says in whose names and row order its files are; it
    changes nothing in what is computed."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-07
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    sandwich_norm: bool = False
    initializer_range: float = 0.02
    eos_token_id: tuple[int, ...] = (151329, 151336, 151338)
    pad_token_id: int | None = 151329
    bos_token_id: int | None = None
    family: str = "glm"

    def __post_init__(self) -> None:
        counts = (*SIZES, "head_dim", "max_position_embeddings")
        numbers = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range")
        flags = ("attention_bias", "tie_word_embeddings", "sandwich_norm")
        for what, names, good in (
            ("a positive integer", counts, lambda v: type(v) is int and v > 0),
            ("a positive number", numbers, lambda v: type(v) in (int, float) and 1e-30 < v < 1e30),
            ("true or false", flags, lambda v: type(v) is bool),
            ("token ids", ("eos_token_id",), lambda v: all(_is_token(i) for i in v)),
            ("a token id", ("pad_token_id", "bos_token_id"), lambda v: v is None or _is_token(v)),
            (f"one of {', '.join(FAMILIES)}", ("family",), lambda v: v in FAMILIES),
        ):
            for name in names:
                if not good(value := getattr(self, name)):
                    raise InputError(f"model config: {name} must be {what}, got {short(value)}")
        for name in counts:
            if (value := getattr(self, name)) > (most := MOST.get(name, MOST_WIDTH)):
                raise InputError(f"model config: {name} must be at most {most}, got {short(value)}")
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if heads % kv:
            raise InputError(f"model config: {heads} attention heads are not a multiple of {kv} key/value heads")
        if self.rope_theta <= 1:
            raise InputError(f"model config: rope_theta must be above 1, got {self.rope_theta!r}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise InputError(
                f"model config: head_dim * partial_rotary_factor is {self.rotary_dim}, not even and up to head_dim"
            )

    @property
    def rotary_dim(self) -> int:
        """How many of the ``head_dim`` dimensions are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def model_type(self) -> str:
        """The Hugging Face ``model_type`` of the family's own form."""
        return "glm4" if self.family == "glm" and self.sandwich_norm else self.family

    @property
    def filler_id(self) -> int:
        """The token that stands where none is meant: padding, or what ends an answer in a model without padding."""
        return next((one for one in (self.pad_token_id, *self.eos_token_id) if one is not None), 0)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, rope_theta: float | None = None) -> "GlmConfig":
        """Reads any published ``config.json``: native glm / glm4 (old and new spellings), chatglm remote code, and the
        relatives of ``relatives.py``. Of glm and chatglm, keys tell which, as re-saved checkpoints mix model types.
        ``rope_theta`` overrides what the file says.

        Raises:
            InputError: a needed key is missing, two contradict each other, or this model does not have what is asked.
        """
        fields = published_fields(raw)
        check_agreement(raw, fields, None if rope_theta is None else "rope_theta")
        if rope_theta is not None:
            fields["rope_theta"] = float(rope_theta)
        return cls(**fields)

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The ``config.json`` of the family's own form, as transformers 5 writes it; for Glm also what llama.cpp's
        converter reads. Of a vision-language model it is the text decoder's, in Glm4's form."""
        if self.family in RELATIVES:
            return relative_config(self.family, vars(self), dtype)
        rope = {
            **written(self.rope_scaling),
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        same = (*SIZES, "head_dim", "max_position_embeddings", "rms_norm_eps", "attention_bias", "tie_word_embeddings",
                "initializer_range", "pad_token_id")  # fmt: skip
        return {
            "architectures": ["Glm4ForCausalLM" if self.sandwich_norm else "GlmForCausalLM"],
            "model_type": "glm4" if self.sandwich_norm else "glm",
            **{name: getattr(self, name) for name in same},
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "eos_token_id": list(self.eos_token_id),
            "rope_parameters": rope,
            **({} if self.rope_scaling is None else {"rope_scaling": rope}),  # transformers 4's name
            "partial_rotary_factor": self.partial_rotary_factor,
            "rope_theta": self.rope_theta,
            **({} if self.bos_token_id is None else {"bos_token_id": self.bos_token_id}),
            **({} if self.sandwich_norm else llama_cpp_names(vars(self))),
            "dtype": dtype,
            "use_cache": True,
        }


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


class Linear(nnx.Module):
    """``y = x W + b`` with ``kernel [in, out]``, or ``[L, in, out]`` when it is one of L stacked layers.

    ``adapter`` is None or a module of ``lora.py`` that changes ``y``; ``kernel`` may be one of ``quantize.py``.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, stack: tuple[int, ...], std: float, dtype: Any, rngs: nnx.Rngs
    ):
        self.kernel: Any = nnx.Param(std * jax.random.normal(rngs.params(), (*stack, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, outputs), dtype)) if bias else None
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... in"], key: Array | None = None) -> Float[Array, "... out"]:
        y = matmul(x, self.kernel[...]) if isinstance(self.kernel, nnx.Variable) else self.kernel(x)
        if self.adapter is not None:
            y = self.adapter(x, y, self.kernel[...], key)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def matmul(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """``x @ kernel`` in the dtype of ``x``; in float32 without the reduced-precision passes of TPUs and GPUs."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision)


class RMSNorm(nnx.Module):
    """Root-mean-square norm; statistics in float32, the product with the weight in the input's dtype (as in HF)."""

    def __init__(self, size: int, *, eps: float, stack: tuple[int, ...], dtype: Any):
        self.weight = nnx.Param(jnp.ones((*stack, size), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * normed.astype(x.dtype)


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; slot ``t`` holds the ``t``-th token of each row, padding included."""

    k: Float[Array, "L B T K h"]
    v: Float[Array, "L B T K h"]
    segment_ids: Int[Array, "B T"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: GlmConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        """A cache with room for ``slots`` tokens per row."""
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))


def rope_tables(config: GlmConfig, positions: Int[Array, "B S"], dtype: Any) -> tuple[Array, Array]:
    """Cosines and sines ``[B, S, rotary_dim / 2]``: angles in float32, the tables cast to ``dtype`` as HF does."""
    frequencies, scale = rope_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with partial interleaved RoPE."""

    def __init__(self, config: GlmConfig, *, stack: tuple[int, ...], dtype: Any, rngs: nnx.Rngs):
        size, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        common: dict[str, Any] = {"stack": stack, "std": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(size, heads * config.head_dim, bias=config.attention_bias, **common)
        self.k_proj = Linear(size, kv * config.head_dim, bias=config.attention_bias, **common)
        self.v_proj = Linear(size, kv * config.head_dim, bias=config.attention_bias, **common)
        self.o_proj = Linear(heads * config.head_dim, size, bias=False, **common)
        self.head_dim = config.head_dim

    def __call__(self, x: Float[Array, "B S D"], rope: Rope, segment_ids: Int[Array, "B S"], cache: KVCache | None,
                 layer: Array | int, key: Array | None, backend: str) -> tuple[Array, KVCache | None]:  # fmt: skip
        batch, length, _ = x.shape
        q, k, v = (
            projection(x, key).reshape(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        kv_segment_ids, offset = segment_ids, None
        if cache is not None:
            start = (layer, 0, cache.length, 0, 0)
            cache = cache._replace(
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start),
            )
            k, v = cache.k[layer], cache.v[layer]
            kv_segment_ids, offset = cache.segment_ids, cache.length
        out = attention(q, k, v, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, offset=offset, backend=backend)
        return self.o_proj(out.reshape(batch, length, -1), key), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward; the fused projection holds the gate first, then the up half."""

    def __init__(self, config: GlmConfig, *, stack: tuple[int, ...], dtype: Any, rngs: nnx.Rngs):
        common: dict[str, Any] = {"stack": stack, "std": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False, **common)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, **common)

    def __call__(self, x: Float[Array, "B S D"], key: Array | None) -> Float[Array, "B S D"]:
        gate, up = jnp.split(self.gate_up_proj(x, key), 2, axis=-1)
        return self.down_proj(up * jax.nn.silu(gate), key)


class Layer(nnx.Module):
    """One decoder layer, or all of them stacked: ``stack=(L,)`` gives every parameter a leading layer axis."""

    def __init__(self, config: GlmConfig, *, stack: tuple[int, ...], dtype: Any, rngs: nnx.Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, stack=stack, dtype=dtype)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, stack=stack, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, stack=stack, dtype=dtype, rngs=rngs)
        self.post_self_attn_layernorm = norm() if config.sandwich_norm else None
        self.post_mlp_layernorm = norm() if config.sandwich_norm else None

    def __call__(self, h: Float[Array, "B S D"], rope: Rope, segment_ids: Int[Array, "B S"], cache: KVCache | None,
                 layer: Array | int, key: Array | None, backend: str) -> tuple[Array, KVCache | None]:  # fmt: skip
        out, cache = self.self_attn(self.input_layernorm(h), rope, segment_ids, cache, layer, key, backend)
        h = h + (out if self.post_self_attn_layernorm is None else self.post_self_attn_layernorm(out))
        out = self.mlp(self.post_attention_layernorm(h), key)
        h = h + (out if self.post_mlp_layernorm is None else self.post_mlp_layernorm(out))
        return h, cache


class Embed(nnx.Module):
    """The token embedding table ``[V, D]``."""

    def __init__(self, config: GlmConfig, *, dtype: Any, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, dtype))
        self.adapter: Any = nnx.data(None)  # a trained copy of the table, see lora.py

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return (self.embedding if self.adapter is None else self.adapter.weight)[...][tokens]


class Glm(nnx.Module):
    """A GLM-4 causal language model.

    Args:
        config: geometry and constants.
        rngs: source of the random initial weights.
        param_dtype: dtype the parameters are stored in.
        dtype: dtype activations are computed in; None means ``param_dtype``.
        remat: what the backward pass keeps: "none" (everything), "dots" (matrix products), "full" (layer inputs only).
        backend: attention backend, see ``attention.attention``.
    """

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None,
                 remat: str = "none", backend: str = "auto"):  # fmt: skip
        if remat not in REMAT_POLICIES:
            raise InputError(f"remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        self.config = config
        self.dtype = jnp.dtype(dtype or param_dtype)
        if self.dtype == jnp.float16:
            raise InputError("dtype float16 overflows in GLM-4 (NaN loss, endless '!!!!'); use bfloat16 or float32")
        self.remat, self.backend = remat, backend
        self.lora_config: Any = None  # set by lora.add_lora; what the adapter directory will say
        self.source: Any = None  # set by directories.load; what the adapter directory will name as its base
        self.embed_tokens = Embed(config, dtype=param_dtype, rngs=rngs)
        self.layers = Layer(config, stack=(config.num_hidden_layers,), dtype=param_dtype, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, stack=(), dtype=param_dtype)
        self.lm_head = None if config.tie_word_embeddings else Linear(
            config.hidden_size, config.vocab_size, bias=False, stack=(), std=config.initializer_range,
            dtype=param_dtype, rngs=rngs
        )  # fmt: skip

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits in float32. ``segment_ids``: 0 is padding, tokens see only earlier tokens of their own segment;
        without ``positions`` every segment counts from 0."""
        hidden, _ = self.hidden_states(tokens, positions, segment_ids)
        return self.unembed(hidden)

    def hidden_states(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Final hidden states (normed) and the updated cache. ``key`` turns adapter dropout on."""
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        positions = restarting_positions(segment_ids) if positions is None else positions
        if cache is not None:
            ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
            cache = cache._replace(segment_ids=ids)
        h = self.embed_tokens(tokens).astype(self.dtype)
        if (pad := self.config.pad_token_id) is not None:
            # As in transformers (padding_idx): the padding token's embedding is used, but training never moves it.
            h = jnp.where((tokens == pad)[..., None], jax.lax.stop_gradient(h), h)
        h = spread_hidden(h)
        rope = rope_tables(self.config, positions, self.dtype)
        graph, parameters = nnx.split(self.layers)

        def body(carry: tuple[Array, KVCache | None], inputs: tuple[Array, Any]) -> tuple[Any, None]:
            h, cache = carry
            layer, parameters = inputs
            layer_key = None if key is None else jax.random.fold_in(key, layer)
            module = nnx.merge(graph, parameters)
            h, cache = module(h, rope, segment_ids, cache, layer, layer_key, self.backend)
            return (spread_hidden(h), cache), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        if isinstance(self.layers, nnx.List):  # decode.py laid them apart, and says why
            for layer, module in enumerate(self.layers):
                h, cache = module(h, rope, segment_ids, cache, layer, None, self.backend)
        else:
            numbers = jnp.arange(self.config.num_hidden_layers)
            (h, cache), _ = jax.lax.scan(body, (h, cache), (numbers, parameters))
        if cache is not None:
            cache = cache._replace(length=cache.length + tokens.shape[1])
        return self.norm(h), cache

    def unembed(self, hidden: Float[Array, "... D"], key: Array | None = None) -> Float[Array, "... V"]:
        """Vocabulary logits of normed hidden states, in float32. ``key`` turns adapter dropout on."""
        if self.lm_head is None:
            return matmul(hidden, self.embed_tokens.embedding[...].T).astype(jnp.float32)
        return self.lm_head(hidden, key).astype(jnp.float32)


REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def abstract_model(config: GlmConfig, **options: Any) -> Glm:
    """A ``Glm`` whose parameters are shapes and dtypes only: what loading fills and planning compiles."""
    return nnx.eval_shape(lambda: Glm(config, rngs=nnx.Rngs(0), **options))
