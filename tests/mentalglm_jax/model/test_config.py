"""Every published form of the configuration is read alike; another model's is refused."""

import dataclasses

import pytest
import transformers

from mentalglm_jax.errors import InputError
from mentalglm_jax.model import rope
from mentalglm_jax.model.glm import GlmConfig
from tests.mentalglm_jax.weights import CHATGLM_CONFIG

# ---- configuration, tracing ----


CHAT = {
    "architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 13696, "max_position_embeddings": 131072, "model_type": "glm", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329, "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151552,
}  # fmt: skip


REMOTE = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": 13696,
    "apply_residual_connection_post_layernorm": False, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_layers": 40, "rope_ratio": 500, "original_rope": True,
    "padded_vocab_size": 151552, "post_layer_norm": True, "rmsnorm": True, "seq_length": 131072,
    "tie_word_embeddings": False, "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
}  # fmt: skip


ZERO_FOURTEEN = CHAT | {  # both spellings at once, as transformers 5.5 saves it
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "bos_token_id": None, "dtype": "bfloat16",
    "max_position_embeddings": 32768, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip


EDGE = CHAT | {
    "attention_bias": False, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 59264, "max_position_embeddings": 8192, "eos_token_id": [59246, 59253, 59255], "pad_token_id": 59246,
}  # fmt: skip


EDGE_FIELDS = {key: EDGE[key] for key in GlmConfig.__dataclass_fields__ if key in EDGE} | {
    "eos_token_id": (59246, 59253, 59255)
}


YARN_BLOCK = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (CHAT, {}),
        (CHAT | {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e6, "type": "default"}}, {"rope_theta": 5e6}),
        (CHAT | {"rope_theta": 1.0e4, "rope_parameters": {"rope_theta": 5e6}}, {"rope_theta": 5e6}),
        (CHAT | {"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 1.0}),
        (CHAT | {"rope_parameters": {"partial_rotary_factor": 1.0}}, {"partial_rotary_factor": 1.0}),
        (CHAT | {"head_dim": ...}, {"head_dim": 128}),
        (CHAT | {"eos_token_id": 7}, {"eos_token_id": (7,)}),
        (CHAT | {"rope_theta": ..., "partial_rotary_factor": ..., "rope_scaling": None, "torch_dtype": ...}, {}),
        (EDGE, EDGE_FIELDS),
        (ZERO_FOURTEEN, {"sandwich_norm": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}),
        (CHAT | {"model_type": ..., "architectures": ["Glm4ForCausalLM"]}, {"sandwich_norm": True}),
        (CHAT | {"model_type": "glm4", "rms_norm_eps": 1e-5}, {"sandwich_norm": True, "rms_norm_eps": 1e-5}),
        (CHAT | {"rope_scaling": YARN_BLOCK | {"type": "yarn"}}, {"rope_scaling": rope.Yarn(**YARN_BLOCK)}),
        (CHAT | {"rope_parameters": YARN_BLOCK | {"rope_type": "yarn", "beta_fast": None, "attention_factor": 1.2}},
         {"rope_scaling": rope.Yarn(**YARN_BLOCK, attention_factor=1.2)}),
        (REMOTE, {"rope_theta": 5e6}),
        (REMOTE | {"model_type": "glm"}, {"rope_theta": 5e6}),  # re-saved: keys tell the layout
        (REMOTE | {"num_hidden_layers": ..., "rope_ratio": ..., "seq_length": 8192}, {"max_position_embeddings": 8192}),
        (REMOTE | {"num_layers": ...}, {"rope_theta": 5e6}),
        (REMOTE | {"multi_query_group_num": 4, "rope_ratio": 10000, "seq_length": 1048576},
         {"num_key_value_heads": 4, "rope_theta": 1e8, "max_position_embeddings": 1048576}),
        (REMOTE | {"layernorm_epsilon": 1e-6}, {"rms_norm_eps": 1e-6, "rope_theta": 5e6}),
        (REMOTE | {"multi_query_attention": False}, {"num_key_value_heads": 32, "rope_theta": 5e6}),
    ],
)  # fmt: skip
def test_every_published_form_of_the_configuration(raw, expected):
    raw = {key: value for key, value in raw.items() if value is not ...}
    wanted = dataclasses.replace(GlmConfig(), **expected)
    assert GlmConfig.from_dict(raw) == wanted
    assert GlmConfig.from_dict(wanted.to_dict()) == wanted
    assert GlmConfig.from_dict(raw, rope_theta=123.0).rope_theta == 123.0


@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_absent_keys_mean_what_they_mean_to_transformers(kind):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    theirs = {"glm": transformers.GlmConfig, "glm4": transformers.Glm4Config}[kind](**sizes).to_dict()
    assert {"rms_norm_eps", "attention_bias", "head_dim", "max_position_embeddings"} <= theirs.keys()
    assert GlmConfig.from_dict(sizes | {"model_type": kind}) == GlmConfig.from_dict(theirs)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (REMOTE | {"rmsnorm": False}, "rmsnorm = False"),
        (REMOTE | {"original_rope": False}, "original_rope = False"),
        (CHAT | {"hidden_act": "gelu"}, "gelu"),
        (CHAT | {"num_key_value_heads": 3}, "32 attention heads are not a multiple of 3"),
        (CHAT | {"partial_rotary_factor": 2.0}, "is 256, not even and up to head_dim"),
        (CHAT | {"rope_scaling": YARN_BLOCK | {"type": "yarn", "mscale": 1.0}}, "mscale"),
        (
            CHAT | {"rope_scaling": {"type": "yarn", "factor": 0.0, "original_max_position_embeddings": 3}},
            "factor of a",
        ),
    ],
)
def test_a_configuration_of_another_model_is_refused(raw, message):
    with pytest.raises(InputError, match=message):
        GlmConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear'"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ],
)
def test_a_chatglm_config_that_asks_for_another_model_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        GlmConfig.from_dict(CHATGLM_CONFIG | change)


def test_a_longer_context_is_said_by_both_names():
    """transformers 4 reads ``rope_scaling``, 5 ``rope_parameters``; without one there is no older name."""
    config = GlmConfig.from_dict(CHAT | {"rope_scaling": YARN_BLOCK | {"type": "yarn"}})
    said = config.to_dict()
    assert said["rope_scaling"] == said["rope_parameters"] and said["rope_scaling"]["rope_type"] == "yarn"
    assert GlmConfig.from_dict(said) == config and "rope_scaling" not in GlmConfig.from_dict(CHAT).to_dict()


@pytest.mark.parametrize(
    "older",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ],
    ids=["yarn", "linear", "theta"],
)
def test_rope_scaling_beside_rope_parameters_that_differ_is_refused(older):
    """transformers follows the older name; we followed the newer one, and computed another model."""
    raw = transformers.GlmConfig(head_dim=16, hidden_size=32, num_attention_heads=2, pad_token_id=0).to_dict()
    with pytest.raises(InputError, match="rope_scaling and rope_parameters differ"):
        GlmConfig.from_dict(raw | {"rope_scaling": older})
    GlmConfig.from_dict(raw | {"rope_scaling": raw["rope_parameters"]})
