"""The forward pass of GLM's relatives against transformers, and what their configurations must say."""

import contextlib
import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import GlmConfig
from mentalglm_jax.model.rope import Linear, Llama3, Yarn, rope_frequencies
from tests.mentalglm_jax.model.test_glm import TOKENS, TOLERANCE, layers_match

VARIANTS = ["llama", "llama-3", "llama-linear", "llama-wide-heads", "mistral", "qwen2", "qwen2-tied-yarn"]


USUAL = ("llama-3", "qwen2-tied-yarn", "glm4v")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in (*VARIANTS, "glm4v", "glm46v")],
)
def test_every_layer_and_the_logits_match_transformers(hf, name):
    model = hf.variant(name)
    ours = hf.to_jax(model)
    if name in VARIANTS:
        layers_match(hf, model, ours, TOKENS)
    assert hf.error(hf.run(ours, TOKENS), hf.logits(model, TOKENS)) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama-3", "llama-linear", "qwen2-tied-yarn"])
def test_positions_far_from_zero(hf, name):
    model = hf.variant(name)
    positions = np.stack([np.arange(4077, 4096), np.linspace(0, 4095, 19)]).astype(np.int32)
    reference = hf.logits(model, TOKENS, position_ids=torch.tensor(positions))
    assert hf.error(hf.run(hf.to_jax(model), TOKENS, positions), reference) <= TOLERANCE


def test_a_model_without_padding_trains_every_embedding(hf):
    """As in transformers, where padding_idx is then None: token 0 is a token like others."""
    model = hf.model("llama", pad_token_id=None)
    ours = hf.to_jax(model)
    assert ours.config.pad_token_id is None
    assert ours.config.filler_id == 1
    assert hf.error(hf.run(ours, TOKENS * 0), hf.logits(model, TOKENS * 0)) <= TOLERANCE


BLOCKS = {
    "llama-3.1": (5e5, 128, Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=8192)),
    "llama-3.2": (5e5, 64, Llama3(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=8192)),
    "qwen2.5 yarn": (1e6, 128, Yarn(factor=4.0, original_max_position_embeddings=32768)),
    "yarn, all stated": (1e4, 64, Yarn(factor=2.5, original_max_position_embeddings=100, beta_fast=20.0, beta_slow=2.0,
                                       attention_factor=1.3)),
    "linear": (1e4, 128, Linear(factor=3.0)),
    "yarn, betas swapped": (1e4, 64, Yarn(factor=4.0, original_max_position_embeddings=4096, beta_fast=1.0,
                                          beta_slow=32.0)),
    "yarn, a small base": (5.0, 32, Yarn(factor=40.0, original_max_position_embeddings=32768)),
    "yarn, no ramp": (1e4, 64, Yarn(factor=4.0, original_max_position_embeddings=6)),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_rotary_frequencies_are_those_of_transformers(name):
    """Within one rounding of torch's float32 power, which our host's is not always equal to."""
    theta, head, scaling = BLOCKS[name]
    block = {key: value for key, value in dataclasses.asdict(scaling).items() if value is not None}
    config = transformers.LlamaConfig(head_dim=head, rope_parameters={"rope_type": scaling.KIND, "rope_theta": theta,
                                                                      **block})  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.KIND](config, None)
    found, scale = rope_frequencies(head, theta, scaling)
    assert found.dtype == np.float32
    assert scale == factor
    np.testing.assert_allclose(found, expected.numpy(), rtol=2.5e-7)
    assert (found != expected.numpy()).sum() <= 2
    plain, _ = rope_frequencies(head, theta, None)
    assert not np.allclose(plain, expected.numpy(), rtol=1e-3)


# ---- configurations ----

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8}
LLAMA = SIZES | {"model_type": "llama", "num_key_value_heads": 2}
QWEN = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}
VISION = {"model_type": "glm4v", "text_config": SIZES | {"rope_scaling": {"mrope_section": [1, 1, 0]},
                                                         "partial_rotary_factor": 0.5}}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", {"num_key_value_heads": None}), ("mistral", {"sliding_window": None}),
     ("qwen2", {"num_attention_heads": 32})],
)  # fmt: skip
def test_absent_keys_mean_what_they_mean_to_transformers(kind, changes):
    classes = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig,
               "qwen2": transformers.Qwen2Config}  # fmt: skip
    theirs = classes[kind](**SIZES | changes).to_dict()
    assert {"rms_norm_eps", "max_position_embeddings", "num_key_value_heads"} <= theirs.keys()
    assert GlmConfig.from_dict(SIZES | changes | {"model_type": kind}) == GlmConfig.from_dict(theirs)


