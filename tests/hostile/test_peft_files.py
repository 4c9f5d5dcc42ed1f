"""Adapters as other trainers write them: both packages take them, and compute the same; or both refuse."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
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


def test_both_packages_have_one_table():
    assert peft_keys.TRAINING_ONLY == adapter.TRAINING_ONLY and peft_keys.BASE_COPIES == adapter.BASE_COPIES
