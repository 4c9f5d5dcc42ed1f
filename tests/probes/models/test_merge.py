"""A merged adapter is the adapter, where the model's head is its table of embeddings as well."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from probes.checks.randomise import randomised
from probes.errors import ProbeInputError
from probes.models.greedy import continued
from probes.models.load import load_model
from probes.probe import Probe

IDS = torch.tensor([[5, 80, 9, 33, 12, 7, 6, 81]])
TABLES = {"llama": "embed_tokens", "gpt2": "wte"}
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["TABLE"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["TABLE", "lm_head"]},
    "head by its weight": {"target_modules": ["o_proj"], "target_parameters": ["lm_head.weight"]},
    "DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "tokens": {"trainable_token_indices": [5, 6]},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [7, 8]}},
    "tokens of both": {"trainable_token_indices": {"TABLE": [5, 6], "lm_head": [7, 8]}},
    "embeddings of the largest rank": {
        "target_modules": ["q_proj", "c_attn", "TABLE"],
        "r": 16,
        "rank_pattern": {"q_proj": 2, "c_attn": 2},
    },
    "embeddings of a rank of their own": {
        "target_modules": ["q_proj", "c_attn", "TABLE"],
        "rank_pattern": {"TABLE": 9},
    },
    "tied": {"target_modules": ["TABLE"], "ensure_weight_tying": True},
    "tied with ranks": {"target_modules": ["TABLE"], "ensure_weight_tying": True, "r": 2, "rank_pattern": {"TABLE": 9}},
    "tied and saved": {
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "c_attn"],
        "ensure_weight_tying": True,
    },
    "head saved": {"target_modules": ["TABLE"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module", params=TABLES)
def tied(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> tuple[Path, str]:
    """A tiny model whose head is its table of embeddings, and the table's name."""
    path, kind = tmp_path_factory.mktemp(request.param), request.param
    size = len(tokenizer) + 3
    torch.manual_seed(0)
    if kind == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        shape = {"vocab_size": size, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, initializer_range=0.2, **ends))
    else:
        shape = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": 0}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, **heads, initializer_range=0.2, tie_word_embeddings=True)
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, TABLES[kind]


def trained(model_dir: Path, path: Path, **settings: Any) -> Any:
    """Saves an adapter with nothing left at zero, and gives what PEFT itself makes of the files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), peft.LoraConfig(**LORA | settings))
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.2)
        model.save_pretrained(path)
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), path).eval()


def placed(settings: dict[str, Any], table: str) -> dict[str, Any]:
    """``settings`` with the table by its name."""

    def name(value: Any) -> Any:
        if isinstance(value, dict):
            return {name(key): one for key, one in value.items()}
        return [name(one) for one in value] if isinstance(value, list) else table if value == "TABLE" else value

    return {key: name(value) for key, value in settings.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_is_what_peft_computes(tied: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    settings = placed(ADAPTERS[kind], tied[1])
    theirs = trained(tied[0], tmp_path, **settings)
    if kind == "tied and saved" and tied[1] == "wte":  # PEFT 0.21 stores both and, when it reads them, ties none
        with pytest.raises(ProbeInputError, match="1 unexpected tensors, first base_model"):
            load_model(tied[0], tmp_path)
        return
    ours, _ = load_model(tied[0], tmp_path)
    assert not isinstance(ours, peft.PeftModel)
    wanted = logits(theirs)
    assert (logits(ours) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # The table that integrated gradients begin at is the one that the model reads.
    assert torch.allclose(ours.get_input_embeddings()(IDS), theirs.get_input_embeddings()(IDS), atol=1e-5)
    # What nobody trained apart stays one table; else it says so, and is saved as two.
    apart = ours.get_input_embeddings().weight is not ours.get_output_embeddings().weight
    assert apart == (kind not in ("tokens", "tied and saved")) == (not ours.config.tie_word_embeddings)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")[0]), logits(ours))
    with torch.no_grad():
        answer = theirs.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert torch.equal(continued(ours, IDS, torch.ones_like(IDS), 8, [], 0), answer)


@pytest.mark.parametrize("kind", ["embeddings", "tokens of both"])
def test_maps_of_the_merged_are_those_of_the_adapter(tied: tuple[Path, str], tmp_path: Path, tiny_rows, kind) -> None:
    trained(tied[0], tmp_path, **placed(ADAPTERS[kind], tied[1]))
    scores, maps = [], []
    for folded in (True, False):
        probe = Probe.from_pretrained(tied[0], adapter=tmp_path, merge=folded)
        forward = probe.scorer.forward(probe.encode(tiny_rows[1]), ("label",))
        scores.append(forward.kept(torch.ones(1, len(forward.post), dtype=torch.bool)))
        maps.append(probe.attribute(probe.encode(tiny_rows[1]), ["ig"], ["label"])[0].char_values)
    assert torch.allclose(scores[0], scores[1], rtol=1e-3, atol=1e-3)
    if kind == "embeddings":  # the unmerged one is the last: its trained half drawn anew is another model
        with randomised(probe, "adapter_b"):
            forward = probe.scorer.forward(probe.encode(tiny_rows[1]), ("label",))
            assert not torch.allclose(forward.kept(torch.ones(1, len(forward.post), dtype=torch.bool)), scores[1])
    assert np.abs(maps[0] - maps[1]).max() < 1e-3 * np.abs(maps[1]).max()


def test_a_head_stored_in_another_precision_is_taken(tied: tuple[Path, str], tmp_path: Path) -> None:
    trained(tied[0], tmp_path, **placed(ADAPTERS["head saved"], tied[1]))
    ours, _ = load_model(tied[0], tmp_path, "bfloat16", merge=False)
    stored = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(ours.get_output_embeddings().weight, stored.bfloat16())


@pytest.mark.parametrize("changes", [{"r": 60000}, {"rank_pattern": {".*(embed_tokens|wte)": 60000}}])
def test_a_rank_of_the_embeddings_that_the_file_has_not(tied: tuple[Path, str], tmp_path: Path, changes: Any) -> None:
    trained(tied[0], tmp_path, **placed(ADAPTERS["embeddings"], tied[1]))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ProbeInputError, match=rf"says rank 60000 for \S*{tied[1]}, the file has 4"):
        load_model(tied[0], tmp_path)


def test_what_peft_merges_otherwise_is_refused(tied: tuple[Path, str], tmp_path: Path) -> None:
    """Trained tokens over a LoRA head: of the two PEFT 0.21 merges one."""
    trained(tied[0], tmp_path, target_modules=["lm_head"], trainable_token_indices=[5, 6])
    load_model(tied[0], tmp_path, merge=False)
    with pytest.raises(ProbeInputError, match=r"merged into the weights it gives other logits \(by .* of .*\); merge"):
        load_model(tied[0], tmp_path)
