"""Adapters as other trainers write them: both packages take them, and compute the same; or both refuse."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mentalglm_jax as mg
from mentalglm_jax.checkpoints import peft_keys
from mentalglm_jax.errors import InputError
from probes.errors import ProbeInputError
from probes.models import adapter
from probes.models.load import load_model
from tests.hostile.probes_files import clean, edit, place  # noqa: F401

IDS = [[5, 80, 9, 33, 12]]


def _both(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is said of lost biases: tested where it is made
        ours = np.asarray(mg.load(folder / "model", adapter=folder / "adapter")(jnp.array(IDS)))
        model, _ = load_model(folder / "model", folder / "adapter", merge=False)
    with torch.no_grad():
        return ours, model(input_ids=torch.tensor(IDS)).logits.numpy()


def _weights(folder: Path, name: str, source: str, plus: float = 0.0) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    base = load_file(folder / "model" / "model.safetensors")[source]
    save_file(load_file(file) | {f"base_model.model.{name}": base + plus}, file, metadata={"format": "pt"})


def _config(**changes):
    return lambda folder: edit(folder / "adapter" / "adapter_config.json", **changes)


TAKEN = {
    "as PEFT writes it": lambda folder: None,
    "r is 4.0": _config(r=4.0),
    "ms-swift 2": _config(lora_dtype="float16", lorap_emb_lr=1e-6, lorap_lr_ratio=16.0),
    "biases lost by PEFT 0.13": _config(bias="lora_only"),
    "embeddings saved": lambda p: _weights(p, "model.embed_tokens.weight", "model.embed_tokens.weight"),
    "head saved": lambda p: _weights(p, "lm_head.weight", "lm_head.weight"),
    "lm_head.base_layer": lambda p: _weights(p, "lm_head.base_layer.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_taken_by_both_alike(kind, place):  # noqa: F811
    TAKEN[kind](place)
    ours, theirs = _both(place)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


REFUSED = {
    "embeddings of another base": (
        lambda p: _weights(p, "model.embed_tokens.weight", "model.embed_tokens.weight", 1.0), "differs from this"),
    "head of another base": (
        lambda p: _weights(p, "lm_head.base_layer.weight", "lm_head.weight", 1.0), "differs from this model"),
    "r is 4.5": (_config(r=4.5), r"\br\b"),
    "a key from the future": (_config(use_magic=True), "not supported: use_magic"),
    # Patterns that RE2, which matches them here, reads otherwise than PEFT's engine: another alpha, without a word.
    "up to n, a text to RE2": (_config(alpha_pattern={"q{,1}_proj": 99}), r"write \{0,n\} for \{,n\}"),
    "a class to RE2 only": (_config(alpha_pattern={"[[:lower:]]_proj": 99}), "regular expression .Possible nested set"),
    "an import by name": (_config(megatron_config={"a": 1}), "not supported: megatron_config"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_both(kind, place):  # noqa: F811
    damage, says = REFUSED[kind]
    damage(place)
    with pytest.raises(InputError, match=says):
        mg.load(place / "model", adapter=place / "adapter")
    with pytest.raises(ProbeInputError, match=says):
        load_model(place / "model", place / "adapter")


def test_embeddings_under_the_names_of_other_architectures(tmp_path):
    """``save_embedding_layers=True`` over a model whose embeddings are not called as Llama's."""
    config = transformers.GPTNeoXConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=16)  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "model")
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert any(name.endswith("embed_in.weight") for name in load_file(file))
    model, _ = load_model(tmp_path / "model", tmp_path / "adapter")
    with torch.no_grad():
        found, wanted = (m(input_ids=torch.tensor(IDS)).logits for m in (model, wrapped.eval()))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    tensors = load_file(file)
    save_file({k: v + 1.0 if k.endswith("embed_in.weight") else v for k, v in tensors.items()}, file)
    with pytest.raises(ProbeInputError, match=r"embed_in.weight differs from this model's"):
        load_model(tmp_path / "model", tmp_path / "adapter")


@pytest.mark.parametrize("plus", [0.0, 1.0], ids=["equal", "other"])
@pytest.mark.parametrize("name", ["embedding.word_embeddings", "output_layer"])
def test_embeddings_under_the_names_of_chatglm(name, plus, place, tmp_path):  # noqa: F811
    base = mg.load(place / "model", adapter=place / "adapter")
    mg.save_adapter(base, tmp_path / "theirs", format="chatglm")
    mg.save_pretrained(mg.load(place / "model"), tmp_path / "chatglm", layout="chatglm")
    model = mg.load(tmp_path / "chatglm")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    weight = load_file(tmp_path / "chatglm" / "model.safetensors")[f"transformer.{name}.weight"] + plus
    save_file(load_file(file) | {f"base_model.model.transformer.{name}.weight": weight}, file)
    if plus:
        with pytest.raises(InputError, match=f"{name}.weight differs from this model's"):
            mg.load_adapter(model, tmp_path / "theirs")
        return
    mg.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(np.asarray(model(jnp.array(IDS))), np.asarray(base(jnp.array(IDS))), atol=2e-4)


def test_both_packages_have_one_table():
    assert peft_keys.TRAINING_ONLY == adapter.TRAINING_ONLY and peft_keys.BASE_COPIES == adapter.BASE_COPIES
