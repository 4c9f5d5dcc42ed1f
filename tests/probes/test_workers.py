"""Several processes at one run of probes: the same run as one makes, whatever becomes of the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from probes import cli, suite
from probes.results.store import read_run
from probes.workers import shares, workers
from tests.hostile.attack import refused, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def given(tiny_model_dir, tiny_rows, tmp_path):
    rows = [tiny_rows[i % len(tiny_rows)] | {"id": f"r{i}"} for i in range(5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return ["run", str(tiny_model_dir), "--in", str(data), "--budget", "fast", "--device", "cpu", "--json", "--out"]


def test_each_has_its_own_share_and_the_first_then_reads_the_others():
    assert shares(5, 0, 2) == [0, 2, 4, 1, 3] and shares(5, 1, 2) == [1, 3]
    assert shares(3, 0, 1) == [0, 1, 2] and shares(2, 3, 4) == []


def test_two_make_the_run_that_one_makes(given, tmp_path, monkeypatch):
    began, real = [], suite.probe_post

    def seen(*given, **options):
        began.append(given[3])
        return real(*given, **options)

    monkeypatch.setattr(suite, "probe_post", seen)
    cli.main([*given, str(tmp_path / "two"), "--processes", "2"])
    assert began == [0, 2, 4]  # the others were made by the other process
    cli.main([*given, str(tmp_path / "one")])
    two, one = read_run(tmp_path / "two"), read_run(tmp_path / "one")
    assert two.summary == one.summary and two.manifest["cache"] == one.manifest["cache"]
    assert "RANK" not in os.environ


def test_the_first_makes_what_a_worker_that_stopped_has_left(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert run(["probes", *given, str(tmp_path / "out"), "--processes", "3"], capsys).code == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["n"] == 5


def test_a_worker_ends_when_nobody_waits_for_it():
    code = "import time; from probes.workers import workers\nwith workers(2, [], 'cpu'): time.sleep(3600)"
    env = os.environ | {"PROBES_PARENT": "1", "RANK": "1", "WORLD_SIZE": "2"}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=env | {"PYTHONPATH": str(ROOT)}).returncode == 1


def test_those_of_a_run_that_fails_are_stopped(monkeypatch, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 3600\n", "utf-8")
    sleeper.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(sleeper))
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    with workers(3, [], "cpu") as working:
        assert working(0) and working(1) and working(2) and torch.get_num_threads() == 2
    assert torch.get_num_threads() == 6
    torch.set_num_threads(before)
    assert working(0) and not working(1) and not working(2)


def test_on_a_gpu_one_process_has_the_run(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with workers(2, [], "cuda:0") as working:
        assert working(1) and "RANK" not in os.environ


def test_beside_a_launcher_they_are_refused(given, tmp_path, monkeypatch, capsys):
    out = [*given, str(tmp_path / "out"), "--processes"]
    refused(run(["probes", *out, "65"], capsys), "invalid value for --processes")
    monkeypatch.setenv("RANK", "0")
    refused(run(["probes", *out, "2"], capsys), r"--processes 2: a launcher has set RANK")
