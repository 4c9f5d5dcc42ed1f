"""The records and the loading of models and adapters."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.errors import ProbeError, ProbeInputError
from probes.probe import Probe
from probes.records import Attribution, Check, Citation, Example, Report
from tests.probes.tiny import make_model


def test_example_survives_json(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    for row in tiny_rows:
        example = tiny_probe.encode(row)
        back = Example.from_dict(json.loads(json.dumps(example.to_dict())))
        assert all(getattr(back, field.name) == getattr(example, field.name) for field in dataclasses.fields(Example))


def test_other_records_survive_json() -> None:
    spans = ((0, 2), (2, 3))
    values = np.array([0.1, -2.0])
    numbers: dict[str, Any] = {"f_input": 1.0, "f_baseline": 0.5, "delta": None, "rel_delta": None, "converged": None}
    numbers |= {"n_fwd": 3, "n_bwd": 0, "seconds": 0.1, "dtype": "float32", "seed": 0, "model_fp": "ab"}
    made = Attribution(
        "a", "erase", "label", "clause", values, spans, np.ones(3), "pad", **numbers, params={"x": [1, 2]}
    )
    back = Attribution.from_dict(json.loads(json.dumps(made.to_dict())))
    assert back.to_dict() == made.to_dict()
    assert back.values.dtype == np.float64 and back.unit_spans == spans and back.params == {"x": [1, 2]}
    check = Check("mass", "ig", 1.0, 0.5, 0.1, 0.9, 0.01, (0.0, 1.0), 3, "ok", ("a", "b"))
    report = Report("a", (check, dataclasses.replace(check, p=None, ci=None)), "inconclusive", ("note",))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    citation = Citation("a", (1, 2), (), "quote", 0.5, "ff")
    assert Citation.from_dict(json.loads(json.dumps(citation.to_dict()))) == citation


def test_from_dict_names_wrong_keys() -> None:
    with pytest.raises(ProbeInputError, match="Citation: keys missing or unknown: kind, sort"):
        Citation.from_dict(
            {"id": "a", "expl_char": [0, 1], "post_char": [], "sort": "quote", "score": 1, "text_hash": ""}
        )


def test_probe_freezes_and_refuses_training_mode(tokenizer) -> None:
    model = make_model(tokenizer)
    probe = Probe(model, tokenizer)
    assert not any(weight.requires_grad for weight in probe.model.parameters())
    model.model.layers[1].train()
    with pytest.raises(ProbeError, match="training mode"):
        Probe(model, tokenizer)


def test_fingerprint_is_of_the_weights(tiny_model_dir: Path, tiny_probe: Probe) -> None:
    again = Probe.from_pretrained(tiny_model_dir)
    assert again.fingerprint == tiny_probe.fingerprint
    changed = Probe.from_pretrained(tiny_model_dir)
    changed.model.lm_head.weight.data[0, 0] += 1e-3
    assert changed.fingerprint != tiny_probe.fingerprint
    assert Probe.from_pretrained(tiny_model_dir, dtype="bfloat16").fingerprint != tiny_probe.fingerprint


def test_adapter_is_applied_merged_or_not(tiny_model_dir: Path, tiny_probe: Probe, adapter_dir: Path) -> None:
    ids = torch.tensor([[5, 80, 9, 33, 12]])
    merged = Probe.from_pretrained(tiny_model_dir, adapter=adapter_dir)
    apart = Probe.from_pretrained(tiny_model_dir, adapter=adapter_dir, merge=False)
    assert not isinstance(merged.model, peft.PeftModel) and isinstance(apart.model, peft.PeftModel)
    logits = [probe.model(input_ids=ids).logits for probe in (tiny_probe, merged, apart)]
    assert (logits[1] - logits[2]).abs().max() < 1e-4
    assert (logits[1] - logits[0]).abs().max() > 0.1
    assert merged.fingerprint != tiny_probe.fingerprint


def test_unmerged_adapter_scores_as_merged(
    tiny_model_dir: Path, adapter_dir: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    scores = []
    for merge in (True, False):
        probe = Probe.from_pretrained(tiny_model_dir, adapter=adapter_dir, merge=merge)
        forward = probe.scorer.forward(probe.encode(tiny_rows[1]), ("label", "explanation"))
        scores.append(forward.kept(torch.ones(1, len(forward.post), dtype=torch.bool)))
    assert torch.allclose(scores[0], scores[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {key.removeprefix("base_model.model."): value for key, value in w.items()}, "missing tensors"),
        (
            lambda w: {key: value for key, value in w.items() if "layers.1.mlp.down_proj" not in key},
            "2 missing tensors",
        ),
        (lambda w: {**w, "base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.ones(2)}, "1 unexpected"),
        (lambda w: {key: value.T.contiguous() for key, value in w.items()}, "says rank 4 for .*, the file has 128"),
    ],
    ids=["without prefix", "one layer short", "one layer too many", "transposed"],
)
def test_wrong_adapter_is_refused(
    tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path, change, message: str
) -> None:
    """Each of these but the last loads in PEFT with at most a warning, as no or as half an adapter."""
    shutil.copytree(adapter_dir, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(change(weights), tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ProbeInputError, match=message):
        Probe.from_pretrained(tiny_model_dir, adapter=tmp_path / "a")


def test_bad_model_directories(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ProbeInputError, match="nowhere"):
        Probe.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ProbeInputError, match="float8"):
        Probe.from_pretrained(tiny_model_dir, dtype="float8")
    with pytest.raises(ProbeInputError, match="PEFT adapter"):
        Probe.from_pretrained(tiny_model_dir, adapter=tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model_dir, cut)
    weights = load_file(cut / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProbeInputError, match=r"1 missing tensors, first model\.layers\.1\.mlp\.down_proj\.weight"):
        Probe.from_pretrained(cut)
    (cut / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ProbeInputError, match=r"model\.safetensors: not a readable safetensors file"):
        Probe.from_pretrained(cut)


def test_pickled_weights_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ProbeInputError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Probe.from_pretrained(path)


def test_missing_tokenizer_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "mute"
    shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ProbeInputError, match="tokenizer"):
        Probe.from_pretrained(path)


def test_row_that_does_not_fit_the_model(tiny_model_dir: Path, tiny_rows: list[dict[str, Any]]) -> None:
    probe = Probe.from_pretrained(tiny_model_dir)
    row = tiny_rows[0]
    with pytest.raises(ProbeInputError, match=r"row 'row-0': token id 9999 but the model has 377"):
        probe.encode(row | {"output_ids": [*row["output_ids"], 9999]})
    probe.model.config.max_position_embeddings = 100
    with pytest.raises(ProbeInputError, match=r"row 'row-0': \d+ tokens but the model's context is 100"):
        probe.encode(row)
