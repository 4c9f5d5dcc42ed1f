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
from probes.models.load import load_model

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


@pytest.mark.parametrize("value", [None, {}, 0])
@pytest.mark.parametrize("name", ["full_attention", "sliding_attention", "linear_attention"])
@pytest.mark.parametrize("kind", ["glm", "chatglm", "llama"])
def test_a_rope_that_names_a_kind_of_layer(kind, name, value):
    """A kind without rotary positions was read as one with them."""
    with pytest.raises(InputError, match=f"rope_parameters by kind of layer .'{name}'. are not supported"):
        GlmConfig.from_dict({"glm": GLM, "chatglm": CHATGLM, "llama": LLAMA}[kind] | {"rope_parameters": {name: value}})


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


# The layers of these types attend to all that stands before; transformers' cache would cut keys off all the same.
WINDOWS = {
    "a window": {"sliding_window": 4}, "chunks": {"attention_chunk_size": 4},
    "a window of text": {"sliding_window": "4"},
    "kinds of layers": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    "chunked layers": {"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 1 << 20},
    "keys of other layers": {"kv_sharing_modes": ["reuse", "reuse"]},
    "both directions": {"is_causal": False}, "no direction": {"is_causal": None},
}  # fmt: skip
NO_WINDOWS = {
    "none": {"sliding_window": None, "attention_chunk_size": None, "layer_types": None, "is_causal": True},
    "wider than any row": {"sliding_window": 512, "layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("raw", [GLM, LLAMA, VISION], ids=["glm", "llama", "glm4v"])
def test_a_window_that_only_the_cache_has(raw, window):
    with pytest.raises(InputError, match=r"config.json: ({}) .* asks for a layer".format("|".join(WINDOWS[window]))):
        GlmConfig.from_dict(raw | ({"text_config": raw["text_config"] | WINDOWS[window]} if raw is VISION
                                   else WINDOWS[window]))  # fmt: skip


@pytest.mark.parametrize("key", ["attention_chunk_size", "is_causal", "per_layer_config"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_of_types_that_have_windows(kind, key):
    raw = LLAMA | {"model_type": kind, "attention_bias": kind == "qwen2", "sliding_window": None}
    GlmConfig.from_dict(raw)
    with pytest.raises(InputError, match=f"{key} .* asks for a layer"):
        GlmConfig.from_dict(
            raw | {key: {"is_causal": False, "per_layer_config": {"0": {"rms_norm_eps": 1}}}.get(key, 4)}
        )


@pytest.mark.parametrize("raw", [GLM, LLAMA], ids=["glm", "llama"])
@pytest.mark.parametrize("said", NO_WINDOWS)
def test_no_window_is_none(tmp_path, raw, said):
    GlmConfig.from_dict(raw | NO_WINDOWS[said])
    judged(tmp_path, raw | NO_WINDOWS[said])


@pytest.mark.parametrize("window", [name for name in WINDOWS if name != "a window of text"])
@pytest.mark.parametrize("raw", [GLM, LLAMA], ids=["glm", "llama"])
def test_probes_a_window_that_only_the_cache_has(tmp_path, raw, window):
    with pytest.raises(ProbeInputError, match=r"config.json: ({}): asks for a layer".format("|".join(WINDOWS[window]))):
        judged(tmp_path, raw | WINDOWS[window])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mistral", {"sliding_window": 4}),
        ("llama4_text", {"attention_chunk_size": 4}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ],
)
def test_a_type_that_knows_windows_has_them(tmp_path, kind, said):
    judged(tmp_path, {"model_type": kind, **said})


LONGER = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["glm", "glm4", "llama", "glm4v"])
def test_a_trained_context_beside_the_block(tmp_path, kind, name):
    """transformers prefers it in every type; glm and glm4v went by the one in the block."""
    plain = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]} if kind == "glm4v" else {}
    said = {"original_max_position_embeddings": 32, "rope_parameters": None, name: LONGER | plain}
    raw = {"glm4v": GLM | {"model_type": "glm4v_text"}, "llama": LLAMA}.get(kind, GLM | {"model_type": kind}) | said
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()  # as their rotary layers do
    ours = GlmConfig.from_dict({"model_type": kind, "text_config": raw} if kind == "glm4v" else raw).rope_scaling
    assert ours.original_max_position_embeddings == 32
    assert theirs.rope_parameters["original_max_position_embeddings"] == 32


def test_no_part_of_a_head_is_the_whole_of_it():
    """transformers then rotates all of a head; we rotated half."""
    with pytest.raises(InputError, match="partial_rotary_factor is null and must be a number"):
        GlmConfig.from_dict(GLM | {"partial_rotary_factor": None})


# transformers reads these keys of any type: its cache is then of another model than its layers, or both of another
# model than the file says under the names that everybody else reads.
REROUTED = {
    "a window of none": {"sliding_window": 0}, "chunks of none": {"attention_chunk_size": 0},
    "a window that is false": {"sliding_window": False},
    "a window of the decoder": {"is_encoder_decoder": True, "decoder_sliding_window": 4},
    "one number for another": {"attribute_map": {"rms_norm_eps": "eps"}, "eps": 0.5},
    "a window under another name": {"attribute_map": {"sliding_window": "w"}, "w": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", REROUTED)
@pytest.mark.parametrize("raw", [GLM, LLAMA, CHATGLM, VISION], ids=["glm", "llama", "chatglm", "glm4v"])
def test_a_key_that_stands_for_another(raw, name):
    said = REROUTED[name]
    said = {"text_config": raw["text_config"] | said} if raw is VISION else said
    with pytest.raises(InputError, match=r"config.json: ({}) .* asks for a layer".format("|".join(REROUTED[name]))):
        GlmConfig.from_dict(raw | said)


@pytest.mark.parametrize("key", DIRECTORY["other_keys"])
def test_a_key_around_the_decoder(key):
    with pytest.raises(InputError, match=f"config.json: {key} .* asks for a layer"):
        GlmConfig.from_dict(VISION | {key: {"text_config": "mine"}})


def loaded(directory, raw):
    """As ``probes`` loads a model of that file, with weights of its shapes."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**GLM))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(raw))
    return load_model(directory)[0]


BY_LAYER = {
    "by layer, a window": {"sliding_window": None, "per_layer_config": {"0": {"sliding_window": 4}}},
    "by layer, another": {"attn_logit_softcapping": None, "per_layer_config": {"0": {"attn_logit_softcapping": 4.0}}},
}


@pytest.mark.parametrize("name", [*REROUTED, *BY_LAYER])
def test_probes_a_key_that_stands_for_another(tmp_path, name):
    with pytest.raises(ProbeInputError, match=r"attribute_map: has trans|asks for a layer that a glm model"):
        loaded(tmp_path, GLM | (REROUTED | BY_LAYER)[name])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_probes_takes_no_kind_of_attention_from_a_file(tmp_path, key):
    """flex_attention answered token by token as another model than it scored as."""
    assert loaded(tmp_path, GLM | {key: "flex_attention"}).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "said"), [("bart", {"is_encoder_decoder": True}), ("t5", {}), ("mistral", BY_LAYER[
    "by layer, a window"])])  # fmt: skip
def test_a_type_that_is_one_may_say_so(tmp_path, kind, said):
    judged(tmp_path, {"model_type": kind, **said})


NOT_TAKEN = {"attention_bias": None, "tie_word_embeddings": None, "rms_norm_eps": 1}


@pytest.mark.parametrize("key", NOT_TAKEN)
@pytest.mark.parametrize("raw", [GLM, LLAMA], ids=["glm", "llama"])
def test_what_transformers_does_not_take(tmp_path, raw, key):
    said = raw | {key: NOT_TAKEN[key]}
    with pytest.raises(InputError, match=f"config.json: {key} (is null and must be true or false|1 is a whole number)"):
        GlmConfig.from_dict(said)
    with pytest.raises(Exception, match=key):
        judged(tmp_path, said)


@pytest.mark.parametrize(("kind", "tied"), [("glm4v", True), ("glm46v", False)])
def test_embeddings_tied_by_the_decoders_key_alone(kind, tied):
    """Only a glm4v follows it; a glm46v without a head took the embeddings for one, which transformers does not."""
    raw = VISION | {"model_type": kind, "text_config": VISION["text_config"] | {"tie_word_embeddings": True}}
    assert GlmConfig.from_dict(raw).tie_word_embeddings is tied
    config = transformers.AutoConfig.for_model(**raw)
    assert config.tie_word_embeddings is tied
    assert GlmConfig.from_dict(raw | {"tie_word_embeddings": True}).tie_word_embeddings
