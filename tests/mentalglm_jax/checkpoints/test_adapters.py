"""PEFT adapter directories both ways: PEFT's own saves load and agree, ours load in PEFT without a word, and what does
not fit is refused by name."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

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
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.model.lora import (
    ALL_LINEAR,
    TARGETS,
    Adapter,
    LoraConfig,
    LoraParam,
    Replacement,
    add_lora,
    has_lora,
    linears,
    merge_lora,
    module_names,
    remove_lora,
)

TOKENS = np.random.default_rng(0).integers(4, 96, (2, 19)).astype(np.int32)
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


def randomise(model, seed=1):
    """A and B of a PEFT model at a size where every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.normal_(0, 0.2, generator=generator)
            elif "modules_to_save" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            elif "magnitude" in name:
                weight.mul_(1 + 0.3 * torch.rand(weight.shape, generator=generator))
    return model.eval()


def by_peft(hf, directory, **options) -> Any:
    """A PEFT model with random weights, and its directory."""
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options
    model = randomise(peft.get_peft_model(hf.model("glm"), peft.LoraConfig(**options)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(directory)
    return model


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


def trained(base, seed=0, **options):
    """Our model with an adapter of random values."""
    model = nnx.clone(base)
    add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6.0} | options), nnx.Rngs(0))
    rng = np.random.default_rng(seed)

    def normal(shape):
        return jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)

    for _, linear in linears(model):
        adapter = linear.adapter
        if isinstance(adapter, Adapter):
            used = np.arange(max(adapter.ranks)) < np.asarray(adapter.ranks)[:, None]  # the rest is zero and stays so
            used = jnp.asarray(used if adapter.a.ndim == 3 else used[0])
            adapter.a.set_value(normal(adapter.a.shape) * used[..., None, :])
            adapter.b.set_value(normal(adapter.b.shape) * used[..., None])
            if adapter.magnitude is not None:
                scale = jnp.asarray(1 + 0.3 * rng.random(adapter.magnitude.shape), jnp.float32)
                adapter.magnitude.set_value(adapter.magnitude[...] * scale)
    for module in (model.embed_tokens, model.lm_head):
        if isinstance(module.adapter, Replacement):
            module.adapter.weight.set_value(module.adapter.weight[...] + normal(module.adapter.weight.shape))
    return model


def same_adapter(one, other):
    for (path, ours), (_, theirs) in zip(linears(one), linears(other), strict=True):
        assert (ours.adapter is None) == (theirs.adapter is None), path
        if ours.adapter is not None:
            states = [jax.tree.leaves_with_path(nnx.state(linear.adapter)) for linear in (ours, theirs)]
            for (where, found), (_, wanted) in zip(*states, strict=True):
                np.testing.assert_array_equal(found, wanted, err_msg=f"{path} {where}")


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


def edit_config(directory: Path, **changes):
    path = directory / "adapter_config.json"
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


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


def change(**changes):
    return lambda directory: edit_config(directory, **changes)


