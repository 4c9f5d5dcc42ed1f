"""PEFT adapter directories both ways: PEFT's own saves load and agree, ours load in PEFT without a word."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.lora import (
    ALL_LINEAR,
    TARGETS,
    Adapter,
    LoraConfig,
    LoraParam,
    has_lora,
    linears,
    merge_lora,
    module_names,
    remove_lora,
)
from tests.mentalglm_jax.adapters import TOKENS, by_peft, same_adapter, trained

CASES = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": list(ALL_LINEAR), "use_rslora": True, "lora_alpha": 6.5},
    "dora": {"target_modules": list(ALL_LINEAR), "use_dora": True, "lora_dropout": 0.1},
    "regex": {"target_modules": r".*\.(q_proj|mlp\.down_proj)"},
    "endings": {"target_modules": ["self_attn.q_proj", "down_proj"]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.down_proj"]},
    "exclude regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*o_proj"},
    "patterns": {
        "target_modules": list(ALL_LINEAR), "rank_pattern": {"down_proj": 2, r"layers\.\d+\.self_attn\.[qk]_proj": 3},
        "alpha_pattern": {"mlp.gate_up_proj": 5, "o_proj": 2.5},
    },
    "head": {"target_modules": ["lm_head", "o_proj"], "use_dora": True, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "one layer, dora": {"target_modules": list(ALL_LINEAR), "layers_to_transform": 1, "use_dora": True},
    "regex for one layer": {"target_modules": r".*layers\.1\..*(q|gate_up)_proj", "exclude_modules": r".*\.mlp\..*"},
    "whole name": {"target_modules": ["model.layers.2.self_attn.v_proj", "0.mlp.down_proj"], "use_rslora": True},
    "some layers and the head": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    "a whole name of another layer": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1],
    },
    "ranks by layer": {
        "target_modules": ["q_proj", "o_proj"], "use_dora": True,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 5, r"layers\.2\.\w+\.o_proj": 7},
        "alpha_pattern": {r"layers\.0\..*": 1.5},
    },
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "everything": {
        "target_modules": list(ALL_LINEAR), "layers_to_transform": [1, 2], "exclude_modules": ["k_proj"],
        "use_dora": True, "use_rslora": True, "rank_pattern": {"2.self_attn.v_proj": 6},
        "modules_to_save": ["embed_tokens"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(hf):
    """The base model; a test that adds an adapter works on a clone."""
    return hf.to_jax(hf.model("glm"))


@pytest.fixture(scope="module")
def saved_by_peft(hf, tmp_path_factory):
    """One plain LoRA directory."""
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    by_peft(hf, directory, **CASES["lora"])
    return directory


@pytest.fixture
def copy(saved_by_peft, tmp_path):
    return Path(shutil.copytree(saved_by_peft, tmp_path / "adapter"))


MANY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


FOR_MANY_MODELS = {
    "the usual list": {"target_modules": MANY},
    "excluded elsewhere": {"target_modules": ["q_proj"], "exclude_modules": ["visual", "k_proj"]},
    "patterns for others": {"target_modules": MANY, "rank_pattern": {"gate_proj": 4, "q_proj": 2},
                            "alpha_pattern": {"up_proj": 1}},
    "no task": {"target_modules": ["q_proj"], "task_type": None},
    "eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match", "ignore:.init_lora_weights")
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules", "ignore:lora with eva initialization")
@pytest.mark.parametrize("case", FOR_MANY_MODELS)
def test_what_peft_passes_over_is_passed_over(hf, base, tmp_path, case):
    """Names that nothing in this model has, beside names that something has; and what says nothing of the weights."""
    model = by_peft(hf, tmp_path / "adapter", **FOR_MANY_MODELS[case])
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["auto_mapping"] is None) == (case != "no task")
    assert (raw["eva_config"] is None) == (case != "eva")
    ours = nnx.clone(base)
    load_adapter(ours, tmp_path / "adapter")
    assert hf.error(hf.run(ours, TOKENS), hf.logits(model, TOKENS)) <= 1e-5
    wrapped = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == adapted(ours)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_gives_the_same_logits(hf, base, tmp_path, case):
    model = by_peft(hf, tmp_path / "adapter", **CASES[case])
    ours = nnx.clone(base)
    load_adapter(ours, tmp_path / "adapter")
    reference = hf.logits(model, TOKENS)
    assert hf.error(hf.run(ours, TOKENS), reference) <= 1e-5
    assert hf.error(hf.run(base, TOKENS), reference) > 1e-2
    wrapped = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == adapted(ours)
    # and back: the same tensors under the same names, bit for bit
    save_adapter(ours, tmp_path / "again")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    before.pop("base_model.model.lm_head.base_layer.weight", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "adapter")


def adapted(model) -> set[str]:
    """transformers' names of the modules that have an adapter."""
    return {
        name for path, linear in linears(model) if isinstance(linear.adapter, Adapter)
        for name, rank in zip(module_names(path, 3), linear.adapter.ranks, strict=True) if rank
    }  # fmt: skip


