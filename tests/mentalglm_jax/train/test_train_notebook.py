"""notebooks/train_on_tpu.ipynb on a tiny model, from top to bottom: a stop in the middle, resume, metrics, export."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "notebooks" / "train_on_tpu.ipynb"
TRAIN = {"rows": 2, "sequence_length": 256, "learning_rate": 1e-3, "log_every": 1}
RECIPE = {
    "run_dir": "elsewhere",
    "data": {"source": "synthetic", "synthetic": {"n_train": 6, "n_dev": 0, "n_test": 0, "tasks": ["suicide_risk"]}},
    "model": {"geometry": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "head_dim": 16}},
    "pretrain": {"chats": 30, "train": {"steps": 2, **TRAIN}},
    "lora": {"rank": 2, "alpha": 4},
    "stages": [{"name": "english", "languages": ["en"], "train": {"steps": 60, **TRAIN}}],
}  # fmt: skip


def test_the_file_is_clean_and_names_recipes_that_exist():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    assert notebook.cells[0].source.startswith("# ") and "not a diagnosis" in notebook.cells[0].source
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert parameters.source.startswith("# Change only this cell")
    (choices,) = [cell.source for cell in notebook.cells if "CHOICES = {" in cell.source]
    named = [part for part in choices.split('"') if part.startswith("configs/")]
    assert len(named) == 5 and all((ROOT / name).is_file() for name in named)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_stops_goes_on_and_exports(tmp_path, monkeypatch):
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    changes = {"RECIPE": str(recipe), "DATA": None, "RUN_DIR": str(tmp_path / "run"), "STOP_AFTER": 12}
    parameters.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "stopped with exit code 75" in text, text
    assert "interrupted at step" in text, text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    lines = (tmp_path / "run" / "stages" / "english" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert json.loads((tmp_path / "run" / "export-peft" / "adapter_config.json").read_text("utf-8"))["r"] == 2
