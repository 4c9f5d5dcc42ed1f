"""`probes run` and `probes report` on a full disk, in a read-only directory and killed; `probes validate --docs` writes
its page by the function that `probes report` writes by. What mentalglm's commands go through is in test_disks.py."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hostile.attack import refused, run
from tests.hostile.world import contents, full_disk, read_only

RUN = ["probes", "run", "model", "--in", "finished/generations.jsonl", "--budget", "fast", "--limit", "2", "--out"]
COMMANDS = {"run": [*RUN, "new"], "report": ["probes", "report", "probed", "--out", "page/report.html"]}
SECONDS = re.compile(r'"seconds": [^,}]+')
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def probed(template, tmp_path_factory):
    """The world with a finished run of two posts."""
    directory = tmp_path_factory.mktemp("probed") / "world"
    shutil.copytree(template, directory)
    script = Path(sys.executable).with_name("probes")
    subprocess.run([script, *RUN[1:], "probed"], cwd=directory, capture_output=True, check=True)
    return directory


@pytest.fixture
def world(probed, tmp_path, monkeypatch):
    shutil.copytree(probed, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.mark.parametrize(("command", "limit"), [("run", 0), ("run", 1500), ("report", 0), ("report", 1500)])
def test_full_disk(world, capsys, command, limit):
    before = contents(world)
    with full_disk(limit):
        outcome = run(COMMANDS[command], capsys)
    outcome = replace(outcome, err=re.sub(r"probing posts: .*\n", "", outcome.err))
    refused(outcome, "cannot write|cannot lock|No space|File too large", code=1)
    after = contents(world)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith(".unfinished")]


@pytest.mark.parametrize("command", COMMANDS)
def test_read_only_directory(world, capsys, command):
    before = contents(world)
    with read_only(world):
        outcome = run(COMMANDS[command], capsys)
    outcome = replace(outcome, err=re.sub(r"probing posts: .*\n", "", outcome.err))
    refused(outcome, "cannot (write|make|lock)|Permission denied", code=1)
    assert contents(world) == before


@pytest.mark.timeout(1200)
def test_killed_at_random_moments_the_same_run_comes_out(probed, world):
    moments = random.Random(0)
    command = [Path(sys.executable).with_name("probes"), *RUN[1:], "again"]
    for _ in range(3):
        with subprocess.Popen(
            command, cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            if "probing posts: " not in process.stderr.readline():  # the call before was done before it was killed
                assert process.wait() == 0
                break
            time.sleep(moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, cwd=world, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("attributions.jsonl", "checks.jsonl", "summary.csv"):
        one, other = ((folder / name).read_text("utf-8") for folder in (probed / "probed", world / "again"))
        assert SECONDS.sub("", one) == SECONDS.sub("", other), name
