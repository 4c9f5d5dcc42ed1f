"""Tiny random transformers models, and the same weights in ours, copied by hand so that no table of ours has a say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from mentalglm_jax.model.glm import Glm, GlmConfig, abstract_model

GEOMETRY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": [1, 2, 3], "attention_bias": True,
    "max_position_embeddings": 4096,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN_QWEN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-yarn": ("glm4", {"rope_parameters": YARN, "head_dim": 16, "max_position_embeddings": 256}),
    "edge": ("glm", {"partial_rotary_factor": 1.0, "attention_bias": False, "rms_norm_eps": 1e-5}),
    "tied": ("glm", {"tie_word_embeddings": True}),
    "wide-heads": ("glm", {"head_dim": 16}),
    "theta-5e6": ("glm", {"rope_theta": 5e6}),
    "theta-1e8": ("glm", {"rope_theta": 1e8, "num_key_value_heads": 4}),  # glm-4-9b-chat-1m
    "llama": ("llama", {}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "pad_token_id": None}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied-yarn": ("qwen2", {"rope_parameters": YARN_QWEN, "tie_word_embeddings": True, "head_dim": 16}),
    "glm4v": ("glm4v", {}),
    "glm46v": ("glm46v", {}),
}
# Per kind: the name of its classes, and what its geometry has otherwise.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "llama": ("Llama", {"attention_bias": False}),
    "mistral": ("Mistral", {"attention_bias": ..., "sliding_window": None}),
    "qwen2": ("Qwen2", {"attention_bias": ...}),
}
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 2,
                          "image_size": 8, "out_hidden_size": 32}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}


def hf_model(kind: str = "glm", std: float = 0.2, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with every weight drawn at ``std`` (0.2 makes mistakes visible that 0.02 hides)."""
    if kind in ("glm4v", "glm46v"):
        name = {"glm4v": "Glm4v", "glm46v": "Glm46V"}[kind]
        text = {key: value for key, value in GEOMETRY.items() if key not in ("attention_bias", "head_dim")}
        config = getattr(transformers, f"{name}Config")(
            text_config={**text, "rope_parameters": MROPE, **changes}, vision_config=VISION, image_token_id=90,
            video_token_id=91, image_start_token_id=92, image_end_token_id=93, video_start_token_id=94,
            video_end_token_id=95,
        )  # fmt: skip
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    else:
        name, own = KINDS[kind]
        geometry = {key: value for key, value in {**GEOMETRY, **own, **changes}.items() if value is not ...}
        config = getattr(transformers, f"{name}Config")(**geometry)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
    return model


def hf_variant(name: str) -> Any:
    kind, changes = VARIANTS[name]
    return hf_model(kind, **changes)


def neighbours(rows: np.ndarray, head: int) -> np.ndarray:
    """Rotary pairs side by side, where a file has dimension i with i + head / 2: written out row by row."""
    found = np.empty_like(rows)
    for start in range(0, len(rows), head):
        for pair in range(head // 2):
            found[start + 2 * pair] = rows[start + pair]
            found[start + 2 * pair + 1] = rows[start + pair + head // 2]
    return found


def to_jax(model: Any, **options: Any) -> Glm:
    """The same model in ours."""
    ours = abstract_model(GlmConfig.from_dict(model.config.to_dict()), **options)
    weights = {
        name.replace("language_model.", ""): value.detach().float().numpy()
        for name, value in model.state_dict().items()
    }
    halved = model.config.model_type in ("llama", "mistral", "qwen2")
    dtype = ours.embed_tokens.embedding.dtype

    def of_layer(layer: int, name: str) -> np.ndarray:
        start = f"model.layers.{layer}."
        if halved and "gate_up_proj" in name:
            return np.concatenate([weights[start + name.replace("gate_up", part)] for part in ("gate", "up")])
        value = weights[start + name]
        return neighbours(value, ours.config.head_dim) if halved and ("q_proj" in name or "k_proj" in name) else value

    def stacked(name: str) -> Any:
        layers = [of_layer(layer, name) for layer in range(ours.config.num_hidden_layers)]
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
        compiled=compiled, neighbours=neighbours,
    )  # fmt: skip
