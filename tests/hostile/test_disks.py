"""Every command that writes, on a full disk, in a read-only directory, beside another process at the same target, and
with what a killed one left: one line, exit code 1, and what was there is as it was."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mentalglm_jax.errors import RunError
from mentalglm_jax.files import replace_dir, working_in, working_on, write_bytes
from tests.hostile.attack import refused, run
from tests.hostile.commands import ALL, IDS
from tests.hostile.world import ELSEWHERE, WRITES, contents, full_disk, read_only

DISK = r"cannot (write|lock it|make this directory|make its directory)"


@pytest.mark.parametrize("command", IDS)
def test_every_command_is_tried_or_writes_nothing(command):
    assert (command in WRITES) != (command in ELSEWHERE), "a new command: say in world.py what it writes"
    assert len(ALL) == len(set(IDS))


def called(command, capsys):
    """What ``command`` did, without the lines that say which stage begins."""
    outcome = run([*command.split(), *WRITES[command][0]], capsys)
    lines = [line for line in outcome.err.splitlines(keepends=True) if not line.endswith(" ...\n")]
    return replace(outcome, err="".join(lines))


# With 0 bytes the first file fails; with 200 the one after the lock. The build asks its teacher before it writes more,
# and a sweep tells which of its runs fail.
NOT_LATER = {f"mentalglm {name}" for name in ("data build", "leaderboard", "generate", "sweep")}
LIMITS = [(command, limit) for command in WRITES for limit in (0, 200) if not (limit and command in NOT_LATER)]


@pytest.mark.parametrize(
    ("command", "limit"), [*LIMITS, pytest.param("mentalglm generate", 200, marks=pytest.mark.slow)]
)
def test_full_disk(world, capsys, command, limit):
    before = contents(world)
    with full_disk(limit):
        outcome = called(command, capsys)
    refused(outcome, DISK, code=1)
    after = contents(world)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith((".unfinished", ".lock"))]


@pytest.mark.parametrize("command", WRITES)
def test_read_only_directory(world, capsys, command):
    target = world / WRITES[command][1]
    before = contents(world)
    with read_only(target if target.is_dir() else world):
        outcome = called(command, capsys)
    refused(outcome, DISK, code=1)
    assert contents(world) == before


def anything(target: Path):
    """``replace_dir`` of a directory that may hold what it likes."""
    return replace_dir(target, lambda _: None)


def lock_of(target: Path, command: str):
    if command in ("mentalglm convert", "mentalglm export", "mentalglm data import"):
        return anything(target)
    return working_on(target) if target.suffix else working_in(target)


@pytest.mark.parametrize("command", WRITES)
def test_two_at_once(world, capsys, command):
    """The second says who is at it, at once."""
    target = world / WRITES[command][1]
    with lock_of(target, command):
        before = contents(world)
        outcome = called(command, capsys)
        says = rf"{target.name}: process {os.getpid()} on {socket.gethostname()} works on it; wait"
        refused(outcome, says, code=1)
        assert contents(world) == before


HOLD = """import sys, time, pathlib
from mentalglm_jax.files import {how}
with {how}(pathlib.Path(sys.argv[1]), *[lambda _: None] * ("{how}" == "replace_dir")) as inside:
    (inside or pathlib.Path(sys.argv[1])).joinpath("half").write_text("half") if "{how}" != "working_on" else None
    print("holding", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(how: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD.format(how=how), target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "holding\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["replace_dir", "working_in", "working_on"])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, how):
    enter = {"replace_dir": anything, "working_in": working_in, "working_on": working_on}[how]
    target = tmp_path / "target"
    with holder(how, target) as process:
        began = time.monotonic()
        with pytest.raises(RunError, match=f"process {process.pid} on "), enter(target):
            pass
        assert time.monotonic() - began < 100
        process.send_signal(signal.SIGKILL)
        process.wait()
        with enter(target):
            pass
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("content", [b"", b"\xff\n\xff", b"1\n\x1b[31m\n", b"9" * 5000, b"1\nhost\n"],
                         ids=["empty", "not UTF-8", "control characters", "long", "another machine"])  # fmt: skip
def test_a_lock_file_with_foreign_content(tmp_path, content):
    with working_in(tmp_path / "run"):
        (tmp_path / "run" / ".lock").write_bytes(content)
        with pytest.raises(RunError) as refusal, working_in(tmp_path / "run"):
            pass
    says = str(refusal.value)
    assert says.isprintable() and len(says) < 500 and ("another" in says)


@pytest.mark.parametrize("kind", ["a link", "a second name", "a pipe", "a directory"])
def test_a_lock_file_that_is_another_file(tmp_path, kind):
    lock, mine = tmp_path / "run" / ".lock", tmp_path / "mine"
    lock.parent.mkdir()
    mine.write_text("mine")
    put = {"a link": lambda: lock.symlink_to(mine), "a second name": lambda: lock.hardlink_to(mine),
           "a pipe": lambda: os.mkfifo(lock), "a directory": lock.mkdir}  # fmt: skip
    put[kind]()
    with pytest.raises(RunError, match=r"\.lock is a link, a pipe or a directory"), working_in(tmp_path / "run"):
        pass
    assert mine.read_text() == "mine"


def test_a_lock_with_two_names_that_is_one(tmp_path):
    """As ``filelock`` has it where the file system knows no locks."""
    (tmp_path / "run").mkdir()
    (tmp_path / "claim").write_text("1\nhost\n")
    (tmp_path / "run" / ".lock").hardlink_to(tmp_path / "claim")
    with working_in(tmp_path / "run"):
        pass


def test_what_a_killed_process_left_is_removed_by_the_next_of_the_same_target_only(tmp_path):
    with holder("replace_dir", tmp_path / "out") as process, holder("replace_dir", tmp_path / "out.b") as other:
        process.kill()
        process.wait()
        foreign = [tmp_path / name for name in (".out.settings", ".out.0123456789abcdef", ".outer", "out.unfinished")]
        for path in foreign:
            path.write_text("mine")
        (tmp_path / ".out.00000000000000aa.unfinished").symlink_to(tmp_path / "out.unfinished")
        with anything(tmp_path / "out.c"):
            assert len(list(tmp_path.glob(".out.*.unfinished/half"))) == 2  # neither's business
        with anything(tmp_path / "out") as inside:
            (inside / "whole").write_text("whole")
        (left,) = tmp_path.glob(".out.*.unfinished/half")
        assert left.parent.name.startswith(".out.b.")
        assert all(path.read_text() == "mine" for path in foreign)
        other.kill()
    assert (tmp_path / "out" / "whole").exists()


def test_killed_between_two_renames_the_old_directory_comes_back(tmp_path):
    """Where the system cannot exchange two directories in one step."""
    old = tmp_path / ".out.0123456789abcdef.unfinished.old"
    old.mkdir()
    (old / "file").write_text("old")
    with pytest.raises(RunError, match="stopped"), anything(tmp_path / "out"):
        raise RunError("stopped")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    half = tmp_path / ".generations.jsonl.0123456789abcdef.unfinished"
    half.write_text("a post")
    write_bytes(tmp_path / "generations.jsonl", b"whole")
    assert half.exists()  # it may be another process's, who knows
    with working_in(tmp_path):
        assert not half.exists()