def config_of(directory: Path) -> dict:
    """``adapter_config.json`` with lists in one order: PEFT keeps names in sets."""
    raw = json.loads((directory / "adapter_config.json").read_text())
    raw["layers_to_transform"] = np.ravel(raw["layers_to_transform"]).tolist()
    return {key: sorted(value) if isinstance(value, list) else value for key, value in raw.items()}


def goes_on_in_jax_and_back_in_peft(hf, base, directory, options) -> None:
    """Two steps here; PEFT reads each of them and agrees. Layers and ranks without an adapter stay without one."""
    by_peft(hf, directory / "0", **options)
    ours = nnx.clone(base)
    load_adapter(ours, directory / "0")
    before = adapted(ours)
    for step in ("1", "2"):
        graph, adapter, rest = nnx.split(ours, LoraParam, ...)

        def loss(adapter, graph=graph, rest=rest):
            return jax.nn.log_softmax(nnx.merge(graph, adapter, rest)(jnp.asarray(TOKENS)))[..., 5].mean()

        with jax.disable_jit():
            slopes = jax.grad(loss)(adapter)
        moved = jax.tree.map(lambda w, g: w + 0.02 * jnp.sign(g) + 0.1 * g, adapter, slopes)
        ours = nnx.merge(graph, moved, rest)
        save_adapter(ours, directory / step)
        # a missing or unexpected key is a warning there, which is an error here
        theirs = peft.PeftModel.from_pretrained(hf.model("glm"), directory / step)
        found = hf.run(ours, TOKENS)
        assert hf.error(found, hf.logits(theirs, TOKENS)) <= 1e-5
    assert adapted(ours) == before
    again = nnx.clone(base)
    load_adapter(again, directory / "2")  # the file has no unused ranks and layers: what is zero there is zero here
    assert hf.error(hf.run(again, TOKENS), found) == 0


@pytest.mark.parametrize("case", ["lora", "ranks by layer", "everything"])
def test_training_goes_on_in_jax_and_back_in_peft(hf, base, tmp_path, case):
    goes_on_in_jax_and_back_in_peft(hf, base, tmp_path, CASES[case])


OPTIONS = {
    "use_rslora": True,
    "use_dora": True,
    "rank_pattern": {"down_proj": 2, r"layers\.2\.self_attn\.q_proj": 7},
    "alpha_pattern": {"mlp.gate_up_proj": 5, "o_proj": 2.5},
    "layers_to_transform": [0, 2],
    "exclude_modules": ["k_proj", "mlp.down_proj"],
    "modules_to_save": ["lm_head", "embed_tokens"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # of a module that is excluded
@pytest.mark.parametrize("chosen", range(2 ** len(OPTIONS)))
def test_every_combination_of_options_goes_on(hf, base, tmp_path, chosen):
    """``chosen``: one bit per option. What PEFT itself refused would show as an error here."""
    options = {name: value for bit, (name, value) in enumerate(OPTIONS.items()) if chosen >> bit & 1}
    options["target_modules"] = list(ALL_LINEAR)
    goes_on_in_jax_and_back_in_peft(hf, base, tmp_path, options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "alpha": 2.5, "target_modules": ("v_proj", "q_proj")},
        {"use_dora": True, "dropout": 0.05, "target_modules": TARGETS},
        {"rank_pattern": (("q_proj", 8), ("down_proj", 2)), "alpha_pattern": (("o_proj", 1.0),)},
    ],
    ids=["lora", "rslora", "dora", "patterns"],
)
def test_what_we_save_loads_in_peft_and_back(hf, base, tmp_path, options):
    ours = trained(base, **options)
    save_adapter(ours, tmp_path / "adapter", base_model_name_or_path="some/base")
    loaded = peft.PeftModel.from_pretrained(hf.model("glm"), tmp_path / "adapter")  # missing keys warn: an error here
    theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[key], written[key]) for key in written)
    assert hf.error(hf.run(ours, TOKENS), hf.logits(loaded, TOKENS)) <= 1e-5
    again = nnx.clone(base)
    load_adapter(again, tmp_path / "adapter")
    same_adapter(again, ours)
    assert again.lora_config == ours.lora_config


def test_the_config_has_exactly_the_keys_of_peft(base, saved_by_peft, tmp_path):
    save_adapter(trained(base, target_modules=("q_proj", "v_proj")), tmp_path / "adapter")
    ours, theirs = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "adapter", saved_by_peft))
    assert ours.pop("target_modules") == ["q_proj", "v_proj"]
    assert set(theirs.pop("target_modules")) == {"q_proj", "v_proj"}
    assert ours == theirs
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


