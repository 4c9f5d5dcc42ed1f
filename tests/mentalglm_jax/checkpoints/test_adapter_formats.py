"""The same map under vLLM's, llama.cpp's and chatglm's names: exported, compared, read back."""

import json

import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.lora import ALL_LINEAR, linears
from tests.mentalglm_jax.adapters import TOKENS, edit_config, same_adapter, trained

NAME = "base_model.model.{}.lora_{}.weight"
LAYER = "transformer.encoder.layers.1."
PATTERNS = {"rank_pattern": (("q_proj", 8), (r"layers\.1\.self_attn\.v_proj", 2)),
            "alpha_pattern": ((r".*\.2\.mlp\..*", 1.0),)}  # fmt: skip


@pytest.fixture(scope="module")
def base(hf):
    return hf.to_jax(hf.model("glm"))


def read(directory) -> tuple[dict[str, np.ndarray], dict]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return load_file(directory / "adapter_model.safetensors"), config


def loaded(base, directory):
    model = nnx.clone(base)
    load_adapter(model, directory)
    return model


def test_llama_cpp_gets_every_factor_in_b(hf, base, tmp_path):
    """It computes alpha / rank from lora_alpha and the rows of A, and knows neither rsLoRA nor patterns."""
    ours = trained(base, use_rslora=True, **PATTERNS)
    save_adapter(ours, tmp_path / "folded", format="llama.cpp")
    tensors, config = read(tmp_path / "folded")
    assert config["use_rslora"] is False
    assert config["alpha_pattern"] == {}
    for path, linear in linears(ours):
        if linear.adapter is None:
            continue
        name = "model." + path.replace("layers", "layers.1")
        a, b = (tensors[NAME.format(name, letter)] for letter in "AB")
        found = config["lora_alpha"] / len(a) * b @ a
        np.testing.assert_allclose(found, np.asarray(linear.adapter.delta()[1]).T, rtol=1e-5, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(hf.model("glm"), tmp_path / "folded")
    assert hf.error(hf.logits(theirs, TOKENS), hf.run(ours, TOKENS)) <= 1e-5
    plain = trained(base)  # nothing to fold: nothing is changed
    for format in ("llama.cpp", "peft"):
        save_adapter(plain, tmp_path / format, format=format)
    one, other = (read(tmp_path / format) for format in ("llama.cpp", "peft"))
    assert one[1] == other[1]
    assert all(np.array_equal(one[0][key], other[0][key]) for key in other[0])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", ["rank_pattern", "alpha_pattern", "both"])
def test_vllm_gets_one_rank_and_one_scale(hf, base, tmp_path, rslora, patterns):
    """Its reader takes the factor of every module from r, lora_alpha and use_rslora; PEFT must see the same map."""
    chosen = PATTERNS if patterns == "both" else {patterns: PATTERNS[patterns]}
    ours = trained(base, use_rslora=rslora, **chosen)
    save_adapter(ours, tmp_path / "split", format="vllm-split")
    tensors, config = read(tmp_path / "split")
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["r"] == (4 if patterns == "alpha_pattern" else 8)
    assert config["use_rslora"] is False
    scale = config["lora_alpha"] / config["r"]
    assert scale == pytest.approx(3.0 if rslora else 1.5, rel=1e-6)  # the one of most modules, whose B is as it was
    for path, linear in linears(ours):
        if linear.adapter is None:
            continue
        for layer in (1, 2):
            name = "model." + path.replace("layers", f"layers.{layer}")
            names = [name.replace("gate_up", half) for half in ("gate", "up")] if "gate_up" in name else [name]
            pairs = [[tensors[NAME.format(each, letter)] for letter in "AB"] for each in names]
            assert all(len(a) == b.shape[1] == config["r"] for a, b in pairs)
            found = np.concatenate([scale * b @ a for a, b in pairs])
            np.testing.assert_allclose(found, np.asarray(linear.adapter.delta()[layer]).T, rtol=1e-5, atol=1e-6)
    assert hf.error(hf.run(loaded(base, tmp_path / "split"), TOKENS), hf.run(ours, TOKENS)) <= 1e-5
    attention = trained(base, use_rslora=rslora, target_modules=("q_proj", "v_proj", "down_proj"), **chosen)
    save_adapter(attention, tmp_path / "peft", format="vllm-split")
    theirs = peft.PeftModel.from_pretrained(hf.model("glm"), tmp_path / "peft")
    assert hf.error(hf.logits(theirs, TOKENS), hf.run(attention, TOKENS)) <= 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_chatglm_fuses_q_k_and_v_exactly_under_every_reading_of_the_factor(hf, base, tmp_path, rslora):
    """PEFT takes rank and alpha of a module from patterns, older vLLMs from r and lora_alpha, llama.cpp the rank from
    the rows of A; rsLoRA is known to the first two only. All must find the same map."""
    ours = trained(base, use_rslora=rslora, **PATTERNS)
    save_adapter(ours, tmp_path / "fused", format="chatglm")
    tensors, config = read(tmp_path / "fused")
    assert set(config["target_modules"]) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["r"] == 8 + 4 + 4  # the ranks of q, k and v where they are largest
    names = {"self_attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.gate_up_proj",
             "mlp.dense_4h_to_h": "mlp.down_proj", "self_attention.query_key_value": ""}  # fmt: skip
    for layer in range(3):
        for theirs, name in names.items():
            key = f"transformer.encoder.layers.{layer}.{theirs}"
            a, b = (tensors[NAME.format(key, letter)] for letter in "AB")
            assert len(a) == b.shape[1] == config["r"]
            parts = [name] if name else [f"self_attn.{each}_proj" for each in "qkv"]
            deltas = [dict(linears(ours))[f"layers.{part}"].adapter.delta()[layer].T for part in parts]
            found = config["lora_alpha"] / config["r"] * b @ a
            np.testing.assert_allclose(found, np.concatenate(deltas), rtol=1e-5, atol=1e-6)
    again = loaded(base, tmp_path / "fused")
    assert hf.error(hf.run(again, TOKENS), hf.run(ours, TOKENS)) <= 1e-5
    # fused once, all A are the same, and what was read is written bit for bit
    save_adapter(again, tmp_path / "again", format="chatglm")
    twice, _ = read(tmp_path / "again")
    assert twice.keys() == tensors.keys()
    assert all(np.array_equal(twice[key], tensors[key]) for key in tensors)


def test_chatglm_adapters_with_patterns_are_still_read(hf, base, tmp_path):
    """Written before the factor was folded in, or by PEFT: ranks and alphas by module."""
    ours = trained(base, target_modules=("q_proj", "k_proj", "v_proj", "down_proj"))
    save_adapter(ours, tmp_path / "fused", format="chatglm")
    tensors, config = read(tmp_path / "fused")
    assert (config["r"], config["lora_alpha"]) == (12, 18)
    for key in [key for key in tensors if "dense_4h_to_h" in key]:  # its own rank again, its factor elsewhere
        tensors[key] = np.ascontiguousarray(tensors[key][:4] if "lora_A" in key else tensors[key][:, :4] * 0.75)
    save_file(tensors, tmp_path / "fused" / "adapter_model.safetensors")
    edit_config(tmp_path / "fused", r=4, lora_alpha=8, rank_pattern={"query_key_value": 12},
                alpha_pattern={"query_key_value": 18})  # fmt: skip
    assert hf.error(hf.run(loaded(base, tmp_path / "fused"), TOKENS), hf.run(ours, TOKENS)) <= 1e-5


@pytest.mark.parametrize("format", ["chatglm", "vllm-split"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ("v_proj", "down_proj"), "layers_to_transform": (0, 2)},
        {"target_modules": ALL_LINEAR, "use_dora": True, "modules_to_save": ("embed_tokens", "lm_head")},
        {"target_modules": ALL_LINEAR, "rank_pattern": ((r".*\.1\..*", 3),)},
    ],
    ids=["some", "dora and saved", "ranks by layer"],
)
def test_other_names_are_read_back(hf, base, tmp_path, format, options):
    ours = trained(base, **options)
    if format == "vllm-split" and options.get("use_dora"):
        with pytest.raises(InputError, match="vLLM does not load DoRA"):
            save_adapter(ours, tmp_path / "x", format=format)
        return
    save_adapter(ours, tmp_path / "other", format=format)
    again = loaded(base, tmp_path / "other")
    if format == "vllm-split" and "rank_pattern" not in options:
        same_adapter(again, ours)
    assert hf.error(hf.run(again, TOKENS), hf.run(ours, TOKENS)) <= 1e-5
    assert hf.error(hf.run(base, TOKENS), hf.run(ours, TOKENS)) > 1e-3


