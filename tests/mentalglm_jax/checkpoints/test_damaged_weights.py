"""What does not fit or comes from a stranger is refused with a reason, and never crashes."""

import contextlib
import json
import shutil
import struct
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file

from mentalglm_jax.checkpoints import directories as checkpoints
from mentalglm_jax.checkpoints import hf_files
from mentalglm_jax.checkpoints.directories import load
from mentalglm_jax.errors import InputError
from tests.mentalglm_jax.weights import CHATGLM_CONFIG, edit_json

SHARED = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]  # the second as everywhere


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the small native checkpoint that a test may damage."""
    return Path(shutil.copytree(saved / "glm", tmp_path / "copy"))


# ---- what does not fit ----


def rewrite(change):
    """A fault that edits the tensors of a checkpoint."""

    def damage(directory: Path):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def raw_header(header, data=b""):
    def damage(directory: Path):
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)

    return damage


def file_bytes(change):
    def damage(directory: Path):
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def config(**changes):
    return lambda directory: edit_json(directory / "config.json", **changes)


def indexed(placed):
    """Two shards and the index ``placed`` makes of them."""

    def damage(directory: Path):
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        save_file({name: tensors[name] for name in names[:5]}, directory / "a.safetensors")
        save_file({name: tensors[name] for name in names[5:]}, directory / "b.safetensors")
        right = dict.fromkeys(names[:5], "a.safetensors") | dict.fromkeys(names[5:], "b.safetensors")
        (directory / hf_files.INDEX).write_text(json.dumps({"weight_map": placed(right)}))

    return damage


def duplicated(directory: Path):
    indexed(lambda right: right)(directory)
    tensors = load_file(directory / "b.safetensors") | load_file(directory / "a.safetensors")
    save_file(tensors, directory / "b.safetensors")


def only_pickle(directory: Path):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def linked_outside(directory: Path):
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    (directory / "model.safetensors").symlink_to(directory.parent / "elsewhere.safetensors")


def many_tensors(directory: Path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw_header({f"model.layers.0.some.tensor.with.a.long.name.{i}": entry for i in range(160_000)})(directory)


def many_in_shards(directory: Path):
    """Too many empty tensors, in files whose headers are each small enough."""
    entry, placed = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {}
    (directory / "model.safetensors").unlink()
    for shard in range(2):
        names = [f"{shard}.{i}" for i in range(60_000)]
        encoded = json.dumps(dict.fromkeys(names, entry)).encode()
        (directory / f"{shard}.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
        placed |= dict.fromkeys(names, f"{shard}.safetensors")
    placed |= {f"2.{i}": "0.safetensors" for i in range(30_000)}
    (directory / hf_files.INDEX).write_text(json.dumps({"weight_map": placed}))


LONG = "model.layers.1.mlp.down_proj.weight"


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


FAULTS = {
    "missing": (rewrite(lambda t: [t.pop(LONG), t.pop("lm_head.weight")]), f"2 tensors missing: {LONG}, lm_head"),
    "missing many": (rewrite(lambda t: [t.pop(n) for n in list(t)[:9]]), "9 tensors missing: .* and 5 more"),
    "unexpected": (rewrite(lambda t: t.update(stranger=torch.ones(2))), "1 tensor unexpected: stranger"),
    "a layer too many": (config(num_hidden_layers=2), r"unexpected: model\.layers\.2"),
    "a layer too few": (config(num_hidden_layers=4), r"missing: model\.layers\.3"),
    "wrong shape": (
        rewrite(lambda t: t.update({LONG: t[LONG].T.contiguous()})), rf"{LONG} \[48, 32\] instead of \[32, 48\]"
    ),
    "several faults": (
        rewrite(lambda t: t.update(stranger=t.pop(LONG), **{"lm_head.weight": torch.ones(3)})),
        rf"missing: {LONG}; 1 tensor unexpected: stranger; 1 tensor of wrong shape: lm_head",
    ),
    "wrong dtype": (rewrite(lambda t: t.update({LONG: t[LONG].to(torch.int8)})), f"wrong dtype: {LONG} I8"),
    "NaN": (rewrite(lambda t: t[LONG].view(-1)[5].fill_(float("nan"))), f"NaN or infinity.*{LONG}"),
    "infinity": (rewrite(lambda t: t["model.norm.weight"][3].fill_(float("inf"))), r"NaN or infinity.*model\.norm"),
    "extra norms": (config(model_type="glm4"), "missing: .*post_self_attn_layernorm"),
    "truncated": (file_bytes(lambda data: data[:-7]), "not a readable safetensors file.*download it again"),
    "cut in the header": (file_bytes(lambda data: data[:100]), "not a readable safetensors file"),
    "empty": (file_bytes(lambda data: b""), "not a readable safetensors file"),
    "bytes appended": (file_bytes(lambda data: data + b"more"), "not a readable safetensors file"),
    "no header": (file_bytes(lambda data: b"PK\x03\x04" + data), "header of"),
    "header length lies": (file_bytes(lambda data: struct.pack("<Q", 1 << 62) + data), "header of 4611686018427387904"),
    "not JSON": (raw_header(b"{{{{"), "not a readable safetensors file"),
    "nested JSON": (raw_header(b"[" * 100_000), "not a readable safetensors file"),
    "name twice": (
        raw_header(json.dumps({"v": ONE, "w": ONE}).replace("v", "w").encode(), b"0000"),
        "the key .w. stands more than once",
    ),
    "shape lies": (raw_header({"w": ONE | {"shape": [2]}}, b"0000"), "not a readable safetensors file"),
    "offsets lie": (raw_header({"w": ONE | {"data_offsets": [0, 400]}}, b"0000"), "not a readable safetensors file"),
    "overlap": (raw_header({"v": ONE, "w": ONE}, b"0000"), "not a readable safetensors file"),
    "negative shape": (raw_header({"w": ONE | {"shape": [-1]}}, b"0000"), "not a readable safetensors file"),
    "unknown dtype": (raw_header({"w": ONE | {"dtype": "F33"}}, b"0000"), "not a readable safetensors file"),
    "many tensors": (many_tensors, "header of .* bytes is not that of a language model"),
    "many tensors in shards": (many_in_shards, "more than 100000 tensors"),
    "header a number": (raw_header(b"17"), "not a readable safetensors file"),
    "only a pickle": (only_pickle, r"only pickled weights \(pytorch_model.bin\).*can run anything"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "link outside": (linked_outside, "link to a file outside"),
    "index leads outside": (
        indexed(lambda right: right | {LONG: "../copy/b.safetensors"}), r"'\.\./copy/b\.safetensors', which is outside"
    ),
    "index absolute": (indexed(lambda right: right | {LONG: "/etc/passwd"}), "'/etc/passwd', which is outside"),
    "index dots": (indexed(lambda right: right | {LONG: ".."}), "outside the directory"),
    "index names a missing shard": (indexed(lambda right: right | {LONG: "c.safetensors"}), "c.safetensors: missing"),
    "index in the wrong shard": (
        indexed(lambda right: right | {LONG: "a.safetensors"}), f"{LONG} is in b.safetensors"
    ),
    "index incomplete": (indexed(lambda right: {n: f for n, f in right.items() if n != LONG}), f"{LONG} is not listed"),
    "index names a missing tensor": (indexed(lambda right: right | {"x": "a.safetensors"}), "x is missing"),
    "index of numbers": (indexed(lambda right: {"x": 3}), "weight_map must map"),
    "index is a list": (indexed(lambda right: [1]), "weight_map must map"),
    "in two shards": (duplicated, "is also in a.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    "config not text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "config.json:1: cannot be read as UTF-8"
    ),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "config incomplete": (config(hidden_size=...), "hidden_size.*missing"),
    "config of another model": (config(model_type="olmo"), "olmo.*is not GLM-4 nor one of its relatives"),
    "config of a relative": (config(model_type="qwen2", rope_parameters={"rope_theta": 1e4}),
                             "says model_type 'qwen2', but .* named as in a glm directory"),
    "quantised by its config": (config(quantization_config={"quant_method": "gptq", "bits": 4}),
                                r"this checkpoint is quantised \(gptq, 4 bits\).*load the checkpoint it was made from"),
    "config types": (config(num_attention_heads="four"), "num_attention_heads must be an integer .*got .four."),
    "config eps": (config(rms_norm_eps="small"), "rms_norm_eps must be a finite number, got .small."),
    "config rope": (config(rope_parameters={"rope_type": "dynamic", "factor": 2}), "rope type 'dynamic'"),
    "config rope types": (config(rope_parameters=[1]), r"rope_parameters must be an object .*got \[1\]"),
    "config huge": (config(vocab_size=10**30), "an integer of 31 digits, beyond 64 bits"),
    "config wide": (config(vocab_size=10**7), "wrong shape: .*10000000"),
    "config deep": (config(num_hidden_layers=4000), "4000 layers, the files hold only"),
    "config deeper": (config(num_hidden_layers=10**9), "num_hidden_layers must be an integer from 1 to 4096"),
}  # fmt: skip


SLOWEST = "many tensors in shards"


@pytest.mark.parametrize("fault", [pytest.param(x, marks=pytest.mark.heavy if x == SLOWEST else ()) for x in FAULTS])
def test_refused_in_one_line(copy, fault):
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2500
    assert "copy" in text  # names the file


@hypothesis.settings(max_examples=80, suppress_health_check=SHARED)
@hypothesis.given(position=st.integers(0, 3000), patch=st.binary(min_size=1, max_size=9))
def test_a_damaged_header_never_crashes(saved, tmp_path, position, patch):
    data = bytearray((saved / "glm" / "model.safetensors").read_bytes())
    data[position : position + len(patch)] = patch
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with contextlib.suppress(InputError):
        tensors = hf_files.TensorFiles([file])
        for name, info in tensors.tensors.items():
            assert tensors.read(name).shape == info.shape


@hypothesis.settings(max_examples=60, suppress_health_check=SHARED)
@hypothesis.given(data=st.data())
def test_a_strange_header_or_index_never_crashes(copy, data):
    """Well-formed JSON whose values are anything."""
    path = copy / "model.safetensors"
    content = (copy.parent / "whole") if (copy.parent / "whole").exists() else path.rename(copy.parent / "whole")
    raw = content.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all"]))
    value = data.draw(VALUES)
    header[name] = value if field == "all" else {**header[name], field: value}
    raw_header(json.dumps(header).encode(), raw[8 + size :])(copy)
    placed = dict.fromkeys(header, "model.safetensors") | {name: data.draw(VALUES)}
    (copy / hf_files.INDEX).write_text(json.dumps({"weight_map": data.draw(st.just(placed) | VALUES)}))
    with contextlib.suppress(InputError):
        hf_files.Checkpoint(copy)
    path.rename(copy / "other.safetensors")
    with contextlib.suppress(InputError):
        hf_files.Checkpoint(copy)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@hypothesis.settings(max_examples=80, suppress_health_check=SHARED)
@hypothesis.given(data=st.data(), base=st.sampled_from(["glm", "chatglm"]))
def test_a_strange_config_never_crashes(copy, data, base):
    raw = json.loads((copy / "config.json").read_text()) if base == "glm" else dict(CHATGLM_CONFIG)
    raw |= data.draw(st.dictionaries(st.sampled_from(sorted(raw)), VALUES, min_size=1, max_size=3))
    checkpoint = object.__new__(hf_files.Checkpoint)
    checkpoint.directory, checkpoint.config = copy, raw
    checkpoint.tensors = hf_files.TensorFiles([copy / "model.safetensors"]).tensors
    with contextlib.suppress(InputError):
        checkpoints.check_tensors(checkpoint, checkpoints.read_config(checkpoint, 10000.0), base)
