"""PEFT adapters of GLM's relatives, under their own names: read, trained on, written, merged, and each mistake seen."""

import json

import jax
import jax.numpy as jnp
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from mentalglm_jax.checkpoints import adapter_formats
from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.checkpoints.directories import convert, load, save_pretrained
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.decode import generate_ids
from mentalglm_jax.model.lora import TARGETS, LoraConfig, LoraParam, add_lora, has_lora, merge_lora
from mentalglm_jax.train.loop import train
from tests.mentalglm_jax.adapters import TOKENS, by_peft, edit_config, same_adapter, trained
from tests.mentalglm_jax.tiny import tiny_config, tiny_examples

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ALL, "use_rslora": True, "lora_alpha": 6.5},
    "dora": {"target_modules": ALL, "use_dora": True, "lora_dropout": 0.1},
    "gate alone": {"target_modules": ["gate_proj", "k_proj"]},
    "regex": {"target_modules": r".*\.(k_proj|mlp\.up_proj)"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.down_proj"]},
    "patterns": {
        "target_modules": ALL, "rank_pattern": {"up_proj": 2, r"layers\.\d+\.self_attn\.[qk]_proj": 3},
        "alpha_pattern": {"mlp.gate_proj": 5, "o_proj": 2.5},
    },
    "rslora patterns": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"gate_proj": 7},
                        "alpha_pattern": {"up_proj": 3}},
    "head": {"target_modules": ["lm_head", "q_proj"], "use_dora": True, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer, dora": {"target_modules": ALL, "layers_to_transform": 1, "use_dora": True},
    "whole name": {"target_modules": ["model.layers.2.self_attn.k_proj", "0.mlp.gate_proj"]},
    "modules to save": {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "everything": {
        "target_modules": ALL, "layers_to_transform": [1, 2], "exclude_modules": ["v_proj"], "use_dora": True,
        "use_rslora": True, "rank_pattern": {"2.self_attn.k_proj": 6, "1.mlp.up_proj": 3},
        "modules_to_save": ["embed_tokens"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(hf):
    """Base models; a test that adds an adapter works on a clone."""
    return {name: hf.to_jax(hf.variant(name)) for name in ("llama", "qwen2", "glm4v", "llama-3")}


def wrapped(model) -> set[str]:
    return {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}


def cases(table, usual):
    """(case, variant) of all, where those that are not ``usual`` are slow tests."""
    return [
        pytest.param(case, variant, marks=() if (case, variant) in usual else pytest.mark.slow)
        for case in table for variant in ("llama", "qwen2")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "variant"),
    cases(CASES, {("gate alone", "qwen2"), ("rslora patterns", "qwen2"), ("head", "llama"), ("everything", "qwen2")}),
)
def test_what_peft_saves_gives_the_same_logits_and_is_written_back(hf, bases, tmp_path, case, variant):
    base = bases[variant]
    model = by_peft(hf, tmp_path / "adapter", variant, **CASES[case])
    ours = nnx.clone(base)
    load_adapter(ours, tmp_path / "adapter")
    reference = hf.logits(model, TOKENS)
    assert hf.error(hf.run(ours, TOKENS), reference) <= 1e-5
    assert hf.error(hf.run(base, TOKENS), reference) > 1e-2
    save_adapter(ours, tmp_path / "again")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    before.pop("base_model.model.lm_head.base_layer.weight", None)
    assert before.keys() == after.keys()
    # Where gate and up have factors of their own, one module has one of them and B of up takes the rest.
    factors = "rslora patterns" if case == "everything" else case
    for key in before:
        if not ("patterns" in factors and key.endswith("up_proj.lora_B.weight")):
            assert torch.equal(before[key], after[key]), key
    loaded = peft.PeftModel.from_pretrained(hf.variant(variant), tmp_path / "again")  # a missing key warns: an error
    assert wrapped(loaded) == wrapped(model)
    assert hf.error(hf.logits(loaded, TOKENS), reference) <= 1e-5


@pytest.mark.parametrize("case", ["patterns", pytest.param("everything", marks=pytest.mark.slow)])
def test_training_goes_on_in_jax_and_back_in_peft(hf, bases, tmp_path, case):
    """Gate and up, read apart, are one module with all the ranks here; what has become of it is exact in PEFT."""
    by_peft(hf, tmp_path / "adapter", "qwen2", **CASES[case])
    ours = nnx.clone(bases["qwen2"])
    load_adapter(ours, tmp_path / "adapter")
    graph, adapter, rest = nnx.split(ours, LoraParam, ...)

    def loss(adapter):
        return jnp.square(nnx.merge(graph, adapter, rest)(jnp.asarray(TOKENS))).mean()

    slopes = hf.compiled(jax.grad(loss))(adapter)
    moved = jax.tree.map(lambda w, g: w + 0.02 * jnp.sign(g) + 0.1 * g, adapter, slopes)
    ours = nnx.merge(graph, moved, rest)
    save_adapter(ours, tmp_path / "trained")
    theirs = peft.PeftModel.from_pretrained(hf.variant("qwen2"), tmp_path / "trained")
    assert hf.error(hf.run(ours, TOKENS), hf.logits(theirs, TOKENS)) <= 1e-5
    again = nnx.clone(bases["qwen2"])
    load_adapter(again, tmp_path / "trained")
    assert hf.error(hf.run(again, TOKENS), hf.run(ours, TOKENS)) <= 1e-6


OURS = {
    "lora": {},
    "rslora": {"use_rslora": True, "alpha": 2.5, "target_modules": ("k_proj", "q_proj", "gate_up_proj")},
    "dora": {"use_dora": True, "dropout": 0.05, "target_modules": TARGETS},
    "patterns": {"rank_pattern": (("q_proj", 8), ("gate_up_proj", 2)), "alpha_pattern": (("o_proj", 1.0),)},
    "some layers": {"layers_to_transform": (1,), "target_modules": ("k_proj", "gate_up_proj")},
    "saved": {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens", "lm_head")},
}


@pytest.mark.parametrize(("case", "variant"), cases(OURS, {("lora", "llama"), ("dora", "qwen2"), ("saved", "llama")}))
def test_what_we_save_loads_in_peft_and_back(hf, bases, tmp_path, case, variant):
    ours = trained(bases[variant], **OURS[case])
    save_adapter(ours, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(hf.variant(variant), tmp_path / "adapter")
    assert hf.error(hf.run(ours, TOKENS), hf.logits(loaded, TOKENS)) <= 1e-5
    again = nnx.clone(bases[variant])
    load_adapter(again, tmp_path / "adapter")
    same_adapter(again, ours)
    assert (json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"]) == "CAUSAL_LM"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-3", "qwen2", "mistral", "glm4v"])
def test_tuned_here_it_answers_in_transformers_as_here(hf, relatives, tmp_path, variant):
    """A directory loaded, tuned for some steps, exported, opened by PEFT on transformers, asked there and here."""
    model = load(relatives / variant)
    add_lora(model, LoraConfig(rank=4, alpha=8.0), nnx.Rngs(0))
    before = hf.run(model, TOKENS)
    train(
        model, tiny_examples(30), tiny_config(steps=6, learning_rate=3e-2), tmp_path / "run", trainable="lora", seed=3
    )
    assert hf.error(hf.run(model, TOKENS), before) > 1e-2
    save_adapter(model, tmp_path / "adapter")
    save_pretrained(model, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(hf.variant(variant), tmp_path / "adapter")
    assert hf.error(hf.run(model, TOKENS), hf.logits(theirs, TOKENS)) <= 1e-5
    answers = generate_ids(model, TOKENS.tolist(), max_new_tokens=6, eos_ids=())
    assert answers == generate_ids(load(tmp_path / "merged"), TOKENS.tolist(), max_new_tokens=6, eos_ids=())
    with torch.no_grad():
        found = theirs.generate(torch.as_tensor(TOKENS), max_new_tokens=6, do_sample=False, eos_token_id=None,
                                attention_mask=torch.ones(TOKENS.shape, dtype=torch.long), pad_token_id=0)  # fmt: skip
    assert found[:, TOKENS.shape[1] :].tolist() == answers


def test_a_merged_export_equals_peft_merge(hf, bases, tmp_path):
    ours = trained(bases["qwen2"], use_dora=True, use_rslora=True, target_modules=TARGETS)
    save_adapter(ours, tmp_path / "adapter")
    save_pretrained(ours, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(hf.variant("qwen2"), tmp_path / "adapter").merge_and_unload()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == theirs.state_dict().keys()
    for name, wanted in theirs.state_dict().items():
        assert hf.error(found[name], wanted) <= 2e-6, name
    merged = load(tmp_path / "merged")
    assert not has_lora(merged)
    assert hf.error(hf.run(merged, TOKENS), hf.run(merge_lora(ours), TOKENS)) == 0


# ---- mutations ----


MUTATIONS = {
    "nothing": ("_ROTARY", ("q_proj", "k_proj")),
    "rows of B of k as they are": ("_ROTARY", ("q_proj",)),
    "rows of B of q as they are": ("_ROTARY", ("k_proj",)),
    "gate and up swapped": ("_HALVES", ("up_proj", "gate_proj")),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("direction", ["in", "out"])
def test_each_mistake_is_seen(hf, bases, tmp_path, monkeypatch, mutation, direction):
    good = trained(bases["qwen2"], use_dora=True)
    if direction == "in":
        save_adapter(good, tmp_path / "adapter")
    monkeypatch.setattr(adapter_formats, *MUTATIONS[mutation])
    if direction == "in":
        ours = nnx.clone(bases["qwen2"])
        load_adapter(ours, tmp_path / "adapter")
        error = hf.error(hf.run(ours, TOKENS), hf.run(good, TOKENS))
    else:
        save_adapter(good, tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(hf.variant("qwen2"), tmp_path / "adapter")
        error = hf.error(hf.logits(loaded, TOKENS), hf.run(good, TOKENS))
    assert error <= 1e-5 if mutation == "nothing" else error > 1e-3


# ---- other clients ----


def test_formats_for_other_clients_say_the_same(hf, bases, tmp_path):
    ours = trained(bases["llama"], use_rslora=True, rank_pattern=(("q_proj", 8),), alpha_pattern=(("mlp.*", 1.0),))
    for format in ("vllm", "vllm-split", "llama.cpp"):
        save_adapter(ours, tmp_path / format, format=format)
        config = json.loads((tmp_path / format / "adapter_config.json").read_text())
        assert config["use_rslora"] is False
        assert config["task_type"] == "CAUSAL_LM"
        assert config["alpha_pattern"] == {}
        assert (config["rank_pattern"] == {}) == (format != "llama.cpp")
        loaded = peft.PeftModel.from_pretrained(hf.variant("llama"), tmp_path / format)
        assert hf.error(hf.run(ours, TOKENS), hf.logits(loaded, TOKENS)) <= 1e-5
        again = nnx.clone(bases["llama"])
        load_adapter(again, tmp_path / format)
        assert hf.error(hf.run(ours, TOKENS), hf.run(again, TOKENS)) <= 1e-5
    with pytest.raises(InputError, match="the chatglm layout has no llama models"):
        save_adapter(ours, tmp_path / "chatglm", format="chatglm")
    with pytest.raises(InputError, match="vLLM does not load DoRA"):
        save_adapter(trained(bases["llama"], use_dora=True), tmp_path / "x", format="vllm")


# ---- vision-language models ----


def test_an_adapter_of_the_text_decoder_loads_in_peft_on_the_whole_model(hf, bases, tmp_path):
    """``down_proj`` and others are names of the vision tower too, and stay unadapted there."""
    for number, options in enumerate((
        {"use_dora": True}, {"layers_to_transform": (1,), "rank_pattern": (("down_proj", 2),)},
        {"modules_to_save": ("embed_tokens", "lm_head")},
    )):  # fmt: skip
        ours = trained(bases["glm4v"], **options)
        directory = tmp_path / str(number)
        save_adapter(ours, directory)
        loaded = peft.PeftModel.from_pretrained(hf.variant("glm4v"), directory)  # missing keys warn: an error here
        assert not any("visual" in name for name in wrapped(loaded))
        assert hf.error(hf.run(ours, TOKENS), hf.logits(loaded, TOKENS)) <= 1e-5
        again = nnx.clone(bases["glm4v"])
        load_adapter(again, directory)
        same_adapter(again, ours)
    with pytest.raises(InputError, match="what else than PEFT reads of a glm4v adapter is not known"):
        save_adapter(ours, tmp_path / "x", format="vllm-split")


def test_what_peft_saves_of_a_vision_language_model(hf, bases, tmp_path):
    text = r"model\.language_model\..*(q_proj|gate_up_proj|down_proj)"
    model = by_peft(hf, tmp_path / "text", "glm4v", target_modules=text)
    ours = nnx.clone(bases["glm4v"])
    load_adapter(ours, tmp_path / "text")
    assert hf.error(hf.run(ours, TOKENS), hf.logits(model, TOKENS)) <= 1e-5
    by_peft(hf, tmp_path / "all", "glm4v", target_modules=["q_proj", "down_proj"])
    with pytest.raises(InputError, match=r"adapts the vision tower \(model.visual.*merge it with PEFT"):
        load_adapter(nnx.clone(bases["glm4v"]), tmp_path / "all")


# ---- what does not fit ----


def test_an_adapter_of_the_base_in_another_layout_is_refused(hf, relatives, tmp_path):
    """Converted, it is the same model in another row order: what names and our own files tell is told."""
    convert(relatives / "llama", tmp_path / "glm", "glm")
    native, own = load(tmp_path / "glm"), load(relatives / "llama")
    for base, other, says in ((own, native, "model_type 'llama'; this model has glm; if these are the same"),
                              (native, own, "model_type 'glm'; this model has llama; if these are the")):  # fmt: skip
        directory = tmp_path / f"of {base.config.family}"
        save_adapter(trained(base), directory)
        with pytest.raises(InputError, match=says):
            load_adapter(nnx.clone(other), directory)
    save_adapter(trained(native, target_modules=("q_proj",)), tmp_path / "q")
    with pytest.raises(InputError, match="model_type 'glm'; this model has llama; if these are the same weights"):
        load_adapter(nnx.clone(own), tmp_path / "q")
    by_peft(hf, tmp_path / "peft", "llama", target_modules=ALL)  # a file that does not say which base it is for
    with pytest.raises(InputError, match="named as in a llama directory, this base is in the glm layout"):
        load_adapter(nnx.clone(native), tmp_path / "peft")
    by_peft(hf, tmp_path / "fused", "glm", target_modules=["gate_up_proj"])
    with pytest.raises(InputError, match="named as in a glm directory, this base is in the llama layout"):
        load_adapter(nnx.clone(own), tmp_path / "fused")
    by_peft(hf, tmp_path / "vlm", "glm4v", target_modules=["q_proj"])
    with pytest.raises(InputError, match="named as in a glm4v directory, this base is in the llama layout"):
        load_adapter(nnx.clone(own), tmp_path / "vlm")
    save_adapter(trained(native), tmp_path / "split", format="vllm-split")  # our own halves of a glm base
    again = nnx.clone(native)
    load_adapter(again, tmp_path / "split")
    assert has_lora(again)


def without(key):
    return lambda tensors: tensors.pop(key)


NAME = "base_model.model.model.layers.1.{}.lora_{}.weight"
UP_A, UP_B = NAME.format("mlp.up_proj", "A"), NAME.format("mlp.up_proj", "B")


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (without(UP_B), {}, f"tensor missing: {UP_B}"),
        (lambda t: [t.pop(UP_A), t.pop(UP_B)], {}, "selects 1 modules that the weights do not adapt: .*1.mlp.up_proj"),
        (lambda t: t.update({UP_B: t[UP_B][:40].contiguous()}), {}, r"up_proj has A \[4, 32\] and B \[40, 4\] instead"),
        (lambda t: t.update({UP_A: t[UP_A][:, :30].contiguous()}), {}, r"up_proj has A \[4, 30\].*another base\?"),
        (lambda t: t.update({NAME.format("mlp.up", "A"): t[UP_A].clone()}), {}, "not in this model: .*mlp.up"),
        (lambda t: None, {"target_modules": ["q_proj"]}, "does not select model.layers.0.mlp.up_proj"),
        (lambda t: None, {"r": 5}, "its rank is 5"),
        (lambda t: None, {"use_dora": True}, r"has no lora_magnitude_vector \[48\], which use_dora needs"),
        (lambda t: t[UP_A].view(-1)[0].fill_(float("inf")), {}, "NaN or infinity"),
        (lambda t: t.update({UP_A.replace("lora_A", "lora_C"): torch.ones(1)}), {}, "1 tensor unexpected: .*lora_C"),
    ],
)  # fmt: skip
def test_a_damaged_adapter_is_refused(hf, bases, tmp_path, change, config, says):
    by_peft(hf, tmp_path / "adapter", "llama", target_modules=["q_proj", "up_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    edit_config(tmp_path / "adapter", **config)
    model = nnx.clone(bases["llama"])
    with pytest.raises(InputError, match=says) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert not has_lora(model)


def test_the_names_of_the_halves_are_explained_where_ours_are_asked_for(bases):
    with pytest.raises(InputError, match=r"gate_proj, up_proj \(gate and up are one module here, gate_up_proj\)"):
        trained(bases["llama"], target_modules=("gate_proj", "up_proj"))
