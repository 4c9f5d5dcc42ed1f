"""Comparing a reloaded export with the trainer's logits and generations."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from probes.errors import ProbeError, ProbeInputError
from probes.models.load import load_model
from probes.models.verify import read_reference, reopen, verify


def reference_of(model_dir: Path, adapter: Path | None, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """What a trainer with exactly this model would have written: plain passes, plain greedy loop."""
    model, _ = load_model(model_dir, adapter, merge=False)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    vocab = model.get_input_embeddings().num_embeddings
    tokens = np.zeros((len(prompts), int(lengths.max()) + 2), np.int32)
    logits = np.full((*tokens.shape, vocab), 7.0, np.float32)
    greedy = np.full((len(prompts), 6), -1, np.int32)
    eos = []
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        ids = list(prompt)
        for step in range(6):
            with torch.no_grad():
                found = model(input_ids=torch.tensor([ids])).logits[0].numpy()
            if step == 0:
                logits[row, : len(prompt)] = found
            greedy[row, step] = int(found[-1].argmax())
            ids.append(int(greedy[row, step]))
            if row == 0 and step == 2:  # the third token of the first prompt ends a generation
                eos = [ids[-1]]
            if ids[-1] in eos:
                break
    return {
        "tokens": tokens,
        "lengths": lengths,
        "logits": logits,
        "prompt_ids": tokens,
        "prompt_lengths": lengths,
        "greedy_ids": greedy,
        "eos_ids": np.array([*eos, 1], np.int32),
    }


def test_the_base_is_read_as_the_adapter_was_trained_on_it(
    tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """The trainer writes its rotary base into the adapter's file; PEFT would take config.json's without a word."""
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir)
    assert config.rope_parameters["rope_theta"] == 10000.0
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    config.rope_parameters["rope_theta"] = 5e6
    config.save_pretrained(tmp_path / "base")
    shutil.copytree(adapter_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "rope_theta": "5000000.0"})
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        wanted, plain, found = (
            load_model(base, adapter)[0](input_ids=ids).logits
            for base, adapter in (
                (tmp_path / "base", adapter_dir),
                (tiny_model_dir, adapter_dir),
                (tiny_model_dir, tmp_path / "adapter"),
            )
        )
    assert torch.equal(found, wanted) and not torch.allclose(found, plain)
    save_file(load_file(file), file, metadata={"format": "pt", "rope_theta": "much"})
    with pytest.raises(
        ProbeInputError, match=r"adapter_model.safetensors: rope_theta: must be a number from 1 to .* found 'much'"
    ):
        load_model(tiny_model_dir, tmp_path / "adapter")


@pytest.fixture(scope="module")
def prompts(tiny_rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["prompt_ids"][:length] for row, length in zip(tiny_rows, (40, 12, 25, 50), strict=True)]


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    return reference_of(tiny_model_dir, None, prompts)


def saved(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(tmp_path / "reference_logits.npz", **arrays)
    return tmp_path / "reference_logits.npz"


def test_same_model_agrees(tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = verify(tiny_model_dir, None, saved(tmp_path, reference))
    assert found["max_abs_logit_diff"] < 1e-4
    real = [np.abs(row[:n]).max() for row, n in zip(reference["logits"], reference["lengths"], strict=True)]
    assert found["max_abs_logit"] == pytest.approx(max(real))  # the 7.0 behind the ends do not count
    assert (found["greedy_identical"], found["greedy_total"]) == (4, 4)
    assert found["missing_keys"] == found["unexpected_keys"] == []
    assert json.loads(json.dumps(found)) == found


def test_adapter_agrees_and_base_does_not(
    tiny_model_dir: Path, adapter_dir: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    path = saved(tmp_path, reference_of(tiny_model_dir, adapter_dir, prompts))
    found = verify(tiny_model_dir, adapter_dir, path)
    assert found["max_abs_logit_diff"] < 1e-4 and found["greedy_identical"] == 4
    base = verify(tiny_model_dir, None, path)
    assert base["max_abs_logit_diff"] > 0.1 and base["greedy_identical"] < 4


def test_differences_are_reported(tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    logits, greedy = reference["logits"].copy(), reference["greedy_ids"].copy()
    logits[3, 49, 5] += 0.25  # the last real position of the longest row
    greedy[1, 0] += 1
    greedy[2, -1] += 1
    found = verify(tiny_model_dir, None, saved(tmp_path, reference | {"logits": logits, "greedy_ids": greedy}))
    assert found["max_abs_logit_diff"] == pytest.approx(0.25, abs=1e-3)
    assert found["greedy_identical"] == 2
    prompt = reference["prompt_ids"][1][: reference["prompt_lengths"][1]].tolist()
    greedy[2] = reference["greedy_ids"][2]
    gap = verify(tiny_model_dir, None, saved(tmp_path, reference | {"greedy_ids": greedy}))["greedy_gap"]
    with torch.no_grad():
        seen = load_model(tiny_model_dir)[0](input_ids=torch.tensor([prompt])).logits[0, -1]
    assert gap == pytest.approx(float(seen.max() - seen[int(greedy[1, 0])]), rel=1e-4) and gap > 0.1


def test_answers_that_part_at_a_tie_have_no_gap(
    tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Two tokens with one embedding: which of them is the larger is the rounding's to say."""
    model, _ = load_model(tiny_model_dir)
    first = int(reference["greedy_ids"][1, 0])
    other = next(i for i in range(first + 1, 10**6) if i not in reference["eos_ids"])
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[other] = weight[first]
    model.save_pretrained(tmp_path / "tied")
    greedy = reference["greedy_ids"].copy()
    greedy[1, 0] = other
    found = verify(tmp_path / "tied", None, saved(tmp_path, reference | {"greedy_ids": greedy[1:2],
                   "prompt_ids": reference["prompt_ids"][1:2],
                   "prompt_lengths": reference["prompt_lengths"][1:2]}))  # fmt: skip
    assert (found["greedy_identical"], found["greedy_gap"]) == (0, 0.0)


