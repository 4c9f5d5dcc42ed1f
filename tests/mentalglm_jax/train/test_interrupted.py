"""A run that was stopped in any way and started again is the run that was never stopped: the same losses, the same
parameters, bit for bit, with dropout and post masking on."""

import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mentalglm_jax.devices.stopping import Interrupted, StopSignal
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.train.loop import Surroundings, train
from tests.mentalglm_jax.runs import EXAMPLES, MASKED, MODELS, one_line, run, steps_saved
from tests.mentalglm_jax.tiny import parameters, rows, same, tiny_config, tiny_model


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_bit_for_bit(whole, tmp_path, number):
    for at in (3, 6, 12):  # between two saves, again, and with the last step
        before = signal.getsignal(number)
        with pytest.raises(
            Interrupted, match=rf"interrupted at step {at} of 12; saved in .*the same command continues"
        ) as stopped:
            run(tmp_path, at, lambda: os.kill(os.getpid(), number))
        assert stopped.value.exit_code == (75 if number == signal.SIGTERM else 1)
        assert signal.getsignal(number) is before
        assert steps_saved(tmp_path)[-1] == str(at)
        assert rows(tmp_path) == whole[2][:at]
    result, values = run(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])
    assert (result.loss, result.accuracy) == (whole[0].loss, whole[0].accuracy)


def test_an_interrupted_model_holds_the_last_step(whole, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert same(parameters(MODELS[-1]), whole[1])


def test_a_second_ctrl_c_acts_at_once(whole, tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 6, twice)
    assert steps_saved(tmp_path) == ["4"]
    _, values = run(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])


def test_signals_outside_the_main_thread_stay_as_they_are():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(*before, False)]


