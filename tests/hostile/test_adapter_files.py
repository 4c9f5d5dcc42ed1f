"""PEFT adapter directories from strangers. The model has shapes and no arrays: whatever is refused, nothing was
allocated for it."""

import json
import re
import shutil
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mentalglm_jax.checkpoints.adapters import load_adapter
from mentalglm_jax.checkpoints.peft_config import to_peft
from mentalglm_jax.model.glm import abstract_model
from tests.hostile.attack import refused
from tests.hostile.foreign_files import (
    CONFIG,
    JSON_ATTACKS,
    LORA,
    called,
    edit,
    fifo,
    key_text,
    link,
    text,
    write_adapter,
)

A, W = "adapter_config.json", "adapter_model.safetensors"
MANY = {f"layers.{n}.q_proj": 2 for n in range(20_000)}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "whole")


@pytest.fixture(scope="module")
def model():
    return abstract_model(CONFIG)


def tensors(change, metadata=None):
    def damage(directory):
        found = load_file(directory / W)
        change(found)
        save_file(found, directory / W, metadata)

    return damage


ATTACKS = {
    **{f"config {name}": (text(A, raw), rf"adapter_config\.json.*{says}") for name, (raw, says) in JSON_ATTACKS.items()
       if name != "17 MB"},
    "config a pipe": (fifo(A), "adapter_config.json: is not a file"),
    "config a link outside": (link(A), "is a link to a file outside"),
    "weights a pipe": (fifo(W), "is not a file"),
    "weights a link outside": (link(W), "is a link to a file outside"),
    "alpha NaN": (key_text(A, "lora_alpha", "NaN"), "NaN is not a number"),
    "alpha 1e39": (key_text(A, "lora_alpha", "1e39"), "lora_alpha must be a finite number, got 1e.39"),
    "alpha -1e39": (key_text(A, "lora_alpha", "-1e39"), "lora_alpha must be a finite number"),
    "alpha 10^40": (key_text(A, "lora_alpha", "1" + "0" * 40), "41 digits"),
    "alpha true": (edit(A, lora_alpha=True), "lora_alpha must be a finite number, got True"),
    "rank 10^9": (edit(A, r=10**9), "r must be an integer from 1 to 65536"),
    "rank 60,000": (edit(A, r=60_000), r"\[2, 16\] instead of \[60000, 16\]"),
    "rank 2.5": (edit(A, r=2.5), "r must be an integer"),
    "rank of a pattern 60,000": (edit(A, rank_pattern={"q_proj": 60_000}), r"instead of \[60000, 16\]"),
    "rank of a pattern 10^9": (edit(A, rank_pattern={"q_proj": 10**9}), "rank_pattern for 'q_proj' is 1000000000"),
    "alpha of a pattern 1e39": (edit(A, alpha_pattern={"q_proj": 1e39}), "alpha_pattern for 'q_proj' is 1e.39"),
    "20,000 patterns": (edit(A, rank_pattern=MANY), "rank_pattern must be an object of at most 10000"),
    "20,000 names": (edit(A, target_modules=["q_proj"] * 20_000), "target_modules must be a list of at most 10000"),
    "dropout 1e300": (edit(A, lora_dropout=1e300), "lora_dropout must be a number from 0 to 1"),
    "layers 10^12": (edit(A, layers_to_transform=[10**12]), "layers_to_transform must be integers"),
    "layers -1": (edit(A, layers_to_transform=[-1]), "layers_to_transform has -1"),
    "an expression that never ends": (edit(A, target_modules=r"(([a-z_.0-9])+)+!"), "selects nothing"),
    "exclude: an expression that never ends": (
        edit(A, target_modules=".*none", exclude_modules=r"(.*.*.*.*.*.*)*!"), "selects nothing"
    ),
    "a pattern that never ends": (edit(A, r=3, rank_pattern={r"((a|aa|[a-z_.0-9])+)+!": 2}), r"instead of \[3, 16\]"),
    "an expression of 30,000 characters": (edit(A, target_modules="a" * 30_000), "too long for a regular expression"),
    "an expression that grows": (edit(A, target_modules="((a{100}){100}){100}"), "matched in bounded time"),
    "an expression of 9,000 groups": (edit(A, target_modules="(" * 9000 + ")" * 9000), "not a regular expression"),
    "look-ahead": (edit(A, target_modules=r"(?=.*q_proj).*"), "matched in bounded time"),
    "a back reference": (edit(A, target_modules=r"(.*)\1"), "matched in bounded time"),
    "(?i) inside": (edit(A, alpha_pattern={"(?i)Q_PROJ": 2}), "not a regular expression .global flags"),
    "does not compile": (edit(A, rank_pattern={"q_proj(": 2}), "not a regular expression"),
    "10^11 repetitions": (edit(A, target_modules="a{99999999999}"), "not a regular expression"),
    "control characters in a name": (edit(A, target_modules=["\x1b[31mred\n"]), r"\\x1b\[31mred\\n"),
    "control characters in a key": (edit(A, **{"\x07\n": True}), r"\\x07\\n=True"),
    "a long value": (edit(A, bias="x" * 100_000), "bias='x+"),
    "another kind": (edit(A, peft_type="x" * 100_000), "peft_type is 'x+"),
    "base of NaN": (tensors(lambda t: None, {"base": '{"vocab_size": NaN}'}), "NaN is not a number"),
    "base deep": (tensors(lambda t: None, {"base": "[" * 100_000}), "levels"),
    "base a number": (tensors(lambda t: None, {"base": "3"}), "says of its base is damaged"),
    "base of a long value": (tensors(lambda t: None, {"base": json.dumps({"vocab_size": "x" * 9999})}), "another base"),
    "theta of text": (tensors(lambda t: None, {"rope_theta": "\x1b[31m" + "x" * 9999}), "trained on a base with rope"),
    "a tensor missing": (tensors(lambda t: t.pop(KEY)), "1 tensor missing"),
    "a tensor too many": (tensors(lambda t: t.update({"x\n\x1b": np.ones(1)})), r"1 tensor unexpected: x\\n\\x1b"),
    "a tensor of integers": (tensors(lambda t: t.update({KEY: np.ones((2, 16), np.int8)})), "I8"),
    "a tensor transposed": (tensors(lambda t: t.update({KEY: np.ones((16, 2), np.float32)})), "wrong shape"),
    "only a pickle": (lambda d: (d / W).rename(d / "adapter_model.bin"), "only pickles are there"),
    "header of 2^60 bytes": (text(W, struct.pack("<Q", 1 << 60) + b"{}"), "a header of 1152921504606846976 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_adapter(adapter, model, tmp_path, attack):
    damage, says = ATTACKS[attack]
    shutil.copytree(adapter, tmp_path / "copy")
    damage(tmp_path / "copy")
    began = time.process_time()
    outcome = called(lambda: load_adapter(model, tmp_path / "copy"))
    assert time.process_time() - began < 5
    refused(outcome, says)
    assert model.lora_config is None


E, Q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"
TWO_NAMES = {
    "the rows of a part beside those of the whole": ({Q: (16, 2)}, {}),
    "embeddings": ({E: (2560, 16), "transformer.embedding.word_embeddings.weight": (2560, 16)},
                   {"modules_to_save": ["word_embeddings", "embed_tokens"]}),
}  # fmt: skip


@pytest.mark.parametrize("attack", TWO_NAMES)
def test_two_tensors_that_are_one_by_our_names(model, tmp_path, attack):
    """An adapter in the names of another layout, and a tensor that has ours already: which of them counts?"""
    more, changes = TWO_NAMES[attack]
    stem = "transformer.encoder.layers.{}.self_attention.query_key_value.lora_"
    shapes = {stem.format(n) + half: shape for n in (0, 1) for half, shape in
              (("A.weight", (2, 16)), ("B.weight", (32, 2)))} | more  # fmt: skip
    config = to_peft(LORA, None) | {"target_modules": ["query_key_value"]} | changes
    (tmp_path / A).write_text(json.dumps(config))
    found = {f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(found, tmp_path / W)
    said = rf"another tensor are both this model's {re.escape(next(iter(more)))}; one is right"
    refused(called(lambda: load_adapter(model, tmp_path)), said)
    assert model.lora_config is None
