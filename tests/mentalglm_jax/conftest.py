"""Tiny random transformers models, and the same weights in ours, copied by hand so that no table of ours has a say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Glm4Config, Glm4ForCausalLM, GlmForCausalLM
from transformers import GlmConfig as HfGlmConfig

from mentalglm_jax.model.glm import Glm, GlmConfig, abstract_model

GEOMETRY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": [1, 2, 3], "attention_bias": True,
    "max_position_embeddings": 4096,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-yarn": ("glm4", {"rope_parameters": YARN, "head_dim": 16, "max_position_embeddings": 256}),
    "edge": ("glm", {"partial_rotary_factor": 1.0, "attention_bias": False, "rms_norm_eps": 1e-5}),
    "tied": ("glm", {"tie_word_embeddings": True}),
    "wide-heads": ("glm", {"head_dim": 16}),
    "theta-5e6": ("glm", {"rope_theta": 5e6}),
    "theta-1e8": ("glm", {"rope_theta": 1e8, "num_key_value_heads": 4}),  # glm-4-9b-chat-1m
}


def hf_model(kind: str = "glm", std: float = 0.2, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with every weight drawn at ``std`` (0.2 makes mistakes visible that 0.02 hides)."""
    config_class, model_class = (Glm4Config, Glm4ForCausalLM) if kind == "glm4" else (HfGlmConfig, GlmForCausalLM)
    model = model_class(config_class(**{**GEOMETRY, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
    return model


def hf_variant(name: str) -> Any:
    kind, changes = VARIANTS[name]
    return hf_model(kind, **changes)


def to_jax(model: Any, **options: Any) -> Glm:
    """The same model in ours."""
    ours = abstract_model(GlmConfig.from_dict(model.config.to_dict()), **options)
    weights = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    dtype = ours.embed_tokens.embedding.dtype

    def stacked(name: str) -> Any:
        layers = [weights[f"model.layers.{layer}.{name}"] for layer in range(ours.config.num_hidden_layers)]
        return jnp.asarray(np.stack([value.T for value in layers]), dtype)

    ours.embed_tokens.embedding.set_value(jnp.asarray(weights["model.embed_tokens.weight"], dtype))
    ours.norm.weight.set_value(jnp.asarray(weights["model.norm.weight"], dtype))
    if ours.lm_head is not None:
        ours.lm_head.kernel.set_value(jnp.asarray(weights["lm_head.weight"].T, dtype))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if ours.config.sandwich_norm:
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    for name in norms:
        getattr(ours.layers, name).weight.set_value(stacked(f"{name}.weight"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(ours.layers.self_attn, name)
        linear.kernel.set_value(stacked(f"self_attn.{name}.weight"))
        if linear.bias is not None:
            linear.bias.set_value(stacked(f"self_attn.{name}.bias"))
    for name in ("gate_up_proj", "down_proj"):
        getattr(ours.layers.mlp, name).kernel.set_value(stacked(f"mlp.{name}.weight"))
    return ours


def hf_logits(model: Any, tokens: Any, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens)), **options).logits.float().numpy()


def compiled(function: Any) -> Any:
    """``jax.jit`` with a cheap code generator: half the compile time, same operations."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def jax_logits(
    model: Glm, tokens: Any, positions: Any = None, segment_ids: Any = None, jit: bool = False
) -> np.ndarray:
    """Our logits. Without ``jit`` operation by operation, whose small programs all tests share."""
    inputs = [None if value is None else jnp.asarray(value, jnp.int32) for value in (tokens, positions, segment_ids)]
    if jit:
        graph, state = nnx.split(model)
        return np.asarray(compiled(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *inputs))
    with jax.disable_jit():
        return np.asarray(model(*inputs))


def relative_error(found: Any, reference: Any) -> float:
    """max |Δ| / max |reference|; NaN counts as infinite."""
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    assert found.shape == reference.shape
    error = np.abs(found - reference).max() / np.abs(reference).max()
    return float(error) if np.isfinite(error) else float("inf")


@pytest.fixture(scope="session")
def hf() -> SimpleNamespace:
    """The helpers of this file."""
    return SimpleNamespace(
        model=hf_model, variant=hf_variant, to_jax=to_jax, logits=hf_logits, run=jax_logits, error=relative_error,
        compiled=compiled,
    )  # fmt: skip
