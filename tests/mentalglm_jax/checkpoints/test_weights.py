"""Checkpoints in and out: the table is a bijection, every layout loads bit for bit, transformers reads what we write,
and what does not fit or comes from a stranger is refused with a reason."""

import collections
import contextlib
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from mentalglm_jax.checkpoints import directories as checkpoints
from mentalglm_jax.checkpoints import hf_files
from mentalglm_jax.checkpoints.directories import convert, load, save_pretrained
from mentalglm_jax.checkpoints.weights import RopeThetaWarning, inventory, parameter_shapes
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.model.glm import GlmConfig

TOKENS = np.random.default_rng(0).integers(4, 96, (2, 19)).astype(np.int32)


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    """Directories as transformers saves them."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("glm", "glm4", "edge", "tied"):
        hf.variant(name).save_pretrained(root / name)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the small native checkpoint that a test may damage."""
    return Path(shutil.copytree(saved / "glm", tmp_path / "copy"))


def same_tree(one, other):
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf[...], theirs[path][...], err_msg=str(path))


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def edit_json(path: Path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


# ---- the table ----


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    layout=st.sampled_from(["glm", "glm-qkv", "chatglm"]),
    layers=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_names_and_parameters_map_one_to_one(layout, layers, groups, flags):
    bias, tied, sandwich = flags
    config = GlmConfig(
        vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=groups, head_dim=4, attention_bias=bias, tie_word_embeddings=tied,
        sandwich_norm=sandwich and layout != "chatglm",
    )  # fmt: skip
    shapes, tensors = parameter_shapes(config), inventory(config, layout)
    places = collections.Counter()
    for tensor in tensors.values():
        assert tensor.parts[0].start == 0
        assert tensor.parts[-1].stop == tensor.shape[0]
        assert all(one.stop == two.start for one, two in zip(tensor.parts, tensor.parts[1:], strict=False))
        places.update((part.path, part.layer) for part in tensor.parts)
        for path, layer, start, stop in tensor.parts:
            shape = shapes[path] if layer is None else shapes[path][1:]
            assert (stop - start, *tensor.shape[1:]) == (shape[::-1] if path.endswith("kernel") else shape)
    assert set(places.values()) == {1}
    expected = {(p, i) for p in shapes for i in (range(layers) if p.startswith("layers.") else [None])}
    assert set(places) == expected


def test_a_layout_without_a_name_for_a_parameter_is_refused():
    with pytest.raises(InputError, match=r"chatglm.*post_mlp_layernorm"):
        inventory(GlmConfig(num_hidden_layers=1, sandwich_norm=True), "chatglm")


# ---- native checkpoints ----


@pytest.mark.parametrize("name", ["glm", "glm4", "edge", "tied"])
def test_what_transformers_saves_loads_bit_for_bit(hf, saved, name):
    same_tree(load(saved / name), hf.to_jax(hf.variant(name)))


@pytest.mark.parametrize(
    ("name", "limit"), [("glm", 5_000_000_000), ("glm4", 20_000), ("edge", 20_000), ("tied", 9_000)]
)
def test_what_we_save_loads_in_transformers_bit_for_bit(hf, saved, tmp_path, name, limit):
    save_pretrained(load(saved / name), tmp_path / "out", max_shard_bytes=limit)
    assert (tmp_path / "out" / hf_files.INDEX).exists() == (limit < 1e6)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    reference = hf.variant(name)
    for (key, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    np.testing.assert_array_equal(hf.logits(model, TOKENS), hf.logits(reference, TOKENS))
    assert model.config.to_dict()["rope_parameters"] == reference.config.to_dict()["rope_parameters"]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 2, 3]
    largest = max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert largest <= limit + 10_000  # headers
    if limit < 1e6:
        index = json.loads((tmp_path / "out" / hf_files.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(tmp_path / "out").values())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_float_source_is_cast_to_the_dtype_asked_for(copy, source, dtype):
    tensors = {name: value.to(source) for name, value in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    model = load(copy, dtype=dtype)
    assert model.dtype == jnp.dtype(dtype)
    for ours, name in (
        (model.layers.mlp.gate_up_proj.kernel[1].T, "model.layers.1.mlp.gate_up_proj.weight"),
        (model.embed_tokens.embedding[...], "model.embed_tokens.weight"),
        (model.layers.self_attn.k_proj.bias[2], "model.layers.2.self_attn.k_proj.bias"),
    ):
        assert ours.dtype == jnp.dtype(dtype)
        wanted = tensors[name].to(torch.bfloat16 if dtype == "bfloat16" else torch.float32).float()
        np.testing.assert_array_equal(np.asarray(ours, np.float32), wanted.numpy())


def test_bfloat16_survives_a_round_trip_and_dtype_casts_on_saving(saved, tmp_path):
    save_pretrained(load(saved / "glm"), tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    save_pretrained(load(tmp_path / "half", dtype="bfloat16"), tmp_path / "again")
    for name, value in tensors_in(tmp_path / "again").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, load_file(saved / "glm" / "model.safetensors")[name].bfloat16())


def test_tied_embeddings_may_be_stored_twice_but_must_agree(saved, tmp_path):
    shutil.copytree(saved / "tied", tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    same_tree(load(tmp_path / "tied"), load(saved / "tied"))
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(InputError, match=r"ties the embeddings.*lm_head.weight.*differ"):
        load(tmp_path / "tied")


def test_without_a_model_type_the_tensors_tell_glm_from_glm4(hf, saved, tmp_path):
    for name in ("glm", "glm4"):
        shutil.copytree(saved / name, tmp_path / name)
        edit_json(tmp_path / name / "config.json", model_type=..., architectures=...)
        same_tree(load(tmp_path / name), hf.to_jax(hf.variant(name)))


# ---- other layouts ----

CHATGLM_CONFIG = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False, "ffn_hidden_size": 48, "hidden_size": 32, "kv_channels": 8,
    "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 4, "num_layers": 3, "rope_ratio": 500, "original_rope": True, "padded_vocab_size": 96,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 131072, "tie_word_embeddings": False,
    "eos_token_id": [1, 2, 3], "pad_token_id": 0, "torch_dtype": "float32",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}  # fmt: skip


def write_chatglm(model, directory: Path):
    """The remote-code form of a native model, written by hand."""
    weights = model.state_dict()
    tensors = {
        "transformer.embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": weights["model.norm.weight"],
        "transformer.output_layer.weight": weights["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    for i in range(3):
        new, old = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        for ending in ("weight", "bias"):
            tensors[f"{new}.self_attention.query_key_value.{ending}"] = torch.cat(
                [weights[f"{old}.self_attn.{x}_proj.{ending}"] for x in "qkv"]
            )
        tensors[f"{new}.self_attention.dense.weight"] = weights[f"{old}.self_attn.o_proj.weight"]
        tensors[f"{new}.mlp.dense_h_to_4h.weight"] = weights[f"{old}.mlp.gate_up_proj.weight"]
        tensors[f"{new}.mlp.dense_4h_to_h.weight"] = weights[f"{old}.mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{new}.{norm}.weight"] = weights[f"{old}.{norm}.weight"]
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CHATGLM_CONFIG))


@pytest.fixture(scope="module")
def chatglm(hf, tmp_path_factory):
    """A chatglm directory and the native model it is."""
    model = hf.model("glm", rope_theta=5e6, max_position_embeddings=131072)
    directory = tmp_path_factory.mktemp("chatglm") / "model"
    write_chatglm(model, directory)
    return directory, model


def test_chatglm_loads_as_the_native_model(hf, chatglm):
    directory, model = chatglm
    ours = load(directory)
    assert ours.config.rope_theta == 5e6
    same_tree(ours, hf.to_jax(model))
    assert hf.error(hf.run(ours, TOKENS), hf.logits(model, TOKENS)) <= 1e-5


def test_native_config_with_chatglm_tensors_and_the_early_fused_form(hf, chatglm, copy):
    directory, model = chatglm
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, copy / "model.safetensors")  # names win over the config's layout
    same_tree(load(copy), hf.to_jax(model))
    native = model.state_dict()
    for i in range(3):
        for ending in ("weight", "bias"):
            parts = [native.pop(f"model.layers.{i}.self_attn.{x}_proj.{ending}") for x in "qkv"]
            native[f"model.layers.{i}.self_attn.qkv_proj.{ending}"] = torch.cat(parts)
    save_file(native, copy / "model.safetensors")
    same_tree(load(copy), hf.to_jax(model))


def test_converting_keeps_every_bit_and_writes_the_rope_base(hf, chatglm, tmp_path):
    directory, model = chatglm
    source = shutil.copytree(directory, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}, "padding_side": "left"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    convert(source, tmp_path / "native", max_shard_bytes=30_000)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(info.values())
    assert reloaded.config.rope_parameters["rope_theta"] == 5e6
    np.testing.assert_array_equal(hf.logits(reloaded, TOKENS), hf.logits(model, TOKENS))
    written = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())
    assert written == {"padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}
    assert not list((tmp_path / "native").glob("*.py"))
    convert(tmp_path / "native", tmp_path / "back", layout="chatglm")
    before, after = tensors_in(source), tensors_in(tmp_path / "back")
    before.pop("transformer.rotary_pos_emb.inv_freq")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    same_tree(load(tmp_path / "back"), load(source))
    assert load(tmp_path / "back").config == load(source).config
    save_pretrained(load(source), tmp_path / "saved", layout="chatglm")
    assert {n: t.tolist() for n, t in tensors_in(tmp_path / "saved").items()} == {
        n: t.tolist() for n, t in after.items()
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [("glm4", "chatglm.*post_mlp_layernorm|chatglm.*sandwich_norm"), ("edge", "partial_rotary_factor")],
)
def test_chatglm_cannot_hold_every_model(saved, tmp_path, name, reason):
    with pytest.raises(InputError, match=reason):
        convert(saved / name, tmp_path / "out", layout="chatglm")
    with pytest.raises(InputError, match=r"gguf.*glm, chatglm"):
        convert(saved / name, tmp_path / "out", layout="gguf")
    assert not list(tmp_path.iterdir())


# ---- the rope_theta trap ----


def test_the_lost_rope_base_is_honoured_with_a_warning(copy):
    edit_json(copy / "config.json", max_position_embeddings=131072)
    with pytest.warns(RopeThetaWarning, match=r"rope_theta is 10000.*trained with 5000000"):
        assert load(copy).config.rope_theta == 10000.0
    assert load(copy, rope_theta=5e6).config.rope_theta == 5e6  # warnings are errors here, so this also shows silence
    assert load(copy, rope_theta=10000.0).config.rope_theta == 10000.0
    edit_json(copy / "config.json", max_position_embeddings=8192)
    load(copy)
    edit_json(copy / "config.json", max_position_embeddings=1048576)
    with pytest.warns(RopeThetaWarning, match="100000000"):
        load(copy)


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
    """A million empty tensors, in files whose headers are each small enough."""
    entry, placed = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {}
    (directory / "model.safetensors").unlink()
    for shard in range(2):
        names = [f"{shard}.{i}" for i in range(60_000)]
        encoded = json.dumps(dict.fromkeys(names, entry)).encode()
        (directory / f"{shard}.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
        placed |= dict.fromkeys(names, f"{shard}.safetensors")
    placed |= {f"2.{i}": "0.safetensors" for i in range(1_000_000 - len(placed))}
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
        raw_header(json.dumps({"v": ONE, "w": ONE}).replace("v", "w").encode(), b"0000"), "the key .w. stands more than once"
    ),
    "shape lies": (raw_header({"w": ONE | {"shape": [2]}}, b"0000"), "not a readable safetensors file"),
    "offsets lie": (raw_header({"w": ONE | {"data_offsets": [0, 400]}}, b"0000"), "not a readable safetensors file"),
    "overlap": (raw_header({"v": ONE, "w": ONE}, b"0000"), "not a readable safetensors file"),
    "negative shape": (raw_header({"w": ONE | {"shape": [-1]}}, b"0000"), "not a readable safetensors file"),
    "unknown dtype": (raw_header({"w": ONE | {"dtype": "F33"}}, b"0000"), "not a readable safetensors file"),
    "many tensors": (many_tensors, "header of .* bytes is not that of a GLM-4"),
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
    "config not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "config.json:1: cannot be read as UTF-8"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "config incomplete": (config(hidden_size=...), "hidden_size.*missing"),
    "config of another model": (config(model_type="llama"), "llama.*is not glm"),
    "config types": (config(num_attention_heads="four"), "num_attention_heads must be an integer .*got .four."),
    "config eps": (config(rms_norm_eps="small"), "rms_norm_eps must be a finite number, got .small."),
    "config rope": (config(rope_parameters={"rope_type": "linear", "factor": 2}), "rope type 'linear'"),
    "config rope types": (config(rope_parameters=[1]), r"rope_parameters must be an object .*got \[1\]"),
    "config huge": (config(vocab_size=10**30), "an integer of 31 digits, beyond 64 bits"),
    "config wide": (config(vocab_size=10**7), "wrong shape: .*10000000"),
    "config deep": (config(num_hidden_layers=4000), "4000 layers, the files hold only"),
    "config deeper": (config(num_hidden_layers=10**9), "num_hidden_layers must be an integer from 1 to 4096"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_in_one_line(copy, fault):
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2500
    assert "copy" in text  # names the file


@hypothesis.settings(max_examples=80, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
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


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
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


@hypothesis.settings(max_examples=80, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data(), base=st.sampled_from(["glm", "chatglm"]))
def test_a_strange_config_never_crashes(copy, data, base):
    raw = json.loads((copy / "config.json").read_text()) if base == "glm" else dict(CHATGLM_CONFIG)
    raw |= data.draw(st.dictionaries(st.sampled_from(sorted(raw)), VALUES, min_size=1, max_size=3))
    checkpoint = object.__new__(hf_files.Checkpoint)
    checkpoint.directory, checkpoint.config = copy, raw
    checkpoint.tensors = hf_files.TensorFiles([copy / "model.safetensors"]).tensors
    with contextlib.suppress(InputError):
        checkpoints.check_tensors(checkpoint, checkpoints.read_config(checkpoint, 10000.0), base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize='int3' is not one of int8, int4, nf4"),
        ({"dtype": "float16"}, "overflows"),
        ({"dtype": "int8"}, "use float32 or bfloat16"),
        ({"dtype": "brain"}, "use float32 or bfloat16"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
    ],
)
def test_an_option_we_do_not_have_is_refused(saved, options, message):
    with pytest.raises(InputError, match=message):
        load(saved / "glm", **options)


# ---- places ----


def test_hub_ids_download_only_what_is_needed(saved, tmp_path, monkeypatch):
    """The Hub cache is a tree of links into its own blobs; those are allowed."""
    cache = tmp_path / "models--zai-org--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate((saved / "glm").iterdir()):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same_tree(load("zai-org/tiny"), load(saved / "glm"))
    assert asked == [("zai-org/tiny", ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"])]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no/such/directory", "no such directory"),
        ("nobody/nothing", "nobody/nothing: no such directory, and the Hub download failed"),
        ("../x", "no such directory"),
        ("", "missing|no such"),
    ],
)
def test_a_place_that_is_not_there(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(place)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_directory(saved, tmp_path):
    with pytest.raises(InputError, match="give the directory"):
        load(saved / "glm" / "config.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        save_pretrained(load(saved / "glm"), tmp_path / "file")


def test_saving_replaces_a_checkpoint_but_nothing_else(saved, copy, tmp_path):
    model = load(saved / "glm")
    save_pretrained(model, tmp_path / "out", max_shard_bytes=20_000)
    save_pretrained(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other files .thesis\.tex."):
        save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_what_was_there(saved, tmp_path, monkeypatch, error):
    model = load(saved / "glm")
    save_pretrained(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    calls = []

    def take(stack, layer, original=checkpoints._take):
        calls.append(layer)
        if len(calls) == 9:
            raise error
        return original(stack, layer)

    monkeypatch.setattr(checkpoints, "_take", take)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save_pretrained(model, tmp_path / "out")
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_tokenizer_files_are_copied_or_refused(saved, tmp_path):
    model = load(saved / "glm")
    with pytest.raises(InputError, match="no tokenizer files"):
        save_pretrained(model, tmp_path / "out", tokenizer=saved)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "out", tokenizer=tmp_path / "tok")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# ---- meshes ----


def test_a_mesh_reads_only_what_its_devices_keep(saved):
    """Eight fake devices in a child process: same values, parameters cut, and no read larger than one device's part."""
    program = """
        import sys
        import jax, numpy as np
        from flax import nnx
        from mentalglm_jax.checkpoints import directories as checkpoints, hf_files
        from mentalglm_jax.model.sharding import make_mesh

        reads = []
        original = hf_files.TensorFiles.read
        def read(self, name, *index):
            value = original(self, name, *index)
            reads.append((name, value.shape))
            return value
        hf_files.TensorFiles.read = read
        whole = checkpoints.load(sys.argv[1])
        reads.clear()
        model = checkpoints.load(sys.argv[1], mesh=make_mesh(data=1, fsdp=4, tensor=2))
        for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, whole))):
            np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))
        kernel = model.layers.mlp.down_proj.kernel[...]
        assert kernel.shape == (3, 48, 32)
        assert {s.data.shape for s in kernel.addressable_shards} == {(3, 24, 8)}
        shapes = {shape for name, shape in reads if "down_proj" in name}
        assert shapes == {(8, 24)}, shapes
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(program), str(saved / "glm")]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_loading_holds_one_layer_of_one_tensor(saved, monkeypatch):
    sizes = []
    original = hf_files.TensorFiles.read

    def read(self, name, *index):
        value = original(self, name, *index)
        sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(hf_files.TensorFiles, "read", read)
    model = load(saved / "glm")
    assert max(sizes) == 96 * 32 * 4  # the embedding; a stack of gate_up_proj would be 3 * 96 * 32 * 4
    assert len(sizes) == 3 + 11 * 3  # every tensor once
    assert jax.tree.all(jax.tree.map(lambda leaf: isinstance(leaf, jax.Array), nnx.state(model)))