def test_halves_with_different_a_become_one_of_both_ranks(hf, base, tmp_path):
    """An adapter trained on vLLM's split names: two A, twice the rank."""
    ours = trained(base, target_modules=("gate_up_proj",), rank=2)
    save_adapter(ours, tmp_path / "split", format="vllm-split")
    tensors, _ = read(tmp_path / "split")
    rng = np.random.default_rng(3)
    for key in [key for key in tensors if ".up_proj.lora_A" in key]:
        tensors[key] = rng.normal(0, 0.2, tensors[key].shape).astype(np.float32)
    save_file(tensors, tmp_path / "split" / "adapter_model.safetensors")
    adapter = loaded(base, tmp_path / "split").layers.mlp.gate_up_proj.adapter
    assert adapter.a.shape == (3, 32, 4)
    name = "model.layers.1.mlp.{}_proj"
    halves = [3.0 * tensors[NAME.format(name.format(half), "B")] @ tensors[NAME.format(name.format(half), "A")]
              for half in ("gate", "up")]  # fmt: skip
    np.testing.assert_allclose(adapter.delta()[1].T, np.concatenate(halves), rtol=1e-5, atol=1e-6)


def test_what_other_formats_cannot_say_is_refused(base, tmp_path):
    saved = trained(base, modules_to_save=("lm_head",), target_modules=("q_proj",))
    for format, name in (("vllm", "vLLM does not load"), ("vllm-split", "vLLM does not load"),
                         ("llama.cpp", "llama.cpp does not convert")):  # fmt: skip
        with pytest.raises(InputError, match=f"{name} modules_to_save"):
            save_adapter(saved, tmp_path / "x", format=format)
        with pytest.raises(InputError, match=f"{name} DoRA; .*merged model"):
            save_adapter(trained(base, use_dora=True), tmp_path / "x", format=format)
    head, wide = trained(base, target_modules=("q_proj", "lm_head")), trained(base, rank_pattern=(("k_proj", 600),))
    for format in ("vllm", "vllm-split"):
        with pytest.raises(InputError, match=r"vLLM does not load an adapter on lm_head; .*merged model"):
            save_adapter(head, tmp_path / "x", format=format)
        with pytest.raises(InputError, match=r"vLLM does not load rank 600, 512 is its largest; .*merged model"):
            save_adapter(wide, tmp_path / "x", format=format)
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="all of q, k and v, this adapter has it on v_proj"):
        save_adapter(trained(base, use_dora=True, target_modules=("v_proj",)), tmp_path / "x", format="chatglm")
    with pytest.raises(InputError, match="divides by alpha, which is 0"):
        save_adapter(trained(base, alpha=0.0), tmp_path / "x", format="llama.cpp")
    fused = trained(base, target_modules=("q_proj", "down_proj"))
    save_adapter(fused, tmp_path / "fused", format="chatglm")
    edit_config(tmp_path / "fused", r=3)
    with pytest.raises(InputError, match=r"dense_4h_to_h has A \[4, 48\] and B \[32, 4\], its rank is 3"):
        loaded(base, tmp_path / "fused")
    edit_config(tmp_path / "fused", r=4, target_modules=["query_key_value"])
    with pytest.raises(InputError, match=r"target_modules does not select .*dense_4h_to_h, which the weights adapt"):
        loaded(base, tmp_path / "fused")
    tensors, _ = read(tmp_path / "fused")
    assert not any("q_proj" in key for key in tensors)
