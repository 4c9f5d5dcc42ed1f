"""``metrics.jsonl`` is strict JSON and reads as one uninterrupted run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mentalglm_jax.errors import InputError
from mentalglm_jax.train.metrics import MetricsLog


def written(directory: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "run", 0)
    log.write(1, {"loss": 2.5, "skipped_steps": 0})
    assert written(tmp_path / "run") == [{"step": 1, "loss": 2.5, "skipped_steps": 0}]
    log.close()
    assert [path for path in (tmp_path / "run" / "tensorboard").iterdir() if path.stat().st_size > 0]


@pytest.mark.parametrize("resume", [0, 2, 9])
def test_a_resumed_run_drops_what_it_will_write_again(tmp_path, resume):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 0.')  # killed here
    log = MetricsLog(tmp_path, resume)
    log.write(10, {"loss": 0.5})
    log.close()
    assert [row["step"] for row in written(tmp_path)] == [*(step for step in (1, 2, 3) if step <= resume), 10]


def test_evaluations_have_a_file_of_their_own(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    assert not (tmp_path / "evaluation.jsonl").exists()
    log.write_evaluation(2, {"loss": 2.0}, [{"id": "a", "answer": "高"}])
    log.write_evaluation(4, {"loss": 1.5}, [])
    log.close()
    MetricsLog(tmp_path, 3).close()
    [line] = (tmp_path / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"step": 2, "loss": 2.0, "samples": [{"id": "a", "answer": "高"}]}
    assert [row["step"] for row in written(tmp_path)] == [1]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_sample_with_a_line_separator_is_one_row(tmp_path, separator):
    log = MetricsLog(tmp_path, 0)
    log.write_evaluation(1, {"loss": 2.0}, [{"id": "a", "answer": f"one{separator}two"}])
    log.close()
    MetricsLog(tmp_path, 1).close()
    [line] = (tmp_path / "evaluation.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert json.loads(line)["samples"][0]["answer"] == f"one{separator}two"


def test_nan_and_infinity_become_null(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "targets": 3.0})
    log.close()
    assert written(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "targets": 3.0}]


def test_the_same_values_go_to_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="install the extra [track]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricsLog(tmp_path, 0, wandb=("thesis", "run"))
    log.write(1, {"loss": 2.0})
    log.write_evaluation(1, {"loss": 3.0}, [])
    run = wandb.run
    assert run is not None and (run.project, run.name) == ("thesis", "run")
    assert (run.summary["loss"], run.summary["eval/loss"], run.summary["step"]) == (2.0, 3.0, 1)
    log.close()
    assert wandb.run is None
    assert [path for path in (tmp_path / "wandb").rglob("*.wandb") if path.stat().st_size > 0]


def test_wandb_gets_the_values_and_nothing_else(tmp_path, monkeypatch, capfd):
    """Not what the command prints, its arguments and files, the machine, or the repository it stands in."""
    pytest.importorskip("wandb", reason="install the extra [track]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["mentalglm", "train", "--set", "a.b=hunter2"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posts.jsonl").write_text("hunter2")
    for command in (["init", "-q"], ["add", "posts.jsonl"], ["remote", "add", "origin", "https://hunter2.example/r"]):
        subprocess.run(["git", *command], check=True)
    log = MetricsLog(tmp_path / "stage", 0, wandb=("thesis", "run"))
    sys.stdout.write("hunter2 on stdout\n")
    sys.stderr.write("hunter2 on stderr\n")
    log.write(1, {"loss": 2.0})
    log.close()
    assert "hunter2" in capfd.readouterr().out
    files = [path for path in (tmp_path / "stage" / "wandb").rglob("*") if path.is_file() and "logs" not in path.parts]
    assert [path.suffix for path in files] == [".wandb"]
    sent = files[0].read_bytes()
    assert b"loss" in sent and not any(word.encode() in sent for word in ("hunter2", sys.executable, str(tmp_path)))


def test_wandb_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        InputError, match=r"wandb: is not installed; in a clone of mentalglm-jax: pip install '\.\[track\]'"
    ):
        MetricsLog(tmp_path, 0, wandb=("thesis", None))


def test_lines_that_are_not_rows_do_not_stop_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n[]\n7\n{"loss": 1}\n\nnull\n{"step": "x"}\n', encoding="utf-8"
    )
    MetricsLog(tmp_path, 5).close()
    assert written(tmp_path) == [{"step": 1}]
