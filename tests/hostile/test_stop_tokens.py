"""What ends an answer, by files that say it in several places: the same as to transformers and llama.cpp, or more."""

import json
import shutil

import pytest
from tokenizers import Tokenizer

from mentalglm_jax.checkpoints.gguf_models import convert_gguf
from mentalglm_jax.checkpoints.weights import generation_config
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import GlmConfig
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from tests.mentalglm_jax.chat_families import write_family
from tests.mentalglm_jax.gguf_files import random_weights, write_gguf

LLAMA = {"model_type": "llama", "vocab_size": 3000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4}  # fmt: skip


def tokenizer(directory, config=None, generation=None, family="qwen"):
    """``config.json`` and ``generation_config.json`` as given; None: there is no such file."""
    if family == "glm":
        shutil.copytree(BUILTIN, directory)
    else:
        write_family(directory, family)
    for name, said in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).unlink(missing_ok=True)
        if said is not None:
            (directory / name).write_text(json.dumps(said))
    return GlmTokenizer.load(directory)


def test_config_json_where_there_is_no_generation_config(tmp_path):
    """As in transformers, which makes one of it; an answer went on behind <|endoftext|>."""
    plain = tokenizer(tmp_path / "plain")
    text, turn = plain.id_of("<|endoftext|>"), plain.id_of("<|im_end|>")
    assert plain.eos_ids == (turn,)
    said = {"eos_token_id": [text, turn], "vocab_size": 3000}
    assert tokenizer(tmp_path / "one", said).eos_ids == (text, turn)
    assert tokenizer(tmp_path / "two", said, {"eos_token_id": turn}).eos_ids == (turn,)
    assert tokenizer(tmp_path / "none", said | {"eos_token_id": -1}).eos_ids == (turn,)
    with pytest.raises(InputError, match=r"config\.json: eos_token_id 7 is the ordinary token"):
        tokenizer(tmp_path / "other", said | {"eos_token_id": 7})


def test_a_fourth_stop_token_of_glm_4(tmp_path):
    ours = tokenizer(tmp_path / "plain", family="glm")
    more = ours.id_of("<eop>")
    assert more not in ours.eos_ids
    found = tokenizer(tmp_path / "more", None, {"eos_token_id": [more, 7]}, "glm")
    assert found.eos_ids == tuple(sorted({*ours.eos_ids, more}))


@pytest.mark.parametrize("own", [{}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}], ids=["absent", "one", "two"])
def test_a_converted_relative_ends_where_its_source_does(own):
    """To transformers config.json has no say beside a generation_config.json: 2, Llama's default, is a letter there."""
    config = GlmConfig.from_dict(LLAMA | own)
    assert generation_config(config, {"eos_token_id": [2548]})["eos_token_id"] == [2548]
    assert generation_config(config, {})["eos_token_id"] == [*config.eos_token_id]


@pytest.mark.parametrize(("key", "token"), [("eot", "<|start_header_id|>"), ("eom", "<|end_header_id|>")])
def test_what_llama_cpp_ends_at_by_key(tmp_path, key, token):
    ends = _stops(tmp_path, {})
    assert token not in ends
    assert _stops(tmp_path, {f"tokenizer.ggml.{key}_token_id": token}) == ends | {token}


def test_what_llama_cpp_ends_at_by_name(tmp_path):
    """The file names <|eot_id|> only."""
    assert _stops(tmp_path, {}) == {"<|eot_id|>", "<|end_of_text|>"}


def _stops(folder, keys):
    plain = Tokenizer.from_file(str(write_family(folder / "family", "llama") / "tokenizer.json"))
    keys = {key: plain.token_to_id(token) for key, token in keys.items()}
    convert_gguf(write_gguf(folder / "m.gguf", "llama", random_weights("llama"), "llama", keys=keys), folder / "m")
    said = json.loads((folder / "m" / "generation_config.json").read_text())["eos_token_id"]
    return {plain.id_to_token(one) for one in said}
