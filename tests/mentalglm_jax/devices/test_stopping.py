"""SIGTERM ends every command as Ctrl-C does, with the exit code of a preemption, and no child goes on without it."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.devices.stopping import StopSignal, Terminated, sigterm_ends
from mentalglm_jax.interpreter import environment
from mentalglm_jax.pipeline import job

PARENT = """
import sys
from mentalglm_jax.devices.stopping import carried_out, sigterm_ends
with sigterm_ends():
    carried_out([sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()) + '.'); "
                                       "time.sleep(600)", sys.argv[1]])
"""


def test_a_signal_inside_is_an_exit_with_75_and_outside_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_ends():
        with StopSignal() as flag:  # a loop that saves first
            signal.raise_signal(signal.SIGTERM)
        assert flag.requested
        with pytest.raises(Terminated) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) is before


def test_another_thread_has_no_signals_and_no_complaint():
    done = []

    def work() -> None:
        with sigterm_ends():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_the_child_ends_with_its_parent(tmp_path):
    noted = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, str(noted)], env=environment(PYTHONPATH=os.getcwd()))
    while parent.poll() is None and not (noted.exists() and noted.read_text().endswith(".")):
        time.sleep(0.01)
    child = int(noted.read_text().rstrip("."))
    parent.terminate()
    assert parent.wait(60) == 75
    assert not Path(f"/proc/{child}").exists()


def test_a_run_stopped_outside_of_training_says_where_and_goes_on(tmp_path, capsys, monkeypatch):
    """The loop of docs/resume.md starts it again after 75 alone."""
    recipe = {"run_dir": str(tmp_path / "run"), "data": {"source": "synthetic"}, "model": {"path": "nowhere"},
              "stages": [{"name": "one", "languages": ["en"], "train": {"steps": 1}}]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(job, "data_stage", lambda *given, **more: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "recipe.yaml")])
    assert stop.value.code == 75
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mentalglm: ")]
    assert "interrupted in stage 'data'" in line and "the same command continues" in line


def test_any_other_command_says_so_in_one_line(capsys, monkeypatch):
    command = importlib.import_module("mentalglm_jax.cli.main")

    class Commands:
        def main(self, **given) -> None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command, "_commands", Commands)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 75
    assert capsys.readouterr().err == "mentalglm: stopped by SIGTERM; give the same command again (exit code 75)\n"