THREE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (LLAMA, {"attention_bias": False, "partial_rotary_factor": 1.0, "head_dim": 8, "eos_token_id": (2,)}),
        (LLAMA | {"eos_token_id": [7, 8], "bos_token_id": 9, "pad_token_id": -1},
         {"eos_token_id": (7, 8), "bos_token_id": 9, "pad_token_id": None}),
        (LLAMA | {"rope_theta": 5e5, "rope_scaling": THREE},
         {"rope_theta": 5e5, "rope_scaling": Llama3(**{k: v for k, v in THREE.items() if k != "rope_type"})}),
        (LLAMA | {"rope_parameters": THREE | {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (LLAMA | {"max_position_embeddings": 777, "rope_scaling": {"type": "yarn", "factor": 4.0}},
         {"rope_scaling": Yarn(factor=4.0, original_max_position_embeddings=777)}),
        (LLAMA | {"rope_scaling": THREE, "original_max_position_embeddings": 99},
         {"rope_scaling": Llama3(**{k: v for k, v in THREE.items() if k != "rope_type"}
                                 | {"original_max_position_embeddings": 99})}),
        (LLAMA | {"sliding_window": 64, "max_position_embeddings": 64}, {"max_position_embeddings": 64}),
        (MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 4096}, {"max_position_embeddings": 4096}),
        (QWEN, {"attention_bias": True, "eos_token_id": (), "bos_token_id": None, "max_position_embeddings": 32768}),
        (QWEN | {"sliding_window": 10, "use_sliding_window": False}, {}),
        (QWEN | {"sliding_window": 10, "use_sliding_window": True, "max_window_layers": 3}, {}),
        (QWEN | {"sliding_window": 10, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, {}),
        (VISION, {"sandwich_norm": True, "head_dim": 8, "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
                  "eos_token_id": (151329, 151336, 151338), "pad_token_id": None}),
    ],
)  # fmt: skip
def test_configurations_of_relatives(raw, expected):
    found = GlmConfig.from_dict(raw)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.family == found.model_type == raw["model_type"]
    assert GlmConfig.from_dict(raw, rope_theta=123.0).rope_theta == 123.0
    if raw is not VISION:  # whose rest is the source's
        written = found.to_dict()
        assert GlmConfig.from_dict(written) == found
        classes = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig,
                   "qwen2": transformers.Qwen2Config}  # fmt: skip
        assert GlmConfig.from_dict(classes[raw["model_type"]](**written).to_dict()) == found


WINDOW = r"sliding_window 10 is shorter than max_position_embeddings 32768.*rows of up to 10 tokens do not notice it"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (LLAMA | {"model_type": "qwen3"}, r"'qwen3' is not supported: its norms of q and k"),
        (LLAMA | {"model_type": "mixtral"}, "a mixture of experts"),
        (LLAMA | {"model_type": "qwen2_vl"}, "a vision-language model"),
        (LLAMA | {"model_type": "olmo"}, r"'olmo' is not GLM-4 nor one of its relatives \(glm, .*qwen2\)"),
        (LLAMA | {"model_type": ["llama"]}, "is not GLM-4 nor"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts 8: a mixture of experts"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias = True: this model's feed-forward has no biases"),
        (LLAMA | {"attention_bias": True}, "attention_bias = True in a llama model: o_proj would have a bias too"),
        (QWEN | {"attention_bias": False}, "in a qwen2 model: q, k and v have biases"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: a llama model rotates every"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (LLAMA | {"use_qk_norm": True}, "use_qk_norm True asks for a layer that this model does not have"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope type 'dynamic' is not supported \(def"),
        (LLAMA | {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        (LLAMA | {"rope_scaling": {"type": ["yarn"]}}, "rope type"),
        (LLAMA | {"rope_scaling": {"type": "yarn"}}, "rope_parameters: factor is missing"),
        (LLAMA | {"rope_scaling": THREE | {"high_freq_factor": 1.0}}, "high_freq_factor 1.0 .* must be above"),
        (QWEN | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "by kind of layer .'full_attention'"),
        (MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 32768},
         "sliding_window 4096 is shorter than max_position_embeddings 32768.*set max_position_embeddings to 4096"),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, "sliding_window 4096 is shorter"),
        (QWEN | {"sliding_window": 10, "use_sliding_window": True, "max_window_layers": 2}, WINDOW),
        (QWEN | {"sliding_window": 10, "use_sliding_window": True,
                 "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, WINDOW),
        (QWEN | {"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention', but no sliding"),
        (LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"is quantised \(awq, 4 bits\)"),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
         r"is quantised \(bitsandbytes, 8 bits\).*load the checkpoint it was made from"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(fp8\)"),
        (LLAMA | {"compression_config": {"format": "x"}}, r"is quantised \(unknown method\)"),
        (VISION | {"text_config": VISION["text_config"] | {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        (VISION | {"text_config": VISION["text_config"] | {"attention_bias": False}}, "in every glm4v model"),
        (VISION | {"text_config": VISION["text_config"] | {"head_dim": 16}}, "head_dim 16 in a glm4v model is hidden_"),
        (VISION | {"text_config": SIZES | {"partial_rotary_factor": 0.5}}, r"mrope_section \[8, 12, 12\] does not"),
        (VISION | {"text_config": VISION["text_config"] | {"model_type": "x"}}, "text_config.model_type 'x'"),
        ({"model_type": "glm4v"}, "text_config is missing"),
        ({"model_type": "llama"}, "vocab_size' is missing"),
    ],
)  # fmt: skip
def test_a_relative_that_differs_is_refused_by_name(raw, says):
    with pytest.raises(InputError, match=says) as caught:
        GlmConfig.from_dict(raw)
    assert "\n" not in str(caught.value)


WORDS = st.sampled_from(["yarn", "x", "full_attention"])
BLOCK = st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), st.integers() | st.text(), max_size=2)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), WORDS, BLOCK,
                   st.lists(st.integers(), max_size=2), st.lists(st.text(max_size=2), max_size=2))  # fmt: skip
KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers",
        "layer_types", "head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "eos_token_id", "pad_token_id",
        "bos_token_id", "partial_rotary_factor", "original_max_position_embeddings", "quantization_config",
        "text_config", "mrope_section", "tie_word_embeddings", "num_experts", "hidden_act", "rms_norm_eps",
        *SIZES)  # fmt: skip


@hypothesis.settings(max_examples=300)
@hypothesis.given(raw=st.sampled_from([LLAMA, QWEN, MISTRAL, VISION]), data=st.data())
def test_a_strange_configuration_is_read_or_refused(raw, data):
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
    text = raw | {"text_config": raw["text_config"] | changes} if raw is VISION and data.draw(st.booleans()) else None
    with contextlib.suppress(InputError):
        found = GlmConfig.from_dict(text or raw | changes)
        assert found.family == raw["model_type"]
