"""Tiny random models of many architectures: what is scored is what the model answers, or the model is refused by name.

Each is compared with a plain call of transformers on token ids (no mask, no packing, no embeddings), in fp32 and bf16.
"""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.saliency.attribute import Settings, attribute
from tests.probes.tiny import make_row

_BASE: dict[str, Any] = {
    "vocab_size": 380,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE: dict[str, Any] = {**_BASE, "intermediate_size": 64, "num_key_value_heads": 2}
_HEAD: dict[str, Any] = {**_WIDE, "head_dim": 8}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA: dict[str, Any] = {"vocab_size": 380, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("Glm", _HEAD),
    "glm4": ("Glm4", _HEAD),
    "llama": ("Llama", _WIDE),
    "qwen2": ("Qwen2", _WIDE),
    "qwen3": ("Qwen3", _HEAD),
    "qwen3_moe": ("Qwen3Moe", {**_HEAD, **_MOE, "num_experts": 4}),
    "mixtral": ("Mixtral", {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral window": ("Mistral", {**_WIDE, "sliding_window": 16}),
    "gemma2 window": ("Gemma2", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3 window": ("Gemma3Text", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", _WIDE),
    "olmo2": ("Olmo2", _WIDE),
    "granite": ("Granite", _WIDE),
    "gpt2": ("GPT2", {"vocab_size": 380, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, **_ENDS}),
    "gpt_neox": ("GPTNeoX", {**_BASE, "intermediate_size": 64}),
    "opt": ("OPT", {**_BASE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": (
        "Bloom", {"vocab_size": 380, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, **_ENDS}
    ),
    "falcon alibi": ("Falcon", {**_BASE, "alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "mpt": ("Mpt", {"vocab_size": 380, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2, **_ENDS}),
    "mamba": ("Mamba", {**_MAMBA, **_ENDS}),
    "mamba2": ("Mamba2", {**_MAMBA, **_ENDS, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    "rwkv": ("Rwkv", {"vocab_size": 380, "hidden_size": 32, "num_hidden_layers": 2, **_ENDS}),
    "recurrent_gemma": (
        "RecurrentGemma", {**_HEAD, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}
    ),
    "gemma3n": (
        "Gemma3nText",
        {**_HEAD, "vocab_size_per_layer_input": 380, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "laurel_rank": 4, "altup_num_inputs": 2, "num_hidden_layers": 2, "activation_sparsity_pattern": [0.0, 0.0],
         "layer_types": ["full_attention", "full_attention"], "intermediate_size": [64, 64]},
    ),
    "gemma4": (
        "Gemma4Text",
        {**_HEAD, "vocab_size_per_layer_input": 380, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "layer_types": ["full_attention", "full_attention"], "global_head_dim": 8},
    ),
    "jamba": ("Jamba", {**_WIDE, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
                        "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "falcon_h1": ("FalconH1", {**_HEAD, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                               "mamba_n_groups": 1, "mamba_chunk_size": 16}),
    "lfm2": ("Lfm2", {**_WIDE, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
}  # fmt: skip
# What may not be probed: its reason, as the user reads it.
REFUSED = {
    "rwkv": "a token hidden by the attention mask still moves the log-odds",
    "recurrent_gemma": "a token hidden by the attention mask still moves the log-odds",
    "gemma3n": "it looks at the ids as well",
    "gemma4": "it cannot (be|hide)",
}

# Whose prefix is run in every pass: states instead of tokens in the cache, by name.
UNKEPT = {
    "mamba": "it gives no past_key_values",
    "mamba2": "it gives no past_key_values",
    "jamba": "its cache holds LinearAttentionLayer",
    "falcon_h1": "its cache holds LinearAttentionAndFullAttentionLayer",
    "lfm2": "its cache holds LinearAttentionLayer",
}


def make(name: str, dtype: torch.dtype, tokenizer: Any) -> Probe:
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # some start with matrices so small that nothing would matter
        for weight in model.parameters():
            if (weight.ndim >= 2 and float(weight.std()) < 0.1) or not bool(weight.any()):
                weight.normal_(std=0.2)
    return Probe(model.to(dtype).eval(), tokenizer, f"tiny {name}")


def plain(probe: Probe, ids: list[int], start: int) -> float:
    """Log p of ``ids[start:]``, by the model alone."""
    with torch.no_grad():
        logits = probe.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return float(sum(logits[at - 1, ids[at]] for at in range(start, len(ids))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_the_models_own_or_it_is_refused(name: str, dtype: torch.dtype, tokenizer: Any) -> None:
    post = "I fed the dog, it rained. I can't see a way out any more... Work starts at 9.30."
    row = make_row(tokenizer, 0, "en", post, "I can't see a way out")
    probe = make(name, dtype, tokenizer)
    example = probe.encode(row)
    if name in REFUSED:
        with pytest.raises(ProbeInputError, match=f"tiny {name}: {type(probe.model).__name__}.*{REFUSED[name]}"):
            probe.scorer.forward(example, ("label", "explanation"))
        return
    forward = probe.scorer.forward(example, ("label", "explanation"))
    tried = probe.scorer.tried
    assert tried is not None and (forward.prefix is None) == bool(tried.unkept)
    if name in UNKEPT:
        assert tried.unkept == UNKEPT[name]
    elif dtype == torch.float32:  # in half precision rounding alone may be beyond the bound
        assert tried.unkept == "" and tried.gaps["prefix kept"] <= 3e-5
    found = forward.kept(torch.ones(1, len(forward.post), dtype=torch.bool))[0]
    start, own, others, _ = probe.scorer.label_ids(example)
    head = list(example.ids[:start])
    rivals = np.logaddexp.reduce([plain(probe, [*head, *ids], start) for ids in others])
    said = example.segment("explanation")
    assert said is not None
    bound = 1e-3 if dtype == torch.float32 else 0.05
    assert float(found[0]) == pytest.approx(plain(probe, [*head, *own], start) - rivals, abs=bound)
    # the explanation has ten times the tokens of the label
    assert float(found[1]) == pytest.approx(plain(probe, list(example.ids[: said.tok[1]]), said.tok[0]), abs=10 * bound)
    erased = attribute(probe, example, ("erase",), ("label",), Settings(max_units=4))[0]
    assert np.isfinite(erased.values).all() and np.abs(erased.values).max() > 1e-4
