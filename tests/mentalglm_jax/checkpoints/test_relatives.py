"""Directories of GLM's relatives in and out: bit for bit, and each mistake in the table seen by the parity check."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mentalglm_jax.checkpoints import directories, hf_files, vision, weights
from mentalglm_jax.checkpoints.directories import convert, load, save_pretrained
from mentalglm_jax.checkpoints.rows import half_split, interleaved
from mentalglm_jax.checkpoints.weights import Place
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.quantize import quantize_model
from tests.mentalglm_jax.checkpoints.conftest import RELATIVES
from tests.mentalglm_jax.weights import TOKENS, edit_json, same_tree, tensors_in

CAUSAL = [name for name in RELATIVES if not name.startswith("glm4")]
USUAL = ("llama-3", "llama-wide-heads", "qwen2", "glm4v")


def usually(names):
    """Those that are not ``USUAL`` are slow tests."""
    return [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", usually(RELATIVES))
def test_what_transformers_saves_loads_bit_for_bit(hf, relatives, name):
    same_tree(load(relatives / name), hf.to_jax(hf.variant(name)))


@pytest.mark.parametrize("name", usually(CAUSAL))
def test_what_we_save_loads_in_transformers_bit_for_bit(hf, tmp_path, name):
    """From parameters that no table of ours has touched."""
    reference = hf.variant(name)
    save_pretrained(hf.to_jax(reference), tmp_path / "out", max_shard_bytes=20_000)
    assert (tmp_path / "out" / hf_files.INDEX).exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is type(reference)
    assert not any(info.values()), info
    for (key, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    np.testing.assert_array_equal(hf.logits(model, TOKENS), hf.logits(reference, TOKENS))
    rope, wanted = (one.config.to_dict()["rope_parameters"] for one in (model, reference))
    assert {key: rope[key] for key in wanted} == wanted  # yarn's defaults are written out too
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(model.config, key) == getattr(reference.config, key)


def test_rows_of_heads_go_there_and_back():
    rows = np.arange(24).reshape(12, 2)
    assert interleaved(rows, 6)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    np.testing.assert_array_equal(half_split(interleaved(rows, 6), 6), rows)
    np.testing.assert_array_equal(interleaved(half_split(rows[:, 0], 4), 4), rows[:, 0])  # a bias


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("qwen2-tied-yarn", 300), pytest.param("llama", 700, marks=pytest.mark.slow),
     pytest.param("llama", 1 << 20, marks=pytest.mark.slow)],
)  # fmt: skip
def test_converting_there_and_back_keeps_every_bit(relatives, tmp_path, monkeypatch, name, chunk):
    """Through glm, and through the parameter tree, in blocks that hold no whole head, some, all."""
    monkeypatch.setattr(directories, "CHUNK_BYTES", chunk)
    source = relatives / name
    family = json.loads((source / "config.json").read_text())["model_type"]
    before = tensors_in(source)
    for way, back in (("glm", family), ("orbax", None), (None, None)):
        convert(source, tmp_path / "there", way)
        convert(tmp_path / "there", tmp_path / "back", back)
        after = tensors_in(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), way
        assert load(tmp_path / "back").config == load(source).config
        shutil.rmtree(tmp_path / "there")
        shutil.rmtree(tmp_path / "back")


@pytest.mark.parametrize("name", ["llama-3", "qwen2"])
def test_as_a_glm_directory_it_is_the_same_model(hf, relatives, tmp_path, name):
    convert(relatives / name, tmp_path / "glm", "glm")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", output_loading_info=True)
    assert type(model) is transformers.GlmForCausalLM
    assert not any(info.values()), info
    assert hf.error(hf.logits(model, TOKENS), hf.logits(hf.variant(name), TOKENS)) <= 1e-5
    same_tree(load(tmp_path / "glm"), load(relatives / name))


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        ("qwen2", "llama", "cannot express this model's attention_bias"),
        ("llama", "qwen2", "cannot express this model's attention_bias"),
        ("llama", "chatglm", "cannot express this model's .*partial_rotary_factor"),
        ("llama", "glm4v", "has a vision tower, which only a glm4v directory can give"),
        ("glm4v", "glm46v", "has a vision tower, which only a glm46v directory can give"),
        ("glm4v", "llama", "no place for|cannot express"),
    ],
)
def test_a_layout_that_cannot_hold_it_is_refused(relatives, tmp_path, name, layout, says):
    with pytest.raises(InputError, match=says):
        convert(relatives / name, tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


def test_llama_and_mistral_without_windows_are_each_other(relatives, tmp_path):
    convert(relatives / "llama", tmp_path / "out", "mistral")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"
    assert all(torch.equal(value, tensors_in(relatives / "llama")[key])
               for key, value in tensors_in(tmp_path / "out").items())  # fmt: skip


# ---- mutations ----

Q, K = "layers.self_attn.q_proj.", "layers.self_attn.k_proj."
GATE_UP = "layers.mlp.gate_up_proj.kernel"


def straight(path):
    return lambda table: {path: Place(table[path].names)}


MUTATIONS = {
    "nothing": lambda table: {},
    "q as it stands in the file": straight(Q + "kernel"),
    "k as it stands in the file": straight(K + "kernel"),
    "the bias of q as it stands in the file": straight(Q + "bias"),
    "the bias of k as it stands in the file": straight(K + "bias"),
    "v reordered too": lambda table: {path: Place(table[path].names, True) for path in table if ".v_proj." in path},
    "up before gate": lambda table: {GATE_UP: Place(table[GATE_UP].names[::-1])},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mistake_in_the_table_is_seen(hf, relatives, monkeypatch, mutation):
    table = weights.TABLES["qwen2"]
    monkeypatch.setitem(weights.TABLES, "llama", table | MUTATIONS[mutation](table))
    error = hf.error(hf.run(load(relatives / "qwen2"), TOKENS), hf.logits(hf.variant("qwen2"), TOKENS))
    assert error <= 1e-5 if mutation == "nothing" else error > 1e-2


# ---- loading ----


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_quantised_load_is_the_quantised_model(relatives, method):
    wanted = load(relatives / "qwen2")
    quantize_model(wanted, method)
    same_tree(load(relatives / "qwen2", quantize=method), wanted)


def test_bfloat16_loads_as_cast(relatives):
    wanted = load(relatives / "llama")
    found = load(relatives / "llama", dtype="bfloat16")
    pairs = zip(*(nnx.to_flat_state(nnx.state(model)) for model in (found, wanted)), strict=True)
    assert all(jnp.array_equal(one[...], other[...].astype(jnp.bfloat16)) for (_, one), (_, other) in pairs)


def test_loading_reads_every_tensor_once(relatives, monkeypatch):
    sizes = []
    original = hf_files.TensorFiles.read

    def read(self, name, *index):
        value = original(self, name, *index)
        sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(hf_files.TensorFiles, "read", read)
    load(relatives / "llama")
    assert max(sizes) == 96 * 32 * 4  # the embedding; a stack of gate_proj would be 3 * 48 * 32 * 4
    assert len(sizes) == 3 + 9 * 3


def copied(relatives, tmp_path, name="llama") -> Path:
    return Path(shutil.copytree(relatives / name, tmp_path / "copy"))


def rewritten(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(LAYER + "mlp.up_proj.weight"), "1 tensor missing: model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({LAYER + "self_attn.q_norm.weight": torch.ones(8)}), "unexpected: .*q_norm"),
        (lambda t: t.update({LAYER + "self_attn.o_proj.bias": torch.ones(32)}), "unexpected: .*o_proj.bias"),
        (lambda t: t.update({LAYER + "self_attn.q_proj.bias": torch.ones(32)}), "unexpected: .*q_proj.bias"),
        (lambda t: t.update({LAYER + "mlp.up_proj.weight": torch.ones(47, 32)}), r"wrong shape: .*\[47, 32\] instead"),
        (lambda t: t[LAYER + "mlp.up_proj.weight"].view(-1)[3].fill_(float("nan")), "NaN or infinity .*up_proj"),
        (lambda t: t.update({LAYER + "mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)}),
         r"is quantised \(tensor model.layers.1.mlp.up_proj.qweight"),
        (lambda t: t.update({LAYER + "mlp.up_proj.weight_scale_inv": torch.ones(2)}), "is quantised"),
        (lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}), None),  # Llama 2's
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(relatives, tmp_path, change, says):
    directory = copied(relatives, tmp_path)
    rewritten(directory, change)
    if says is None:
        same_tree(load(directory), load(relatives / "llama"))
        return
    with pytest.raises(InputError, match=says) as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert "copy" in str(caught.value)


def test_a_configuration_of_another_family_than_the_tensors_is_refused(relatives, saved, tmp_path):
    directory = copied(relatives, tmp_path)
    for kind, wrong in (("glm", "llama"), (None, "llama"), ("glm4v", "llama")):
        edit_json(directory / "config.json", model_type=kind)
        with pytest.raises(InputError, match=f"named as in a {wrong} directory|text_config is missing"):
            load(directory)
    (directory / "config.json").write_text((relatives / "qwen2" / "config.json").read_text())
    with pytest.raises(InputError, match=r"9 tensors missing: .*bias"):
        load(directory)


def test_a_gguf_is_named(relatives, tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        InputError, match=r"holds a GGUF \(model.Q4_K_M.gguf\).*mentalglm convert .*model.Q4_K_M.gguf DIR"
    ):
        load(tmp_path)


# ---- vision-language models: the text decoder ----


@pytest.fixture
def vlm(relatives, tmp_path):
    directory = copied(relatives, tmp_path, "glm4v")
    (directory / "preprocessor_config.json").write_text('{"image_processor_type": "Glm4vImageProcessor"}')
    return directory


def test_a_merged_export_keeps_the_vision_tower_bit_for_bit(hf, vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "CHUNK_BYTES", 100)
    model = load(vlm)
    kernel = model.layers.self_attn.q_proj.kernel
    kernel.set_value(kernel[...] + 0.1)
    save_pretrained(model, tmp_path / "out")
    before, after = tensors_in(vlm), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.language_model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)}
    assert sum(key.startswith("model.visual.") for key in before) > 10
    again, info = transformers.Glm4vForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert hf.error(hf.run(model, TOKENS), hf.logits(again, TOKENS)) <= 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((vlm / "config.json").read_text())
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_a_vision_language_model_converts_to_itself_and_to_its_text_decoder(hf, vlm, tmp_path):
    convert(vlm, tmp_path / "same", rope_theta=5e5)
    before, after = tensors_in(vlm), tensors_in(tmp_path / "same")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert load(tmp_path / "same").config.rope_theta == 5e5
    convert(vlm, tmp_path / "text", "glm")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert type(model) is transformers.Glm4ForCausalLM
    assert not any(info.values()), info
    assert hf.error(hf.logits(model, TOKENS), hf.logits(hf.variant("glm4v"), TOKENS)) <= 1e-5


@pytest.mark.parametrize("odd", [torch.tensor(1.0), torch.ones(2, dtype=torch.int64)], ids=["no array", "integers"])
def test_a_vision_tower_that_cannot_be_copied_is_refused(vlm, tmp_path, odd):
    save_file({**tensors_in(vlm), "model.visual.odd": odd}, vlm / "model.safetensors", {"format": "pt"})
    load(vlm)  # its text decoder is sound
    with pytest.raises(InputError, match=r"model\.visual\.odd of its vision tower cannot be copied"):
        convert(vlm, tmp_path / "out")


def test_a_vision_tower_that_is_gone_is_missed(vlm, tmp_path):
    model = load(vlm)
    vlm.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=r"the vision tower is copied from where the model was loaded: .*no such directory"
    ):
        save_pretrained(model, tmp_path / "out")
    save_pretrained(model, tmp_path / "text", layout="glm")
    assert not (tmp_path / "out").exists()
