"""Our preference losses and adapter gradients against TRL's own trainer, on a tiny GLM through PEFT."""

import copy
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from flax import nnx

from mentalglm_jax.checkpoints.adapters import load_adapter
from mentalglm_jax.model.lora import LoraParam
from tests.mentalglm_jax.adapters import randomise
from tests.mentalglm_jax.pairs import objective, tiny_pair_examples, tiny_pairs
from tests.mentalglm_jax.train.test_preference import batch_of, value_and_gradient

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
BETA = 0.3


@pytest.fixture(scope="module")
def world(hf, tmp_path_factory):
    """TRL's trainer with a PEFT model that has moved from its reference, and both adapters in ours."""
    with warnings.catch_warnings():  # of packages that TRL imports, and of settings it makes for itself
        warnings.simplefilter("ignore")
        import datasets
        import trl

        directory = tmp_path_factory.mktemp("trl")
        model = hf.variant("glm")
        model.name_or_path = model.config._name_or_path = str(directory)
        plain = peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, task_type="CAUSAL_LM")
        trained = randomise(peft.get_peft_model(copy.deepcopy(model), plain))
        trained.save_pretrained(directory / "start")
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="a", eos_token="b")
        args = trl.DPOConfig(str(directory / "out"), beta=BETA, report_to="none", use_cpu=True, bf16=False,
                             gradient_checkpointing=False, save_strategy="no")  # fmt: skip
        data = datasets.Dataset.from_list([{"prompt": "a a", "chosen": " b", "rejected": " a"}])
        trainer = trl.DPOTrainer(trained, args=args, train_dataset=data, processing_class=words)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in trained.named_parameters():
                if "lora_" in name and ".default." in name:
                    weight.requires_grad_(True).add_(0.1 * torch.randn(weight.shape, generator=generator))
        trained.save_pretrained(directory / "now", selected_adapters=["default"])
    start, now = hf.to_jax(model), hf.to_jax(model)
    load_adapter(start, directory / "start")
    load_adapter(now, directory / "now")
    batch = batch_of(start, tiny_pair_examples(), directory, rows=8)
    return SimpleNamespace(trainer=trainer, trained=trained, now=now, batch=batch, orpo=trl)


def by_trl(world, types: list[str], weights: list[float], pairs, smoothing: float = 0.0):
    """(loss, gradient of each of PEFT's tensors by our names) of the mean over ``pairs``."""
    trainer = world.trainer
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = types, weights, smoothing
    trainer.model.train()
    trainer.model.zero_grad()
    rows = [{"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
            for p in pairs]  # fmt: skip
    loss = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    loss.backward()
    return float(loss.detach()), gradients(trainer.model)


def gradients(model) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    for name, weight in model.named_parameters():
        if "lora_" in name and ".default." in name:
            where = name.split(".layers.")[1].split(".", 1)[1]
            path = f"layers.{where.split('.lora_')[0]}.adapter.{'a' if 'lora_A' in name else 'b'}"
            found.setdefault(path, []).append(weight.grad.numpy().T.copy())
    return {name: np.stack(parts) for name, parts in found.items()}


def compare(hf, world, ours, wanted) -> None:
    value, _, found = ours
    loss, reference = wanted
    assert value == pytest.approx(loss, rel=1e-5)
    assert found.keys() == reference.keys() and len(found) == 12
    assert max(float(np.abs(x).max()) for x in reference.values()) > 1e-3
    errors = {name: hf.error(found[name], reference[name]) for name in found}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("kind", "types", "more"),
    [
        ("dpo", "sigmoid", {"sft_weight": 0.2}),
        pytest.param("dpo", "sigmoid", {}, marks=pytest.mark.slow),
        pytest.param("ipo", "ipo", {"sft_weight": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_loss_and_adapter_gradients_are_trl_s(hf, world, kind, types, more):
    sft = more.get("sft_weight", 0.0)
    names, weights = ([types, "sft"], [1.0, sft]) if sft else ([types], [1.0])
    ours = value_and_gradient(world.now, world.batch, objective(kind, beta=BETA, **more))
    compare(hf, world, ours, by_trl(world, names, weights, tiny_pairs()))


@pytest.mark.slow
def test_smoothed_dpo_is_trl_s(hf, world):
    """Its "sigmoid" takes no smoothing; its "aot" of one pair alone is the same formula, with it."""
    ours = value_and_gradient(world.now, world.batch, objective(beta=BETA, label_smoothing=0.1))
    parts = [by_trl(world, ["aot"], [1.0], [pair], 0.1) for pair in tiny_pairs()]
    mean = {name: np.mean([gradient[name] for _, gradient in parts], axis=0) for name in parts[0][1]}
    compare(hf, world, ours, (float(np.mean([loss for loss, _ in parts])), mean))


@pytest.mark.slow
def test_orpo_is_trl_s(hf, world):
    """The odds ratio's part by TRL's function; its likelihood counts prompt tokens too, which the paper's does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer

    trainer = world.trainer
    trainer.model.zero_grad()
    rows = [{"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
            for p in tiny_pairs()]  # fmt: skip
    inputs = trainer.data_collator(rows)
    logits = trainer.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    log_p = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    half = len(rows)
    held = SimpleNamespace(beta=BETA, accelerator=trainer.accelerator)
    losses, *_ = ORPOTrainer.odds_ratio_loss(held, log_p[:half], log_p[half:])
    tokens = ORPOTrainer.get_batch_logps(logits[:half], labels[:half]).sum()
    loss = -losses.mean() - tokens / (labels[:half, 1:] != -100).sum()
    loss.backward()
    ours = value_and_gradient(world.now, world.batch, objective("orpo", beta=BETA))
    compare(hf, world, ours, (float(loss.detach()), gradients(trainer.model)))


def test_the_adapters_differ(world):
    assert jax.tree.leaves(nnx.state(world.now, LoraParam))
    batch = dict(world.batch)
    assert np.abs(batch["reference"]).max() > 1
