"""Checkpoint directories from strangers: `mentalglm convert` reads every file of one and runs nothing."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from mentalglm_jax.checkpoints.orbax_files import OrbaxCheckpoint
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import JSON_ATTACKS, called, edit, fifo, key_text, link, text, write_checkpoint

C, G, W, T = "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"
I = "model.safetensors.index.json"  # noqa: E741


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "whole")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sharded", 100_000)


def header(value: bytes | dict, data: bytes = b"", length: int | None = None):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return text(W, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def weight_map(change):
    def damage(directory: Path):
        value = json.loads((directory / I).read_text())
        value["weight_map"] = change(value["weight_map"])
        (directory / I).write_text(json.dumps(value))

    return damage


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ATTACKS = {
    **{f"config {name}": (text(C, raw), rf"config\.json.*{says}") for name, (raw, says) in JSON_ATTACKS.items()
       if name != "17 MB"},
    **{f"generation config {name}": (text(G, raw), rf"generation_config\.json.*{says}")
       for name, (raw, says) in JSON_ATTACKS.items() if name != "17 MB"},
    "config large": (text(C, "{" + " " * (2 << 20) + "}"), "too large"),
    "config a pipe": (fifo(C), "config.json: is not a file"),
    "config a link outside": (link(C), "config.json: is a link to a file outside"),
    "config a link to a device": (link(C, "/dev/zero"), "config.json: is a link to a file outside"),
    "config a loop of links": (link(C, C), "config.json: missing or unreadable"),
    "config 10^40 eos": (key_text(C, "eos_token_id", "1" + "0" * 40), "41 digits"),
    "config eos beyond int32": (edit(C, eos_token_id=2**31), "eos_token_id must be integers from 0"),
    "config eos below 0": (edit(C, eos_token_id=[-1]), "eos_token_id must be integers from 0"),
    "config eos text": (edit(C, eos_token_id="2"), "eos_token_id must be integers"),
    "config eos many": (edit(C, eos_token_id=[1] * 20_000), "eos_token_id must be integers"),
    "config pad beyond int32": (edit(C, pad_token_id=10**12), "pad_token_id must be an integer"),
    "config width 10^12": (edit(C, hidden_size=10**12), "hidden_size must be an integer from 1 to"),
    "config width true": (edit(C, hidden_size=True), "hidden_size must be an integer"),
    "config width 16.0": (edit(C, hidden_size=16.0), "hidden_size must be an integer"),
    "config layers 10^9": (edit(C, num_hidden_layers=10**9), "num_hidden_layers must be an integer"),
    "config layers 4000": (edit(C, num_hidden_layers=4000), "4000 layers, the files hold only"),
    "config heads 0": (edit(C, num_attention_heads=0), "num_attention_heads must be an integer"),
    "config vocabulary 10^7": (edit(C, vocab_size=10**7), "wrong shape"),
    "config eps 1e39": (edit(C, rms_norm_eps=1e39), "rms_norm_eps must be a finite number"),
    "config eps 1e-60": (
        edit(C, rms_norm_eps=1e-60, layernorm_epsilon=1e-60), "rms_norm_eps must be a positive number"
    ),
    "config eps of null": (edit(C, rms_norm_eps=None), "config.json: rms_norm_eps is null and must be a number"),
    "config positions of null": (edit(C, max_position_embeddings=None), "max_position_embeddings is null"),
    "config width of null": (edit(C, hidden_size=None), "hidden_size is null"),
    "config eps of an object": (edit(C, rms_norm_eps={}), "rms_norm_eps must be a finite number"),
    "config rope a list": (edit(C, rope_parameters=[1]), "rope_parameters must be an object"),
    "config rope 1e39": (edit(C, rope_parameters={"rope_theta": 1e39}), "rope_theta must be a finite number"),
    "config rope 0.5": (edit(C, rope_parameters={"rope_theta": 0.5}, rope_ratio=0.5e-4), "rope_theta must be above 1"),
    "config rotary nothing": (edit(C, rope_parameters={}, partial_rotary_factor=1e-9), "not even and up to"),
    "config yarn of text": (
        edit(C, rope_parameters={"rope_type": "yarn", "factor": "4"}), "factor must be a number"
    ),
    "config yarn 1e38": (edit(C, rope_parameters={"rope_type": "yarn", "factor": 1e38}), "positive number"),
    "config bias of text": (edit(C, attention_bias="yes"), "attention_bias must be true or false"),
    "config another model": (edit(C, model_type="olmo"), "'olmo' is not GLM-4"),
    "config model type with control characters": (edit(C, model_type="\x1b[31mred\n\x07"), r"\\x1b\[31mred\\n"),
    "config long model type": (edit(C, model_type="x" * 100_000), "is not GLM-4"),
    "generation eos 10^12": (edit(G, eos_token_id=10**12), "generation_config.json: eos_token_id must be integers"),
    "generation a pipe": (fifo(G), "generation_config.json: is not a file"),
    "generation a link outside": (link(G), "is a link to a file outside"),
    "tokenizer config a pipe": (fifo(T), "tokenizer_config.json: is not a file"),
    "tokenizer config deep": (text(T, "[" * 100_000), "tokenizer_config.json.*levels"),
    "tokenizer a pipe": (fifo("tokenizer.json"), "tokenizer.json: is not a file"),
    "template a link outside": (link("chat_template.jinja"), "is a link to a file outside"),
    "weights a pipe": (fifo(W), "model.safetensors: is not a file"),
    "weights a link outside": (link(W), "is a link to a file outside"),
    "weights empty": (text(W, b""), "not a? ?read"),
    "weights: header of 2^63 bytes": (header(b"{}", length=2**63), "a header of 9223372036854775808 bytes"),
    "weights: header of 20 MB": (header(b"{}", length=20 << 20), "a header of 20971520 bytes"),
    "weights: header deep": (header(b"[" * 100_000), "not JSON.*levels"),
    "weights: header of NaN": (header(b'{"w": NaN}'), "NaN is not a number"),
    "weights: header of 5,000 digits": (header(b'{"w": ' + b"9" * 5000 + b"}"), "5000 digits"),
    "weights: header not UTF-8": (header(b'{"\xff": 1}'), "not JSON"),
    "weights: surrogate in a name": (header(b'{"\\ud800": 1}'), "surrogate"),
    "weights: name twice": (header(b'{"w": 1, "w": 2}'), "'w' stands more than once"),
    "weights: header a number": (header(b"17"), "not a readable safetensors file"),
    "weights: shape lies": (header({"w": ONE | {"shape": [2]}}, b"0000"), "not a readable safetensors file"),
    "weights: shape overflows": (
        header({"w": ONE | {"shape": [2**62, 2**62]}}, b"0000"), "not a readable safetensors file"
    ),
    "weights: offsets lie": (header({"w": ONE | {"data_offsets": [0, 400]}}, b"0000"), "not a readable safetensors"),
    "weights: overlap": (header({"v": ONE, "w": ONE}, b"0000"), "not a readable safetensors file"),
    "weights: unknown dtype": (header({"w": ONE | {"dtype": "F33"}}, b"0000"), "not a readable safetensors file"),
    "weights: a stranger's tensor": (header({"w": ONE}, b"0000"), "the files hold only 1 tensors"),
    "weights: name with control characters": (header(b'{"\\u001b[31m\\n": 1, "\\u001b[31m\\n": 1}'), r"\\x1b\[31m\\n"),
    "only a pickle": (lambda d: (d / W).rename(d / "pytorch_model.bin"), "only pickled weights"),
    "no weights": (lambda d: (d / W).unlink(), "neither model.safetensors nor"),
}  # fmt: skip
SHARD_ATTACKS = {
    **{f"index {name}": (text(I, raw), rf"index\.json.*{says}") for name, (raw, says) in JSON_ATTACKS.items()
       if name != "17 MB"},
    "index leads up": (weight_map(lambda m: dict.fromkeys(m, "../whole/model.safetensors")), "outside the directory"),
    "index absolute": (weight_map(lambda m: dict.fromkeys(m, "/etc/passwd")), "outside the directory"),
    "index with a NUL": (weight_map(lambda m: dict.fromkeys(m, "a\0b")), "outside the directory"),
    "index of dots": (weight_map(lambda m: dict.fromkeys(m, "..")), "outside the directory"),
    "index of nothing": (weight_map(lambda m: dict.fromkeys(m, "")), "outside the directory"),
    "index of numbers": (weight_map(lambda m: dict.fromkeys(m, 3)), "weight_map must map"),
    "index a list": (weight_map(lambda m: [1]), "weight_map must map"),
    "index names a long file": (weight_map(lambda m: dict.fromkeys(m, "x" * 10_000)), "outside the directory"),
    "index a pipe": (fifo(I), "index.json: is not a file"),
    "shard a pipe": (lambda d: fifo(sorted(p.name for p in d.glob("model-*"))[0])(d), "is not a file"),
    "shard a link outside": (lambda d: link(sorted(p.name for p in d.glob("model-*"))[0])(d), "is a link to a file"),
    "index incomplete": (weight_map(lambda m: dict(list(m.items())[:-2])), "is not listed"),
    "index names a tensor that is not there": (
        weight_map(lambda m: m | {"x": next(iter(m.values()))}), "x is missing"
    ),
}  # fmt: skip


def attacked(source: Path, tmp_path: Path, damage, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    damage(copy)
    before = sorted(os.listdir(copy))
    outcome = run(["mentalglm", "convert", copy, tmp_path / "out", "--to", "chatglm"], capsys)
    assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(copy)) == before
    return outcome


@pytest.mark.parametrize("attack", ATTACKS)
def test_checkpoint(whole, tmp_path, capsys, attack):
    damage, says = ATTACKS[attack]
    refused(attacked(whole, tmp_path, damage, capsys), says)


@pytest.mark.parametrize("attack", SHARD_ATTACKS)
def test_shards(sharded, tmp_path, capsys, attack):
    damage, says = SHARD_ATTACKS[attack]
    refused(attacked(sharded, tmp_path, damage, capsys), says)


@pytest.mark.parametrize("name", ["_METADATA", "x", "a/b"])
def test_orbax_pipe(whole, tmp_path, name):
    directory = tmp_path / "orbax"
    (directory / "params" / "a").mkdir(parents=True)
    shutil.copy(whole / C, directory / C)
    (directory / "params" / "_METADATA").write_text("{}")
    fifo(f"params/{name}")(directory)
    refused(called(lambda: OrbaxCheckpoint(directory)), "is neither a file nor a directory")


@pytest.mark.parametrize("attack", JSON_ATTACKS)
def test_orbax_metadata(whole, tmp_path, attack):
    directory = tmp_path / "orbax"
    (directory / "params").mkdir(parents=True)
    shutil.copy(whole / C, directory / C)
    raw, says = JSON_ATTACKS[attack]
    text("params/_METADATA", raw)(directory)
    refused(called(lambda: OrbaxCheckpoint(directory)), rf"_METADATA.*{says}")


def test_the_undamaged_one_converts(whole, tmp_path, capsys):
    outcome = run(["mentalglm", "convert", whole, tmp_path / "out", "--to", "chatglm"], capsys)
    assert outcome.code == 0, outcome.err