def rewrite(function):
    def damage(directory: Path):
        tensors = load_file(directory / "adapter_model.safetensors")
        function(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    return damage


def without_weights(directory: Path):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
FAULTS = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: missing"),
    "config not JSON": (lambda d: (d / "adapter_config.json").write_text("r: 8"), "not JSON"),
    "not LoRA": (change(peft_type="IA3"), "peft_type is 'IA3'"),
    "no type": (change(peft_type=...), "peft_type is None"),
    "no rank": (change(r=...), "r missing"),
    "no targets": (change(target_modules=None), "target_modules missing"),
    "rank of text": (change(r="8"), "r must be an integer from 1 to 65536, got '8'"),
    "rank zero": (change(r=0), "r must be an integer from 1 to 65536, got 0"),
    "pattern rank zero": (change(rank_pattern={"q_proj": 0}), "q_proj. is 0, not a number from 1"),
    "pattern of text": (change(rank_pattern={"q_proj": "x"}), "not a number"),
    "pattern not a table": (change(alpha_pattern=[1]), "alpha_pattern must be an object"),
    "bad pattern": (change(rank_pattern={"(": 2}), "not a regular expression"),
    "bad regex": (change(target_modules="("), "not a regular expression"),
    "targets of numbers": (change(target_modules=[1]), "target_modules must be a list of at most 10000 texts"),
    "dropout of text": (change(lora_dropout="x"), "lora_dropout must be a number from 0 to 1, got .x."),
    "dropout one": (change(lora_dropout=1.0), "dropout"),
    "bias": (change(bias="all"), "bias='all'"),
    "lora bias": (change(lora_bias=True), "lora_bias=True"),
    "transposed": (change(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "layers beyond": (change(layers_to_transform=[1, 3]), r"layers_to_transform has 3, the model has layers 0..2"),
    "layers of text": (change(layers_to_transform=["1"]), "layers_to_transform must be integers"),
    "layers of a regex": (change(target_modules=".*q_proj", layers_to_transform=[1]), "goes with a list"),
    "layers under another name": (change(layers_pattern="blocks"), "layers_pattern='blocks'"),
    "norms to save": (change(modules_to_save=["norm"]), "modules_to_save norm: only embed_tokens, lm_head"),
    "no weights to save": (change(modules_to_save=["lm_head"]), "1 tensor missing: base_model.model.lm_head.weight"),
    "parameters": (change(target_parameters=["x"]), "target_parameters"),
    "trained tokens": (change(trainable_token_indices=[1]), "trainable_token_indices"),
    "several": (change(bias="all", lora_bias=True), "bias='all', lora_bias=True"),
    "pissa": (change(init_lora_weights="pissa_niter_4"), "pissa"),
    "a future option": (change(use_tomorrow=True), "use_tomorrow=True"),
    "module not there": (change(target_modules=["q_proj", "gate"]), "6 tensors unexpected: .*v_proj"),
    "module without tensors": (change(target_modules=["q_proj", "v_proj", "o_proj"]), "6 tensors missing: .*o_proj"),
    "layer not there": (change(target_modules=["layers.9.self_attn.q_proj"]), "layers.9.self_attn.q_proj selects noth"),
    "chatglm names": (change(target_modules=["query_key_value"]), "query_key_value selects nothing in this model"),
    "embeddings": (change(target_modules=["q_proj", "embed_tokens"]), "no module named embed_tokens"),
    "embeddings by regex": (change(target_modules=r".*(q_proj|embed_tokens)"), "only modules_to_save trains"),
    "regex for nothing": (change(target_modules="nothing"), "selects nothing"),
    "pickle": (without_weights, r"only pickles are there .adapter_model.bin."),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "needed, but it is missing"),
    "missing": (rewrite(lambda t: t.pop(KEY)), f"1 tensor missing: {KEY}"),
    "unexpected": (rewrite(lambda t: t.update(stranger=torch.ones(1))), "1 tensor unexpected: stranger"),
    "without prefix": (
        rewrite(lambda t: t.update({KEY.removeprefix("base_model.model."): t.pop(KEY)})), "missing: .*; 1 .* unexpected"
    ),
    "twice": (
        rewrite(lambda t: t.update({KEY.replace(".weight", ".default.weight"): t[KEY].clone()})), "are the same tensor"
    ),
    "transposed tensor": (
        rewrite(lambda t: t.update({KEY: t[KEY].T.contiguous()})), rf"{KEY} F32\[32, 4\] instead of \[4, 32\]"
    ),
    "another rank": (change(r=8), r"12 of wrong shape or dtype \(another base or rank\?\)"),
    "integers": (rewrite(lambda t: t.update({KEY: t[KEY].to(torch.int8)})), "I8"),
    "NaN": (rewrite(lambda t: t[KEY].view(-1)[3].fill_(float("nan"))), f"NaN or infinity in {KEY}"),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]),
        "not a readable safetensors file",
    ),
    "dora without magnitudes": (change(use_dora=True), "6 tensors missing: .*lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_in_one_line_and_the_model_is_as_before(base, copy, fault):
    damage, message = FAULTS[fault]
    damage(copy)
    model = nnx.clone(base)
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(model, copy)
    assert "\n" not in str(caught.value)
    assert "adapter" in str(caught.value)
    assert not has_lora(model)
    assert model.lora_config is None


def test_every_option_of_peft_is_understood_or_refused():
    """A new PEFT version may add keys; this list says which we have looked at."""
    from mentalglm_jax.checkpoints.peft_config import SWITCHED_OFF, UNDERSTOOD

    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= SWITCHED_OFF.keys() | UNDERSTOOD


def test_another_base_is_refused(hf, base, tmp_path):
    save_adapter(trained(base, target_modules=("lm_head",)), tmp_path / "ours")
    other = hf.to_jax(hf.model("glm", rope_theta=5e6))
    with pytest.raises(InputError, match=r"rope_theta 10000.0, this model has 5000000.0"):
        load_adapter(other, tmp_path / "ours")
    # ``load`` opens the base as the adapter was trained on it, whatever its config.json says.
    hf.model("glm", rope_theta=5e6).save_pretrained(tmp_path / "base")
    assert load(tmp_path / "base").config.rope_theta == 5e6
    assert load(tmp_path / "base", adapter=tmp_path / "ours").config.rope_theta == 10000.0
    with pytest.raises(InputError, match=r"rope_theta 10000.0, this model has 5000000.0"):
        load(tmp_path / "base", adapter=tmp_path / "ours", rope_theta=5e6)
    for changes, message in (
        ({"hidden_size": 64}, "trained on another base: with hidden_size 32; this model has 64"),
        ({"num_hidden_layers": 2, "head_dim": 16}, "num_hidden_layers 3, head_dim 8; this model has 2, 16"),
    ):
        with pytest.raises(InputError, match=message):
            load_adapter(hf.to_jax(hf.model("glm", **changes)), tmp_path / "ours")
    with pytest.raises(InputError, match="with model_type glm; this model has glm4"):
        load_adapter(hf.to_jax(hf.model("glm4")), tmp_path / "ours")
    by_peft(hf, tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"another base or rank.*lora_A.weight F32\[4, 32\] instead of \[4, 64\]"):
        load_adapter(hf.to_jax(hf.model("glm", hidden_size=64)), tmp_path / "plain")
    by_peft(hf, tmp_path / "theirs", target_modules=["lm_head"])
    with pytest.raises(InputError, match="differs from this model's lm_head"):
        load_adapter(hf.to_jax(hf.model("glm", seed=5)), tmp_path / "theirs")


def test_wrong_calls_are_refused(base, saved_by_peft, tmp_path):
    with pytest.raises(InputError, match="has no adapter"):
        save_adapter(base, tmp_path / "x")
    model = trained(base)
    with pytest.raises(InputError, match="already has an adapter"):
        load_adapter(model, saved_by_peft)
    with pytest.raises(InputError, match=r"format 'gguf' is not one of peft, vllm-split, llama.cpp, chatglm"):
        save_adapter(model, tmp_path / "x", format="gguf")
    with pytest.raises(InputError, match="no such adapter directory"):
        load_adapter(base, tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files \(notes.txt\)"):
        save_adapter(model, tmp_path / "full")
    model.layers.mlp.down_proj.adapter.scale.set_value(jnp.full((3,), 9.0))
    with pytest.raises(InputError, match=r"scale of layers.mlp.down_proj is 9.0 \(rank 4\), its LoraConfig says 1.5"):
        save_adapter(model, tmp_path / "x")


def test_a_diverged_adapter_is_not_written(base, tmp_path):
    model = trained(base)
    model.layers.mlp.down_proj.adapter.a.set_value(model.layers.mlp.down_proj.adapter.a[...].at[0, 0, 0].set(jnp.nan))
    with pytest.raises(RunError, match=r"NaN or infinity in .*down_proj"):
        save_adapter(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_base_is_the_same_after_removing_the_adapter(base, saved_by_peft):
    model = nnx.clone(base)
    load_adapter(model, saved_by_peft)
    remove_lora(model)
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(base)), strict=True
    ):
        np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))
