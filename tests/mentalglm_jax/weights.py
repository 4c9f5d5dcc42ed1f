"""Checkpoint files the tests write and compare."""

import json
from pathlib import Path

import numpy as np
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

TOKENS = np.random.default_rng(0).integers(4, 96, (2, 19)).astype(np.int32)


def same_tree(one, other):
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf[...], theirs[path][...], err_msg=str(path))


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def edit_json(path: Path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


# ---- other layouts ----

CHATGLM_CONFIG = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False, "ffn_hidden_size": 48, "hidden_size": 32, "kv_channels": 8,
    "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 4, "num_layers": 3, "rope_ratio": 500, "original_rope": True, "padded_vocab_size": 96,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 131072, "tie_word_embeddings": False,
    "eos_token_id": [1, 2, 3], "pad_token_id": 0, "torch_dtype": "float32",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}  # fmt: skip


def write_chatglm(model, directory: Path):
    """The remote-code form of a native model, written by hand."""
    weights = model.state_dict()
    tensors = {
        "transformer.embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": weights["model.norm.weight"],
        "transformer.output_layer.weight": weights["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    for i in range(3):
        new, old = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        for ending in ("weight", "bias"):
            tensors[f"{new}.self_attention.query_key_value.{ending}"] = torch.cat(
                [weights[f"{old}.self_attn.{x}_proj.{ending}"] for x in "qkv"]
            )
        tensors[f"{new}.self_attention.dense.weight"] = weights[f"{old}.self_attn.o_proj.weight"]
        tensors[f"{new}.mlp.dense_h_to_4h.weight"] = weights[f"{old}.mlp.gate_up_proj.weight"]
        tensors[f"{new}.mlp.dense_4h_to_h.weight"] = weights[f"{old}.mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{new}.{norm}.weight"] = weights[f"{old}.{norm}.weight"]
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CHATGLM_CONFIG))
