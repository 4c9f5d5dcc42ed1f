"""What other programs read of our directories, pinned; the programs run in tests/clients (`make test-clients`)."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from flax import nnx

from mentalglm_jax.checkpoints.adapter_formats import Source
from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.checkpoints.weights import config_for
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import GlmConfig
from mentalglm_jax.model.rope import Yarn
from tests.mentalglm_jax.adapters import TOKENS, trained

NATIVE = {
    "model_type": "glm", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
}  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "padded_vocab_size": 151552, "hidden_size": 4096, "ffn_hidden_size": 13696,
    "num_layers": 40, "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2,
    "kv_channels": 128, "seq_length": 131072, "layernorm_epsilon": 1.5625e-07, "add_qkv_bias": True,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture(scope="module")
def base(hf):
    return hf.to_jax(hf.model("glm"))


# --- config.json ---


@pytest.mark.parametrize("theta", [10000.0, 5e6, 1e8])
@pytest.mark.parametrize(
    "yarn", [None, Yarn(factor=4.0, original_max_position_embeddings=32768)], ids=["plain", "yarn"]
)
def test_a_glm_directory_says_what_llama_cpp_reads(theta, yarn):
    """conversion/chatglm.py takes rope_theta, eps and context from these three names and else from its own defaults."""
    raw = config_for(GlmConfig(rope_theta=theta, rope_scaling=yarn), "glm", "bfloat16")
    assert {name: raw[name] for name in ("rope_ratio", "layernorm_epsilon", "seq_length")} == {
        "rope_ratio": theta / 1e4, "layernorm_epsilon": 1.5625e-07, "seq_length": 131072,
    }  # fmt: skip
    glm4 = config_for(GlmConfig(rope_theta=theta, rope_scaling=yarn, sandwich_norm=True), "glm", "bfloat16")
    assert not {"rope_ratio", "layernorm_epsilon", "seq_length"} & glm4.keys()  # its converter reads the native names


def test_a_chatglm_directory_says_the_size_of_the_vocabulary_twice():
    raw = config_for(GlmConfig(rope_theta=5e6), "chatglm", "bfloat16")
    assert raw["vocab_size"] == raw["padded_vocab_size"] == 151552
    assert raw["rope_ratio"] == 500


@pytest.mark.parametrize(
    ("raw", "theta"),
    [
        (NATIVE, 1e4),
        ({**NATIVE, "rope_theta": 5e6, "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07, "seq_length": 131072}, 5e6),
        ({**NATIVE, "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}, "rope_ratio": 500.0}, 5e6),
        ({**NATIVE, "rope_theta": 5e6, "rope_scaling": YARN, "rope_ratio": 500}, 5e6),
        ({**NATIVE, "rope_theta": 12345.678, "rope_ratio": 1.2345678}, 12345.678),
        ({**NATIVE, "rope_theta": 1e4, "rope_ratio": None}, 1e4),
        ({**CHATGLM, "rope_ratio": 500}, 5e6),
        ({**CHATGLM, "rope_ratio": 500, "vocab_size": 151343, "num_hidden_layers": 40}, 5e6),  # as re-saved
        ({**CHATGLM, "model_type": "glm", "rope_ratio": 500, "rope_theta": 5e6, "rms_norm_eps": 1.5625e-07}, 5e6),
        ({**CHATGLM, "rope_ratio": 500, "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, 5e6),
    ],
)  # fmt: skip
def test_every_spelling_that_agrees_is_read(raw, theta):
    assert GlmConfig.from_dict(raw).rope_theta == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**NATIVE, "rope_theta": 1e4, "rope_ratio": 500}, "rope_theta 10000.0 and rope_ratio 500 contradict"),
        ({**NATIVE, "rope_ratio": 500}, r"rope_theta 10000.0 \(the default\) and rope_ratio 500 contradict"),
        ({**NATIVE, "rope_parameters": {"rope_theta": 5e6, **YARN}, "rope_ratio": 1}, "rope_ratio 1 contradict"),
        ({**NATIVE, "rope_theta": 1e4, "rope_ratio": "500"}, "rope_ratio '500' contradict"),
        ({**NATIVE, "layernorm_epsilon": 1e-5}, "rms_norm_eps 1.5625e-07 and layernorm_epsilon 1e-05 contradict"),
        ({**NATIVE, "seq_length": 8192}, "max_position_embeddings 131072 and seq_length 8192 contradict"),
        ({**NATIVE, "multi_query_group_num": 4}, "num_key_value_heads 2 and multi_query_group_num 4 contradict"),
        ({**NATIVE, "add_qkv_bias": False}, r"attention_bias True \(the default\) and add_qkv_bias False contradict"),
        ({**CHATGLM, "rope_ratio": 500, "rope_theta": 1e4}, "rope_ratio 500.0 and rope_theta 10000.0 contradict"),
        ({**CHATGLM, "rope_theta": 5e6}, r"rope_ratio 1.0 \(the default\) and rope_theta 5000000.0 contradict"),
        ({**CHATGLM, "rope_scaling": {"rope_theta": 5e6, "type": "default"}}, "rope_theta 5000000.0 contradict"),
        ({**CHATGLM, "rms_norm_eps": 1e-5}, "layernorm_epsilon 1.5625e-07 and rms_norm_eps 1e-05 contradict"),
        ({**CHATGLM, "num_hidden_layers": 28}, "num_layers 40 and num_hidden_layers 28 contradict"),
        ({**CHATGLM, "intermediate_size": 4096}, "ffn_hidden_size 13696 and intermediate_size 4096 contradict"),
    ],
)  # fmt: skip
def test_spellings_that_contradict_each_other_are_refused(raw, message):
    """Rather than one of them taken: transformers and llama.cpp would take different ones."""
    with pytest.raises(InputError, match=message) as refused:
        GlmConfig.from_dict(raw)
    assert "\n" not in str(refused.value)
    assert ("pass the right rope_theta" in str(refused.value)) == ("rope" in message)


def test_who_says_rope_theta_need_not_mend_the_file():
    raw = {**NATIVE, "rope_theta": 1e4, "rope_ratio": 500}
    assert GlmConfig.from_dict(raw, rope_theta=5e6).rope_theta == 5e6
    with pytest.raises(InputError, match="layernorm_epsilon"):
        GlmConfig.from_dict({**raw, "layernorm_epsilon": 1e-5}, rope_theta=5e6)


# --- what the adapter names as its base ---


def named(directory: Path) -> str | None:
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_names_where_its_base_was_read(hf, base, tmp_path, monkeypatch):
    """Absolute, so that PEFT opens the adapter from any working directory; nobody's path is in its README."""
    monkeypatch.chdir(tmp_path)
    save_pretrained(base, "base")
    model = load("base")
    assert model.source == Source(str((tmp_path / "base").resolve()), "glm")
    save_adapter(trained(base), "first")
    assert named(Path("first")) is None  # a model that was read nowhere
    load_adapter(model, "first")
    save_adapter(nnx.clone(model), "adapter")
    assert named(Path("adapter")) == str((tmp_path / "base").resolve())
    assert str(tmp_path) not in Path("adapter/README.md").read_text()
    save_adapter(model, "relative", base_model_name_or_path="base")
    assert named(Path("relative")) == str((tmp_path / "base").resolve())
    save_adapter(model, "hub", base_model_name_or_path="zai-org/glm-4-9b-chat-hf")
    assert named(Path("hub")) == "zai-org/glm-4-9b-chat-hf"
    assert "base_model: zai-org/glm-4-9b-chat-hf" in Path("hub/README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert hf.error(hf.logits(theirs, TOKENS), hf.run(model, TOKENS)) <= 1e-5


# --- vLLM ---


@pytest.mark.parametrize(
    ("kind", "layout", "format"), [("glm", "glm", "peft"), ("glm4", "glm", "vllm-split"), ("glm", "chatglm", "chatglm")]
)
def test_vllm_gets_the_names_it_has_for_the_base(hf, tmp_path, kind, layout, format):
    save_pretrained(hf.to_jax(hf.model(kind)), tmp_path / "base", layout=layout)
    model = trained(load(tmp_path / "base"))
    for name in ("vllm", format):
        save_adapter(model, tmp_path / name, format=name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "vllm" / file).read_bytes() == (tmp_path / format / file).read_bytes()
    again = load(tmp_path / "base", adapter=tmp_path / "vllm")
    assert hf.error(hf.run(again, TOKENS), hf.run(model, TOKENS)) <= 1e-5


def test_peft_refuses_the_names_of_vllm_instead_of_dropping_them(hf, base, tmp_path):
    """It passes over listed modules that the model does not have; vLLM does not look at task_type."""
    save_adapter(trained(base), tmp_path / "split", format="vllm-split")
    with pytest.raises(ValueError, match="VLLM_ONLY"):
        peft.PeftModel.from_pretrained(hf.model("glm"), tmp_path / "split")
    attention = trained(base, target_modules=("q_proj", "o_proj"))
    save_adapter(attention, tmp_path / "attention", format="vllm-split")  # the same names for both
    theirs = peft.PeftModel.from_pretrained(hf.model("glm"), tmp_path / "attention")
    assert hf.error(hf.logits(theirs, TOKENS), hf.run(attention, TOKENS)) <= 1e-5


def test_a_fused_rank_that_vllm_has_no_room_for_is_refused(hf, tmp_path):
    """q, k and v of rank 200 are 600 together."""
    save_pretrained(hf.to_jax(hf.model("glm")), tmp_path / "base", layout="chatglm")
    model = trained(load(tmp_path / "base"), rank=200, target_modules=("q_proj", "k_proj", "v_proj"))
    with pytest.raises(InputError, match="does not load rank 600, 512 is its largest; save a merged model"):
        save_adapter(model, tmp_path / "x", format="vllm")
    assert np.isfinite(hf.run(model, TOKENS)).all()
