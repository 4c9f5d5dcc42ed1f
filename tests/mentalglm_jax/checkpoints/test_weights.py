"""Checkpoints in and out: the table is a bijection, every layout loads bit for bit, transformers reads ours."""

import collections
import json
import os
import shutil
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

from mentalglm_jax.checkpoints import hf_files
from mentalglm_jax.checkpoints.directories import convert, load, save_pretrained
from mentalglm_jax.checkpoints.weights import RopeThetaWarning, inventory, parameter_shapes
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import GlmConfig
from tests.mentalglm_jax.weights import TOKENS, edit_json, same_tree, tensors_in, write_chatglm


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the small native checkpoint that a test may damage."""
    return Path(shutil.copytree(saved / "glm", tmp_path / "copy"))


# ---- the table ----


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    layout=st.sampled_from(["glm", "glm-qkv", "chatglm", "llama", "mistral", "qwen2", "glm4v"]),
    layers=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_names_and_parameters_map_one_to_one(layout, layers, groups, flags):
    bias, tied, sandwich = flags
    config = GlmConfig(
        vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=groups, head_dim=4, attention_bias=bias, tie_word_embeddings=tied,
        sandwich_norm=sandwich and layout in ("glm", "glm-qkv", "glm4v"),
    )  # fmt: skip
    shapes, tensors = parameter_shapes(config), inventory(config, layout)
    places = collections.Counter()
    for tensor in tensors.values():
        assert tensor.parts[0].start == 0
        assert tensor.parts[-1].stop == tensor.shape[0]
        assert all(one.stop == two.start for one, two in zip(tensor.parts, tensor.parts[1:], strict=False))
        for part in tensor.parts:
            shape = shapes[part.path] if part.layer is None else shapes[part.path][1:]
            rows, *rest = shape[::-1] if part.path.endswith("kernel") else shape
            assert (*tensor.shape[1:],) == (*rest,)
            assert part.first + part.stop - part.start <= rows
            assert part.head in (0, 4)
            places.update((part.path, part.layer, part.first + row) for row in range(part.stop - part.start))
    assert set(places.values()) == {1}
    expected = {
        (path, layer, row)
        for path, shape in shapes.items() for layer in (range(layers) if path.startswith("layers.") else [None])
        for row in range(shape[-1] if path.endswith("kernel") or len(shape) == 1 or "layers." in path else shape[0])
    }  # fmt: skip
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


# ---- meshes ----


def test_a_mesh_reads_only_what_its_devices_keep(hf, saved, tmp_path):
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
        for directory in reversed(sys.argv[1:]):
            whole = checkpoints.load(directory)
            reads.clear()
            model = checkpoints.load(directory, mesh=make_mesh(data=1, fsdp=4, tensor=2))
            for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, whole))):
                np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))
        kernel = model.layers.mlp.down_proj.kernel[...]
        assert kernel.shape == (3, 48, 32)
        assert {s.data.shape for s in kernel.addressable_shards} == {(3, 24, 8)}
        shapes = {shape for name, shape in reads if "down_proj" in name}
        assert shapes == {(8, 24)}, shapes
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    hf.variant("qwen2").save_pretrained(tmp_path / "qwen2")  # halves, and heads that end inside a device's part
    command = [sys.executable, "-c", textwrap.dedent(program), str(saved / "glm"), str(tmp_path / "qwen2")]
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
