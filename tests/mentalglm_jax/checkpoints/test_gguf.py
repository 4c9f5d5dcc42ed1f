"""GGUF files in: every bit of what they say, the tokenizer they carry, and one line for what is not understood."""

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from mentalglm_jax.checkpoints.gguf_models import convert_gguf
from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tokenizer import GlmTokenizer
from tests.mentalglm_jax.chat_families import write_family
from tests.mentalglm_jax.gguf_files import HEADS, HIDDEN, LAYERS, random_weights, write_gguf

ARCHITECTURES = {"llama": "smollm", "qwen2": "qwen", "glm4": "glm"}
TEXTS = ["it's 12345 days,  ok?\n\n  yes ", "我最近睡不着。\n", " <|im_end|>\r\n", "naïve 🙂\x00", "  \t x", "don't"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def converted(architecture, tmp_path_factory):
    where = tmp_path_factory.mktemp("gguf")
    weights = random_weights(architecture)
    convert_gguf(write_gguf(where / "m.gguf", architecture, weights, ARCHITECTURES[architecture]), where / "m")
    return where / "m", weights


def test_every_tensor_comes_back_bit_for_bit(converted):
    directory, weights = converted
    found = load_file(directory / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


def test_the_configuration_says_what_the_file_says(converted, architecture):
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["model_type"] == architecture
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (2560, HIDDEN, LAYERS)
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5 and config["dtype"] == "float32"
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["rope_parameters"].get("partial_rotary_factor", 1.0) == (0.5 if architecture == "glm4" else 1.0)


def test_transformers_reads_the_file_and_the_directory_alike(converted, architecture):
    """Llama's rows are put back in its own way, and its logits agree, which they would not if a row stood elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM

    directory, weights = converted
    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert not ours.config.attention_bias if architecture == "llama" else True
    if architecture == "glm4":  # which transformers does not read from GGUF
        assert all(np.array_equal(ours.state_dict()[name].numpy(), weight) for name, weight in weights.items())
        return
    theirs = AutoModelForCausalLM.from_pretrained(directory.parent, gguf_file="m.gguf", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_what_is_packed_is_unpacked_as_the_gguf_package_does(tmp_path, kind):
    weights = random_weights("llama")
    convert_gguf(write_gguf(tmp_path / "m.gguf", "llama", weights, kind=kind), tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    number = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        if weight.ndim == 2 and kind != "F16":
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, number), number)
        assert np.array_equal(found[name], weight.astype(np.float16) if kind == "F16" and weight.ndim == 2 else weight)


def test_blocks_of_rows_give_what_the_whole_gives(tmp_path, monkeypatch, converted, architecture):
    """The size of a block is not that of a head, nor a divisor of the rows."""
    monkeypatch.setattr("mentalglm_jax.checkpoints.gguf_models._BLOCK_BYTES", 4 * HIDDEN * (HIDDEN // HEADS + 3))
    convert_gguf(converted[0].parent / "m.gguf", tmp_path / "m", max_shard_bytes=200_000)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    found = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert len(shards) > 2
    assert all(np.array_equal(found[name], weight) for name, weight in converted[1].items())


def test_bfloat16_rounds_to_the_nearest(tmp_path, converted):
    import ml_dtypes

    convert_gguf(converted[0].parent / "m.gguf", tmp_path / "m", dtype="bfloat16")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert all(np.array_equal(found[name], weight.astype(ml_dtypes.bfloat16)) for name, weight in converted[1].items())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_output_matrix_of_its_own(tmp_path):
    weights = random_weights("qwen2") | {"lm_head.weight": np.full((2560, HIDDEN), 0.5, np.float32)}
    convert_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", weights, "qwen"), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"] == 0.5).all()


# ---- tokenizer ----


@pytest.mark.parametrize("family", ["qwen", "smollm", "llama", "llama-dated"])
def test_the_tokenizer_is_that_of_the_models_own_files(tmp_path, family):
    architecture = "qwen2" if family == "qwen" else "llama"
    convert_gguf(write_gguf(tmp_path / "m.gguf", architecture, random_weights(architecture), family), tmp_path / "m")
    ours, own = GlmTokenizer.load(tmp_path / "m"), GlmTokenizer.load(write_family(tmp_path / "own", family))
    assert [ours.encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]
    assert ours.chat_format == own.chat_format
    assert (ours.vocab_size, ours.pad_id, ours.special_ids) == (own.vocab_size, own.pad_id, own.special_ids)
    assert ours.prompt_ids("Why?") == own.prompt_ids("Why?")
    from transformers import AutoTokenizer

    theirs, original = AutoTokenizer.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "own")
    for text in TEXTS:
        assert theirs(text).input_ids == original(text).input_ids  # what the file adds by itself included


def test_stop_tokens_go_into_the_generation_config(tmp_path):
    eot = 2546  # <|endoftext|>
    path = write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"), keys={"tokenizer.ggml.eot_token_id": eot})
    convert_gguf(path, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [2548, eot]
    assert GlmTokenizer.load(tmp_path / "m").eos_ids == (eot, 2548)


# ---- rotary scaling ----


def test_llama3s_scaling_is_recognised_by_its_factors(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    stated = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters={"rope_theta": 5e5, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](stated, "cpu")
    size = HIDDEN // HEADS
    factors = (5e5 ** -(np.arange(0, size, 2) / size) / scaled.numpy()).astype(np.float32)
    keys = {"llama.rope.freq_base": 5e5}
    path = write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"), keys=keys,
                      extra={"rope_freqs.weight": factors})  # fmt: skip
    convert_gguf(path, tmp_path / "m")
    found = json.loads((tmp_path / "m" / "config.json").read_text())["rope_parameters"]
    assert found == {"rope_theta": 5e5, **scaling}
    path = write_gguf(tmp_path / "n.gguf", "llama", random_weights("llama"), keys=keys,
                      extra={"rope_freqs.weight": factors * np.float32(1.01)})  # fmt: skip
    with pytest.raises(InputError, match="is not the scaling of Llama 3"):
        convert_gguf(path, tmp_path / "n")


def test_yarn_goes_along(tmp_path):
    keys = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 32}  # fmt: skip
    convert_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", random_weights("qwen2"), "qwen", keys=keys), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["rope_parameters"] == {
        "rope_theta": 10_000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32
    }  # fmt: skip


def test_linear_scaling_goes_along(tmp_path):
    """llama.cpp divides positions by the factor, transformers frequencies: one product."""
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    convert_gguf(write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"), keys=keys), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["rope_parameters"] == {
        "rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.5
    }  # fmt: skip


def test_a_glm4_without_biases(tmp_path):
    """GLM-4-32B-0414 and GLM-Z1-32B have none; one that lacks some is damaged."""
    weights = {name: weight for name, weight in random_weights("glm4").items() if not name.endswith(".bias")}
    convert_gguf(write_gguf(tmp_path / "m.gguf", "glm4", weights, "glm"), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["attention_bias"] is False
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found.keys() == weights.keys()
    some = random_weights("glm4")
    path = write_gguf(tmp_path / "n.gguf", "glm4", some, "glm", drop=("blk.1.attn_q.bias",))
    with pytest.raises(InputError, match=r"blk\.1\.attn_q\.bias is missing"):
        convert_gguf(path, tmp_path / "n")


# ---- what is not understood ----

REFUSED = {
    "another architecture": ({"general.architecture": "gemma3"}, (), {}, "architecture 'gemma3'; those that can"),
    "no architecture": ({}, ("general.architecture",), {}, "architecture None; those"),
    "an unknown key": ({"llama.attention.scale": 0.5}, (), {}, "states llama.attention.scale, which is not understood"),
    "experts": ({"llama.expert_count": 8}, (), {}, "a mixture of experts"),
    "a window": ({"llama.attention.sliding_window": 16}, (), {}, "within a sliding window"),
    "part of a head": ({"llama.rope.dimension_count": 8}, (), {}, "rotates 8 of 16 numbers"),
    "no layers": ({"llama.block_count": 0}, (), {}, "block_count must be an integer from 1"),
    "a layer too many": ({"llama.block_count": 3}, (), {}, r"blk.2.attn_norm.weight, .* and 5 more is missing"),
    "a layer too few": ({"llama.block_count": 1}, (), {}, r"and 5 more does not belong"),
    "another width": ({"llama.feed_forward_length": 64}, (), {}, r"\(96, 64\) instead of \(64, 64\)"),
    "a tensor missing": ({}, ("blk.1.ffn_up.weight",), {}, "blk.1.ffn_up.weight is missing"),
    "a tensor too many": ({}, (), {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "blk.0.attn_q.bias does not belong"),
    "no embedding": ({}, ("token_embd.weight",), {}, "token_embd.weight is missing"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, (), {}, "rope scaling 'longrope' is not supported"),
    "linear without its factor": ({"llama.rope.scaling.type": "linear"}, (), {}, "rope.scaling.factor.* is missing"),
    "one part of three": ({"split.count": 3, "split.no": 0}, (), {}, "is one of 3 parts of a model; join them first"),
    "NaN": ({}, ("output_norm.weight",), {"output_norm.weight": np.full(HIDDEN, np.nan, np.float32)},
            "NaN or infinity in tensor output_norm.weight"),
    "SentencePiece": ({"tokenizer.ggml.model": "llama"}, (), {}, "a tokenizer of the kind 'llama'; only byte-level"),
    "no tokenizer": ({}, ("tokenizer.ggml.model",), {}, "model is missing"),
    "an unknown split": ({"tokenizer.ggml.pre": "tekken"}, (), {}, "splits by 'tekken'; known: qwen2"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, (), {}, "each once"),
    "kinds too few": ({"tokenizer.ggml.token_type": [1, 1]}, (), {}, "must give each of the 2560 tokens its kind"),
    "a merge of three": ({"tokenizer.ggml.merges": ["a b c"]}, (), {}, "holds 'a b c', which is not two tokens"),
    "a merge of no token": ({"tokenizer.ggml.merges": ["q zzzz"]}, (), {}, "its tokenizer cannot be built"),
    "tokens of numbers": ({"tokenizer.ggml.tokens": [1, 2]}, (), {}, "tokens must be a list of"),
    "a stop token beyond": ({"tokenizer.ggml.eos_token_id": 9999}, (), {}, "eos_token_id must be an integer from 0 to"),
    "an embedding too small": ({}, (), {}, "has 2549 tokens, but an embedding of only 2000 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    keys, drop, extra, says = REFUSED[name]
    weights = random_weights("llama")
    if name == "an embedding too small":
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:2000]
    path = write_gguf(tmp_path / "m.gguf", "llama", weights, keys=keys, drop=drop, extra=extra)
    (tmp_path / "m").mkdir()
    with pytest.raises(InputError, match=says) as refused:
        convert_gguf(path, tmp_path / "m")
    assert "\n" not in str(refused.value)
    assert not [*(tmp_path / "m").iterdir()]


def test_an_unknown_dtype_and_a_directory_with_other_files(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"))
    with pytest.raises(InputError, match="dtype 'float16' is not one of"):
        convert_gguf(path, tmp_path / "m", dtype="float16")
    with pytest.raises(InputError, match="holds other files"):
        convert_gguf(path, tmp_path)


# ---- and on: the same tokenizer in the run, in the export ----


def test_a_converted_relative_is_asked_saved_and_stops_where_it_was_trained_to(tmp_path):
    import mentalglm_jax as mg
    from mentalglm_jax.data.records import Record
    from mentalglm_jax.inference.generate import generate_records

    convert_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", random_weights("qwen2"), "qwen"), tmp_path / "m")
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    ends = [2546, generation["eos_token_id"][0]]  # <|endoftext|> too, which config.json does not say
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": ends}))
    model, tokenizer = mg.load(tmp_path / "m"), GlmTokenizer.load(tmp_path / "m")
    record = Record(id="r", task="suicide_risk", language="en", post="I can't <|im_end|> sleep.", label="high",
                    question="Which?", split="test")  # fmt: skip
    (row,) = generate_records(model, tokenizer, [record], out_path=tmp_path / "g.jsonl", max_new_tokens=4)
    assert row["prompt_ids"] == tokenizer.prompt_ids(record.prompt)
    assert row["prompt_ids"].count(tokenizer.stop_id) == 2  # system and user; the post's own is text
    mg.save_pretrained(model, tmp_path / "saved", tokenizer=tokenizer)
    saved = GlmTokenizer.load(tmp_path / "saved")
    assert (saved.eos_ids, saved.chat_format) == (tuple(ends), tokenizer.chat_format)
    assert saved.prompt_ids(record.prompt) == row["prompt_ids"]
