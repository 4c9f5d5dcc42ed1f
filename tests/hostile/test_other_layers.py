"""A config.json that asks for a computation beside the model type that it names: transformers passes over the key, and
another model than the author's would answer. Honoured where the type knows it, else refused by name, on both sides."""

import json

import pytest
import transformers

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import DIRECTORY
from mentalglm_jax.model.glm import GlmConfig
from probes.errors import ProbeInputError
from probes.models.directory import check_computed

GLM = {"model_type": "glm", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": [1],
       "attention_bias": True, "max_position_embeddings": 512}  # fmt: skip
LLAMA = GLM | {"model_type": "llama", "attention_bias": False}
CHATGLM = {"model_type": "chatglm", "ffn_hidden_size": 48, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
           "padded_vocab_size": 96, "layernorm_epsilon": 1e-5, "seq_length": 512}  # fmt: skip
VISION = {"model_type": "glm4v", "text_config": GLM | {"model_type": "glm4v_text", "rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}}  # fmt: skip
KEYS = DIRECTORY["another_layer"]


def asked(raw, key):
    return raw | {"text_config": raw["text_config"] | {key: 2}} if "text_config" in raw else raw | {key: 2}


@pytest.mark.parametrize("key", KEYS)
def test_glm(key):
    GlmConfig.from_dict(GLM)
    with pytest.raises(InputError, match=f"config.json: {key} 2 asks for a layer that this model does not have"):
        GlmConfig.from_dict(asked(GLM, key))


@pytest.mark.parametrize("key", ["final_logit_softcapping", "scale_emb", "num_experts"])
@pytest.mark.parametrize("raw", [LLAMA, CHATGLM, VISION], ids=["llama", "chatglm", "glm4v"])
def test_its_kin(raw, key):
    GlmConfig.from_dict(raw)
    with pytest.raises(InputError, match=rf"config.json: {key} 2(:| asks)"):
        GlmConfig.from_dict(asked(raw, key))


@pytest.mark.parametrize("kind", ["glm", "chatglm", "llama"])
def test_a_rope_by_kind_of_layer(kind):
    """Read as a plain one it had the usual base."""
    nested = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}
    with pytest.raises(InputError, match=r"rope_parameters by kind of layer .'full_attention'. are not supported"):
        GlmConfig.from_dict({"glm": GLM, "chatglm": CHATGLM, "llama": LLAMA}[kind] | nested)


def judged(directory, raw):
    (directory / "config.json").write_text(json.dumps(raw))
    check_computed(directory, transformers.AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize("key", KEYS)
def test_probes(tmp_path, key):
    judged(tmp_path, GLM | {key: None})
    with pytest.raises(ProbeInputError, match=f"config.json: {key}: asks for a layer that a glm model does not have"):
        judged(tmp_path, asked(GLM, key))


@pytest.mark.parametrize("key", ["qk_norm", "attn_logit_softcapping"])
def test_probes_of_a_decoder_inside(tmp_path, key):
    judged(tmp_path, VISION)
    with pytest.raises(ProbeInputError, match=f"{key}: asks for a layer"):
        judged(tmp_path, asked(VISION, key))


@pytest.mark.parametrize(("kind", "key"), [("gemma2", "attn_logit_softcapping"), ("cohere", "logit_scale"),
                                           ("granite", "residual_multiplier"), ("llama", "mlp_bias"),
                                           ("mixtral", "num_local_experts")])  # fmt: skip
def test_a_type_that_knows_the_key_has_it(tmp_path, kind, key):
    judged(tmp_path, {"model_type": kind, key: {"mlp_bias": True, "num_local_experts": 2}.get(key, 2.0)})