def child(directory: Path, *arguments: object) -> subprocess.Popen:
    """This file run as a program: ``main`` below, in a process of its own."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(directory), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_process_goes_on_bit_for_bit(whole, tmp_path):
    process = child(tmp_path, 7)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, errors
    assert steps_saved(tmp_path) == ["4"]
    _, values = run(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("os.mkdir 8.orbax-checkpoint-tmp", marks=pytest.mark.slow),  # nothing of the step is there yet
        pytest.param("open state.orbax-checkpoint-tmp/commit_success", marks=pytest.mark.slow),  # in the middle
        "os.rename 8.orbax-checkpoint-tmp",  # all of it is written, under its temporary name
    ],
)
def test_a_kill_during_saving_falls_back(whole, tmp_path, moment):
    process = child(tmp_path, 0, moment)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, errors
    assert "8" not in steps_saved(tmp_path) and "4" in steps_saved(tmp_path)
    if not moment.startswith("os.mkdir"):
        assert "8.orbax-checkpoint-tmp" in steps_saved(tmp_path)
    taken = []
    model = tiny_model(dropout=0.3)
    train(model, EXAMPLES, tiny_config(**MASKED), tmp_path, trainable="lora", seed=3,
          around=Surroundings(progress=lambda done, total, text: taken.append(done)))  # fmt: skip
    assert taken == list(range(5, 13))
    assert rows(tmp_path) == whole[2] and same(parameters(model), whole[1])
    assert steps_saved(tmp_path) == ["8", "12"]  # what the killed save left is gone


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(tmp_path):
    """One run, killed twenty times at random steps, saving after every step so that many kills fall into a save."""
    many: dict[str, Any] = {"steps": 100, "save_every": 1}
    _, wanted = run(tmp_path / "reference", **many)
    moments = random.Random(0)
    for _ in range(20):
        process = child(tmp_path / "run", 0)
        assert process.stdout is not None
        last = moments.randrange(1, 5)
        for seen, _line in enumerate(process.stdout, start=1):  # one line per step
            if seen == last:
                time.sleep(moments.uniform(0, 0.05))
                process.kill()
                break
        _, errors = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, errors
    _, values = run(tmp_path / "run", **many)
    assert rows(tmp_path / "run") == rows(tmp_path / "reference")  # no row of data repeated or left out
    assert same(values, wanted)


def test_a_full_disk_stops_the_run_and_loses_nothing(whole, tmp_path):
    """The file system refuses what the save of step 8 writes (a limit on the size of files stands in for the space)."""
    process = child(tmp_path, 0, "full disk")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 1, errors
    assert re.fullmatch(r".*(cannot save the checkpoint|could not be written) \(File too large\)", output), errors
    assert "8" not in steps_saved(tmp_path) and "4" in steps_saved(tmp_path)
    _, values = run(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])


# As in test_checkpoint.py.
damaged = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


def truncate(directory: Path, *steps: int) -> None:
    for step in steps:
        for path in (directory / "checkpoints" / str(step)).rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@damaged
def test_a_truncated_checkpoint_falls_back_and_the_run_still_ends_the_same(whole, tmp_path, caplog):
    directory = tmp_path / "copy"
    shutil.copytree(whole[3], directory)
    truncate(directory, 12)
    with caplog.at_level(logging.WARNING, logger="mentalglm_jax"):
        _, values = run(directory)
    assert "12: damaged checkpoint" in caplog.text and "going on from step 8" in caplog.text
    assert rows(directory) == whole[2] and same(values, whole[1])
    assert steps_saved(directory) == ["8", "12", "12.damaged"]
    _, values = run(directory, 12, lambda: pytest.fail("the repaired checkpoint was not used"))
    assert same(values, whole[1])


@damaged
def test_nothing_but_damaged_checkpoints_is_one_line(whole, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(whole[3], directory)
    truncate(directory, 8, 12)
    with pytest.raises(RunError) as error:
        run(directory)
    assert "none of the checkpoints 8, 12 can be read" in one_line(error.value, 1)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError) as error:
        run(tmp_path / "file" / "run")
    assert "cannot keep checkpoints there" in one_line(error.value, 1)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        run(tmp_path / "run")
    assert f"{tmp_path}/run/metrics.jsonl: cannot be read, it is not a file" in one_line(error.value, 2)


def test_a_save_that_fails_stops_the_run_in_one_line(tmp_path):
    def block() -> None:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("in the way")

    with pytest.raises(RunError) as error:
        run(tmp_path, 3, block)
    assert "checkpoint" in one_line(error.value, 1)


def main(directory: str, kill_at: str, moment: str = "") -> None:
    """Trains in a process of its own that kills itself, as by the power switch.

    After step ``kill_at``, once the save of step 4 is on disk; or, with 0, at ``moment``: an audit event of Python and
    a part of the path it names. With neither it prints a line per step and saves after every one.
    """

    def act() -> None:
        while not (Path(directory) / "checkpoints" / "4").exists():  # saving is asynchronous
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if int(kill_at):
        run(Path(directory), int(kill_at), act)
        return
    if moment == "full disk":

        def limit() -> None:
            while not (Path(directory) / "checkpoints" / "4").exists():
                time.sleep(0.01)
            sys.dont_write_bytecode = True  # it would be cut short without a word
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

        try:
            run(Path(directory), 7, limit)
        except RunError as error:
            sys.stdout.write(str(error))
            sys.exit(error.exit_code)
    if moment:
        event, path = moment.split(" ")

        def hook(name: str, arguments: Any) -> None:
            if name == event and "checkpoints/8" in str(arguments[0]) and path in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run(Path(directory))
        return
    model = tiny_model(dropout=0.3)
    config = tiny_config(**MASKED, steps=100, save_every=1)

    def progress(done: int, total: int, text: str) -> None:
        sys.stdout.write(f"{done}\n")
        sys.stdout.flush()

    train(model, EXAMPLES, config, Path(directory), trainable="lora", seed=3, around=Surroundings(progress=progress))


if __name__ == "__main__":
    main(*sys.argv[1:])
