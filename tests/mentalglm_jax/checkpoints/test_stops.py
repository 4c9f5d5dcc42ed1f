"""An export ends its turns in plain transformers as the model does here, whatever layout it is written in."""

import json
import shutil

import jax.numpy as jnp
import pytest
import torch
import transformers
from flax import nnx

from mentalglm_jax.checkpoints.directories import convert, load, save_pretrained
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.generate import generate
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from tests.mentalglm_jax.chat_families import write_family

TURN = {"llama": "<|eot_id|>", "qwen": "<|im_end|>"}
TEXT = {"llama": "<|end_of_text|>", "qwen": "<|endoftext|>"}
CONFIG = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen"])
def source(request, tmp_path_factory):
    """A model that always ends its turn, of whose stop tokens config.json names the text's alone, as published ones
    do; the family."""
    directory, family = tmp_path_factory.mktemp("ends") / "m", request.param
    write_family(directory, family)
    tokenizer = GlmTokenizer.load(directory)
    turn, text = tokenizer.id_of(TURN[family]), tokenizer.id_of(TEXT[family])
    config = GlmConfig(
        **CONFIG, vocab_size=tokenizer.vocab_size + 2, partial_rotary_factor=1.0, attention_bias=False, family="llama",
        eos_token_id=(text,), pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    model.embed_tokens.embedding.set_value(jnp.ones_like(model.embed_tokens.embedding[...]))
    for linear in (model.layers.self_attn.o_proj, model.layers.mlp.down_proj):
        linear.kernel.set_value(jnp.zeros_like(linear.kernel[...]))
    head = jnp.zeros_like(model.lm_head.kernel[...])
    model.lm_head.kernel.set_value(head.at[:, turn].set(1.0))
    save_pretrained(model, directory.with_name("bare"))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directory.with_name("bare") / name, directory / name)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [text, turn]}))
    return directory, family, {text, turn}


@pytest.mark.parametrize("given", ["tokenizer", "directory"])
@pytest.mark.parametrize("layout", [None, "glm"])
def test_a_saved_model_ends_its_turn_in_transformers(source, tmp_path, layout, given):
    directory, _, ends = source
    if layout == "glm":
        convert(directory, tmp_path / "m", "glm")
        directory = tmp_path / "m"
    model, tokenizer = load(directory), GlmTokenizer.load(directory)
    assert generate(model, tokenizer, "How are you?", max_new_tokens=4) == ""
    save_pretrained(model, tmp_path / "out", tokenizer=tokenizer if given == "tokenizer" else str(directory))
    assert GlmTokenizer.load(tmp_path / "out").eos_ids == tokenizer.eos_ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(theirs.generation_config.eos_token_id) == ends
    prompt = torch.tensor([tokenizer.prompt_ids("How are you?")])
    said = theirs.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert said[0, prompt.shape[1] :].tolist() == [tokenizer.stop_id]


def test_a_directory_that_is_no_tokenizer_of_ours_says_it_in_its_own_file(source, tmp_path):
    directory, _, ends = source
    other = shutil.copytree(directory, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}?{% endfor %}")
    with pytest.raises(InputError):
        GlmTokenizer.load(other)
    save_pretrained(load(directory), tmp_path / "out", tokenizer=str(other))
    assert set(json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]) == ends


def test_a_glm_keeps_its_three_and_a_fourth(tmp_path):
    tokenizer = GlmTokenizer.load(BUILTIN)
    config = GlmConfig(**CONFIG, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_ids, pad_token_id=None)
    model = Glm(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "plain", tokenizer=tokenizer)
    plain = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    shutil.copytree(BUILTIN, tmp_path / "more")
    fourth = tokenizer.id_of("<eop>")
    (tmp_path / "more" / "generation_config.json").write_text(json.dumps({"eos_token_id": [fourth]}))
    save_pretrained(model, tmp_path / "out", tokenizer=GlmTokenizer.load(tmp_path / "more"))
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(found) == {*plain["eos_token_id"], fourth}


@pytest.mark.parametrize("way", ["convert", "orbax", "save"])
def test_a_vocabulary_in_files_that_are_not_read_is_not_lost_without_a_word(source, tmp_path, way):
    slow = shutil.copytree(source[0], tmp_path / "slow")
    parts = json.loads((slow / "tokenizer.json").read_text())["model"]
    (slow / "tokenizer.json").unlink()
    (slow / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (slow / "merges.txt").write_text("#version: 0.2\n")
    model, out = load(source[0]), tmp_path / "out"
    carry = {"convert": lambda: convert(slow, out), "orbax": lambda: convert(slow, out, "orbax"),
             "save": lambda: save_pretrained(model, out, tokenizer=str(slow))}  # fmt: skip
    with pytest.raises(InputError, match=r"slow: its vocabulary is in vocab\.json, merges\.txt, and there is no"):
        carry[way]()
    assert not (tmp_path / "out").exists()