def test_the_model_card_names_the_base_and_the_limits(base, tmp_path):
    save_adapter(trained(base), tmp_path / "adapter", base_model_name_or_path="zai-org/glm-4-9b-hf")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: zai-org/glm-4-9b-hf" in card
    assert "not a diagnosis" in card
    assert "crisis" in card


def test_merged_export_equals_peft_merge(hf, base, tmp_path):
    ours = trained(base, use_dora=True, use_rslora=True, target_modules=TARGETS)
    save_adapter(ours, tmp_path / "adapter")
    save_pretrained(ours, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(hf.model("glm"), tmp_path / "adapter").merge_and_unload()
    merged = load(tmp_path / "merged")
    assert not has_lora(merged)
    assert hf.error(hf.run(merged, TOKENS), hf.logits(theirs, TOKENS)) <= 1e-5
    assert hf.error(hf.run(merged, TOKENS), hf.run(ours, TOKENS)) <= 1e-5
    for (_, exported), (_, wanted) in zip(linears(merged), linears(merge_lora(ours)), strict=True):
        np.testing.assert_array_equal(exported.kernel[...], wanted.kernel[...])
    save_pretrained(ours, tmp_path / "base", merge=False)
    plain = load(tmp_path / "base", adapter=tmp_path / "adapter")
    same_adapter(plain, ours)


def ulps_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """The largest number of bfloat16 steps between two tensors; 0 and -0 are the same place."""
    bits = [value.contiguous().view(torch.int16).to(torch.int32) for value in (one, other)]
    places = [torch.where(value < 0, -(value & 0x7FFF), value) for value in bits]
    return int((places[0] - places[1]).abs().max())


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}],
    ids=["lora", "rslora", "dora", "rsdora"],
)  # fmt: skip
def test_the_bfloat16_merge_is_within_one_ulp_of_peft(hf, tmp_path, options):
    """Of every weight, by the exported files; on all linears and lm_head, with a table trained whole."""
    model = hf.model("glm").bfloat16()
    ours = trained(hf.to_jax(model, param_dtype=jnp.bfloat16), target_modules=TARGETS,
                   modules_to_save=("embed_tokens",), **options)  # fmt: skip
    save_adapter(ours, tmp_path / "adapter")
    save_pretrained(ours, tmp_path / "merged")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == merged.keys()
    for name, wanted in merged.items():
        assert found[name].dtype == torch.bfloat16
        assert ulps_apart(found[name], wanted.bfloat16()) <= 1, name
        assert torch.equal(found[name], before[name]) == ("norm" in name or "bias" in name), name  # all others moved


def test_vllm_split_says_the_same_with_split_names(hf, base, tmp_path):
    ours = trained(base)
    save_adapter(ours, tmp_path / "split", format="vllm-split")
    config = json.loads((tmp_path / "split" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tensors = load_file(tmp_path / "split" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.{}_proj.lora_{}.weight"
    adapter = ours.layers.mlp.gate_up_proj.adapter
    delta = 1.5 * np.asarray(adapter.a[1] @ adapter.b[1]).T
    for half, rows in (("gate", slice(0, 48)), ("up", slice(48, 96))):
        found = 1.5 * tensors[name.format(half, "B")] @ tensors[name.format(half, "A")]
        np.testing.assert_allclose(found, delta[rows], rtol=1e-5, atol=1e-6)
    assert not any("gate_up" in key for key in tensors)
    again = nnx.clone(base)
    load_adapter(again, tmp_path / "split")
    same_adapter(again, ours)
    assert again.lora_config == ours.lora_config
    with pytest.raises(InputError, match="vLLM does not load DoRA"):
        save_adapter(trained(base, use_dora=True), tmp_path / "dora", format="vllm-split")


def test_adapters_may_be_stored_in_half_precision_and_with_the_adapter_name(base, copy):
    path = copy / "adapter_model.safetensors"
    tensors = {key.replace(".weight", ".default.weight"): value.bfloat16() for key, value in load_file(path).items()}
    save_file(tensors, path)
    ours = nnx.clone(base)
    load_adapter(ours, copy)
    found = ours.layers.self_attn.q_proj.adapter.b
    assert found.dtype == jnp.float32
    wanted = tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight"].float().numpy().T
    np.testing.assert_array_equal(found[2], wanted)


def test_a_minimal_config_is_enough(base, copy):
    raw = json.loads((copy / "adapter_config.json").read_text())
    minimal = {key: raw[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    (copy / "adapter_config.json").write_text(json.dumps(minimal))
    ours = nnx.clone(base)
    load_adapter(ours, copy)
    assert ours.lora_config == LoraConfig(
        rank=4, alpha=6.0, target_modules=tuple(raw["target_modules"]), rank_pattern=(), alpha_pattern=()
    )


def test_the_base_is_the_same_after_removing_the_adapter(base, saved_by_peft):
    model = nnx.clone(base)
    load_adapter(model, saved_by_peft)
    remove_lora(model)
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(base)), strict=True
    ):
        np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))
