"""Paths that the system refuses, in every place of both command lines where a path can stand: one line always."""

import json
import os
from dataclasses import replace

import pytest

from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import RECORD

PATHS = {
    "a home of nobody": "~nosuchuser/x", "300 letters": "a" * 300, "300 letters below": "x/" + "b" * 300,
    "5,000 letters": "x" * 5000, "a zero byte": "a\0c", "another's": "/proc/1/root/x", "a device": "/dev/null",
    "half a pair": "\udcff", "2,000 deep": "a/" * 2000,
}  # fmt: skip
COMMANDS = (
    "mentalglm convert {} out --to glm", "mentalglm convert d {} --to glm",
    "mentalglm generate {} --in r.jsonl --out o.jsonl", "mentalglm generate d --in {} --out o.jsonl",
    "mentalglm generate d --adapter {} --in r.jsonl --out o.jsonl", "mentalglm evaluate {}", "mentalglm leaderboard {}",
    "mentalglm data inspect {}", "mentalglm data inspect r.jsonl --tasks {}",
    "mentalglm data import {} --text a --label b --out o", "mentalglm data build {}",
    "mentalglm data review export {} --out o", "mentalglm data review import {} x", "mentalglm run {}",
    "mentalglm train recipe.yaml --set run_dir={}", "mentalglm train recipe.yaml --set model.path={}",
    "mentalglm train recipe.yaml --set data.root={}", "mentalglm export {} --to peft", "mentalglm tasks check {}",
    "mentalglm plan {} --topology v5e-8", "mentalglm serve {}", "mentalglm chat {}",
    "probes run {} --in r.jsonl --out o", "probes run d --in {} --out o",
    "probes run d --adapter {} --in r.jsonl --out o", "probes report {}", "probes check {}", "probes verify {}",
    "probes verify d --reference {}",
)  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "r.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        "run_dir: r\ndata: {source: jsonl, root: .}\nmodel: {path: m}\nstages: [{name: one, train: {steps: 1}}]\n"
    )
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_is_none(command, path, capsys):
    outcome = run([word.replace("{}", PATHS[path]) for word in command.split()], capsys)
    said = replace(outcome, err=outcome.err.replace("data ...\n", ""))  # the stage that was about to begin
    refused(said, "", code=1 if outcome.code == 1 else 2)
    assert not {"o", "out", "o.jsonl"} & set(os.listdir())


@pytest.mark.parametrize(
    ("command", "within"), [("mentalglm convert a b --to glm", "mentalglm_jax.checkpoints.directories.convert"),
                            ("probes report a", "probes.report.page.write_report")],
)  # fmt: skip
def test_what_ends_too_early_is_no_interruption(command, within, monkeypatch, capsys):
    """Typer takes EOFError, which readers of damaged files raise, for the end of what is typed."""

    def read(*given, **named):
        raise EOFError("marshal data too short")

    monkeypatch.setattr(within, read)
    outcome = run(command.split(), capsys)
    assert outcome.code == 1 and "EOFError: marshal data too short (--debug shows where)" in outcome.err
