"""An adapter that does not fit is refused by name, and the model stays as it was."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.checkpoints.directories import load
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.model.lora import (
    has_lora,
)
from tests.mentalglm_jax.adapters import by_peft, edit_config, trained


@pytest.fixture(scope="module")
def base(hf):
    """The base model; a test that adds an adapter works on a clone."""
    return hf.to_jax(hf.model("glm"))


@pytest.fixture(scope="module")
def saved_by_peft(hf, tmp_path_factory):
    """One plain LoRA directory."""
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    by_peft(hf, directory, target_modules=["q_proj", "v_proj"])
    return directory


@pytest.fixture
def copy(saved_by_peft, tmp_path):
    return Path(shutil.copytree(saved_by_peft, tmp_path / "adapter"))


def change(**changes):
    return lambda directory: edit_config(directory, **changes)


def rewrite(function):
    def damage(directory: Path):
        tensors = load_file(directory / "adapter_model.safetensors")
        function(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    return damage


def without_weights(directory: Path):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


FAULTS = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: missing"),
    "config not JSON": (lambda d: (d / "adapter_config.json").write_text("r: 8"), "not JSON"),
    "not LoRA": (change(peft_type="IA3"), "peft_type is 'IA3'"),
    "no type": (change(peft_type=...), "peft_type is None"),
    "no rank": (change(r=...), "r missing"),
    "no targets": (change(target_modules=None), "target_modules missing"),
    "rank of text": (change(r="8"), "r must be an integer from 1 to 65536, got '8'"),
    "rank zero": (change(r=0), "r must be an integer from 1 to 65536, got 0"),
    "pattern rank zero": (change(rank_pattern={"q_proj": 0}), "q_proj. is 0, not a number from 1"),
    "pattern of text": (change(rank_pattern={"q_proj": "x"}), "not a number"),
    "pattern not a table": (change(alpha_pattern=[1]), "alpha_pattern must be an object"),
    "bad pattern": (change(rank_pattern={"(": 2}), "not a regular expression"),
    "a pattern of two": (change(alpha_pattern={"model)|(z": 2}), "model.*z' is not a regular expression"),
    "bad regex": (change(target_modules="("), "not a regular expression"),
    "targets of numbers": (change(target_modules=[1]), "target_modules must be a list of at most 10000 texts"),
    "dropout of text": (change(lora_dropout="x"), "lora_dropout must be a number from 0 to 1, got .x."),
    "dropout one": (change(lora_dropout=1.0), "dropout"),
    "bias": (change(bias="all"), "bias='all'"),
    "lora bias": (change(lora_bias=True), "lora_bias=True"),
    "transposed": (change(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "layers beyond": (change(layers_to_transform=[1, 3]), r"layers_to_transform has 3, the model has layers 0..2"),
    "layers of text": (change(layers_to_transform=["1"]), "layers_to_transform must be integers"),
    "layers of a regex": (change(target_modules=".*q_proj", layers_to_transform=[1]), "goes with a list"),
    "layers under another name": (change(layers_pattern="blocks"), "layers_pattern='blocks'"),
    "norms to save": (change(modules_to_save=["norm"]), "modules_to_save norm: only embed_tokens, lm_head"),
    "no weights to save": (change(modules_to_save=["lm_head"]), "1 tensor missing: base_model.model.lm_head.weight"),
    "parameters": (change(target_parameters=["x"]), "target_parameters"),
    "trained tokens": (change(trainable_token_indices=[1]), "trainable_token_indices"),
    "several": (change(bias="all", lora_bias=True), "bias='all', lora_bias=True"),
    "pissa": (change(init_lora_weights="pissa_niter_4"), "pissa"),
    "a future option": (change(use_tomorrow=True), "use_tomorrow=True"),
    "module not there": (change(target_modules=["q_proj", "gate"]), "6 tensors unexpected: .*v_proj"),
    "module without tensors": (change(target_modules=["q_proj", "v_proj", "o_proj"]), "6 tensors missing: .*o_proj"),
    "layer not there": (change(target_modules=["layers.9.self_attn.q_proj"]), "layers.9.self_attn.q_proj selects noth"),
    "chatglm names": (change(target_modules=["query_key_value"]), "query_key_value selects nothing in this model"),
    "embeddings": (change(target_modules=["q_proj", "embed_tokens"]), "no module named embed_tokens"),
    "embeddings by regex": (change(target_modules=r".*(q_proj|embed_tokens)"), "only modules_to_save trains"),
    "regex for nothing": (change(target_modules="nothing"), "selects nothing"),
    "pickle": (without_weights, r"only pickles are there .adapter_model.bin."),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "needed, but it is missing"),
    "missing": (rewrite(lambda t: t.pop(KEY)), f"1 tensor missing: {KEY}"),
    "unexpected": (rewrite(lambda t: t.update(stranger=torch.ones(1))), "1 tensor unexpected: stranger"),
    "without prefix": (
        rewrite(lambda t: t.update({KEY.removeprefix("base_model.model."): t.pop(KEY)})), "missing: .*; 1 .* unexpected"
    ),
    "twice": (
        rewrite(lambda t: t.update({KEY.replace(".weight", ".default.weight"): t[KEY].clone()})), "are the same tensor"
    ),
    "transposed tensor": (
        rewrite(lambda t: t.update({KEY: t[KEY].T.contiguous()})), rf"{KEY} F32\[32, 4\] instead of \[4, 32\]"
    ),
    "another rank": (change(r=8), r"12 of wrong shape or dtype \(another base or rank\?\)"),
    "integers": (rewrite(lambda t: t.update({KEY: t[KEY].to(torch.int8)})), "I8"),
    "NaN": (rewrite(lambda t: t[KEY].view(-1)[3].fill_(float("nan"))), f"NaN or infinity in {KEY}"),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]),
        "not a readable safetensors file",
    ),
    "dora without magnitudes": (change(use_dora=True), "6 tensors missing: .*lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_in_one_line_and_the_model_is_as_before(base, copy, fault):
    damage, message = FAULTS[fault]
    damage(copy)
    model = nnx.clone(base)
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(model, copy)
    assert "\n" not in str(caught.value)
    assert "adapter" in str(caught.value)
    assert not has_lora(model)
    assert model.lora_config is None


def test_every_option_of_peft_is_understood_or_refused():
    """A new PEFT version may add keys; this list says which we have looked at."""
    from mentalglm_jax.checkpoints.peft_config import SWITCHED_OFF, UNDERSTOOD

    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= SWITCHED_OFF.keys() | UNDERSTOOD


def test_another_base_is_refused(hf, base, tmp_path):
    save_adapter(trained(base, target_modules=("lm_head",)), tmp_path / "ours")
    other = hf.to_jax(hf.model("glm", rope_theta=5e6))
    with pytest.raises(InputError, match=r"rope_theta 10000.0, this model has 5000000.0"):
        load_adapter(other, tmp_path / "ours")
    # ``load`` opens the base as the adapter was trained on it, whatever its config.json says.
    hf.model("glm", rope_theta=5e6).save_pretrained(tmp_path / "base")
    assert load(tmp_path / "base").config.rope_theta == 5e6
    assert load(tmp_path / "base", adapter=tmp_path / "ours").config.rope_theta == 10000.0
    with pytest.raises(InputError, match=r"rope_theta 10000.0, this model has 5000000.0"):
        load(tmp_path / "base", adapter=tmp_path / "ours", rope_theta=5e6)
    for changes, message in (
        ({"hidden_size": 64}, "trained on another base: with hidden_size 32; this model has 64"),
        ({"num_hidden_layers": 2, "head_dim": 16}, "num_hidden_layers 3, head_dim 8; this model has 2, 16"),
    ):
        with pytest.raises(InputError, match=message):
            load_adapter(hf.to_jax(hf.model("glm", **changes)), tmp_path / "ours")
    with pytest.raises(InputError, match="with model_type 'glm'; this model has glm4"):
        load_adapter(hf.to_jax(hf.model("glm4")), tmp_path / "ours")
    by_peft(hf, tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"another base or rank.*lora_A.weight F32\[4, 32\] instead of \[4, 64\]"):
        load_adapter(hf.to_jax(hf.model("glm", hidden_size=64)), tmp_path / "plain")
    by_peft(hf, tmp_path / "theirs", target_modules=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight differs from this model's"):
        load_adapter(hf.to_jax(hf.model("glm", seed=5)), tmp_path / "theirs")


def test_wrong_calls_are_refused(base, saved_by_peft, tmp_path):
    with pytest.raises(InputError, match="has no adapter"):
        save_adapter(base, tmp_path / "x")
    model = trained(base)
    with pytest.raises(InputError, match="already has an adapter"):
        load_adapter(model, saved_by_peft)
    with pytest.raises(InputError, match=r"format 'gguf' is not one of peft, vllm, vllm-split, llama.cpp, chatglm"):
        save_adapter(model, tmp_path / "x", format="gguf")
    with pytest.raises(InputError, match="no such adapter directory"):
        load_adapter(base, tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files \(notes.txt\)"):
        save_adapter(model, tmp_path / "full")
    model.layers.mlp.down_proj.adapter.scale.set_value(jnp.full((3,), 9.0))
    with pytest.raises(InputError, match=r"scale of layers.mlp.down_proj is 9.0 \(rank 4\), its LoraConfig says 1.5"):
        save_adapter(model, tmp_path / "x")


def test_a_diverged_adapter_is_not_written(base, tmp_path):
    model = trained(base)
    model.layers.mlp.down_proj.adapter.a.set_value(model.layers.mlp.down_proj.adapter.a[...].at[0, 0, 0].set(jnp.nan))
    with pytest.raises(RunError, match=r"NaN or infinity in .*down_proj"):
        save_adapter(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