def test_generation_that_does_not_stop_is_different(
    tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The first generation ends with a stop token; told of no stop token, the trainer would have gone on."""
    ended = reference["greedy_ids"][0]
    assert ended[2] == reference["eos_ids"][0] and ended[3] == -1
    longer = reference["greedy_ids"].copy()
    longer[0, 3] = 5
    found = verify(tiny_model_dir, None, saved(tmp_path, reference | {"greedy_ids": longer}))
    assert found["greedy_identical"] == 3 and found["greedy_gap"] > 0.1  # no rounding stops an answer


def test_sampling_config_of_the_export_is_not_used(
    tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    config = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "max_length": 3, "eos_token_id": 3}
    (model / "generation_config.json").write_text(json.dumps(config))
    assert verify(model, None, saved(tmp_path, reference))["greedy_identical"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": None}, "array 'logits' is missing"),
        ({"tokens": np.zeros((4, 52), np.float32)}, r"array 'tokens' is float32\[4, 52\]"),
        ({"lengths": np.ones(3, np.int32)}, "lengths does not fit tokens"),
        ({"prompt_lengths": np.full(4, 99, np.int32)}, "prompt_lengths does not fit prompt_ids"),
        ({"tokens": np.ones((4, 51), np.int32)}, r"logits \[4, 52, \d+\] do not match tokens \[4, 51\]"),
        ({"greedy_ids": np.ones((2, 6), np.int32)}, "2 rows of greedy_ids for 4 prompts"),
        ({"logits": np.zeros((4, 52, 9), np.float32)}, "logits over 9 tokens"),
        ({"logits": np.full((4, 52, 377), np.nan, np.float32)}, "NaN or infinity"),
        ({"prompt_ids": np.full((4, 52), 5000, np.int32)}, r"prompt_ids holds ids outside 0\.\.\d+"),
        ({"greedy_ids": np.full((4, 6), 5000, np.int32)}, r"greedy_ids holds ids outside 0\.\.\d+"),
    ],
)
def test_reference_that_does_not_fit(
    tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arrays = {name: array for name, array in (reference | change).items() if array is not None}
    with pytest.raises(ProbeInputError, match=message):
        verify(tiny_model_dir, None, saved(tmp_path, arrays))


def test_unreadable_reference(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    with pytest.raises(ProbeInputError, match=r"r\.npz: cannot read \(No such file"):
        read_reference(path)
    np.savez(path, tokens=np.zeros((1, 1)))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ProbeInputError, match=r"r\.npz: cannot read as npz"):
        read_reference(path)
    path.write_bytes(b"")
    with pytest.raises(ProbeInputError, match=r"r\.npz: cannot read as npz"):
        read_reference(path)
    np.save(tmp_path / "r.npy", np.zeros(3))
    with pytest.raises(ProbeInputError, match=r"r\.npy: cannot read as npz"):
        read_reference(tmp_path / "r.npy")


def test_pickle_in_the_reference_is_refused(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    with pytest.raises(ProbeInputError, match="cannot read as npz"):
        read_reference(saved(tmp_path, reference | {"tokens": np.array([{"a": 1}], dtype=object)}))


def test_model_that_gives_nan(tiny_model_dir: Path, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProbeError, match="NaN"):
        verify(model, None, saved(tmp_path, reference))


def test_reopening_counts_what_transformers_would_load(tiny_model_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    found = reopen(tiny_model_dir)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["tensors"] == len(list(model.parameters()))
    assert found["tokenizer"] == len(transformers.AutoTokenizer.from_pretrained(tiny_model_dir))
    assert found["eos_token_id"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"num_hidden_layers": 1}, "tensors do not fit the model that its config describes, e.g. model.layers.1"),
        ({"vocab_size": 7}, "tensors do not fit|does not open"),
        ({"model_type": "nonsense"}, "transformers does not open it"),
    ],
)
def test_what_does_not_fit_does_not_reopen(tiny_model_dir: Path, tmp_path: Path, damage: dict, reason: str) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text()) | damage
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProbeInputError, match=reason) as caught:
        reopen(copy)
    assert "\n" not in str(caught.value)
