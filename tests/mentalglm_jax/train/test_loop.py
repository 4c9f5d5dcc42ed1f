"""A run that was stopped in any way and started again is the run that was never stopped: the same losses, the same
parameters, bit for bit, with dropout and post masking on."""

import dataclasses
import json
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

import jax
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.train import loop
from mentalglm_jax.train.loop import Interrupted, StopSignal, Surroundings, TrainResult, train
from mentalglm_jax.train.loss import answer_loss
from tests.mentalglm_jax.tiny import parameters, rows, same, tiny_config, tiny_examples, tiny_model

pytestmark = pytest.mark.usefixtures("compile_cache")
EXAMPLES = [{**item, "post": (0, 3), "id": f"record-{n}"} for n, item in enumerate(tiny_examples(30))]
HELD_OUT = tiny_examples(11, seed=9)
ALONE = Surroundings()
MASKED: dict[str, Any] = {"mask_posts": 0.5}
MODELS: list[Glm] = []  # what the calls of ``run`` trained, also those that raised


def run(
    directory: Path, at: int = 0, act: Any = None, examples: Any = EXAMPLES, seed: int = 3, evaluation: Any = (),
    around: Surroundings = ALONE, **changes: Any,
):  # fmt: skip
    """Trains the tiny model; ``act()`` is called after step ``at``. Returns the result and the parameters."""
    model = tiny_model(dropout=0.3)

    def progress(done: int, total: int, text: str) -> None:
        if act is not None and done == at:
            act()

    config = tiny_config(**(MASKED | changes))
    around = dataclasses.replace(around, progress=progress)
    try:
        result = train(model, examples, config, directory, trainable="lora", seed=seed, evaluation=evaluation,
                       around=around)  # fmt: skip
    finally:
        MODELS.append(model)
    return result, parameters(model)


def steps_saved(directory: Path) -> list[str]:
    return sorted((path.name for path in (directory / "checkpoints").iterdir()), key=lambda name: (len(name), name))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compile_cache):
    """The run that nothing happened to: (result, parameters, rows of metrics.jsonl, its directory)."""
    directory = tmp_path_factory.mktemp("whole")
    result, values = run(directory)
    return result, values, rows(directory), directory


def test_a_whole_run(whole):
    result, values, lines, directory = whole
    assert isinstance(result, TrainResult)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert steps_saved(directory) == ["8", "12"]
    assert (result.steps, result.loss, result.accuracy) == (12, lines[-1]["loss"], lines[-1]["accuracy"])
    assert result.skipped_steps == 0 and result.tokens_per_second > 0 and result.lengths.examples == 30
    assert len({line["loss"] for line in lines}) == 12
    before = parameters(tiny_model(dropout=0.3))
    assert {name for name in before if (values[name] != before[name]).any()} == {
        n for n in before if n.endswith((".a", ".b"))
    }
    np.testing.assert_allclose([line["learning_rate"] for line in lines[:4]], [0, 1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-6)
    # What a step counted is what its batch held.
    batches = iter(PackedBatches(EXAMPLES, rows=4, sequence_length=32, targets_per_row=None, seed=3))
    assert [line["targets"] for line in lines] == [next(batches)["target_weights"].sum() for _ in range(12)]


def test_a_run_learns(tmp_path):
    """The same eight examples in every step: random answers can be learnt by heart, whatever the machine rounds to."""
    run(tmp_path, examples=EXAMPLES[:8], learning_rate=3e-2, steps=30, mask_posts=0.0, save_every=100)
    losses = [line["loss"] for line in rows(tmp_path)]
    assert len({line["targets"] for line in rows(tmp_path)}) == 1
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


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


def evaluations(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]


def test_evaluation_on_the_way(whole, tmp_path):
    """It changes nothing of the training, is the plain loss of the parameters, and is told again after a resume."""
    seen, read = [], []

    def sample(model: Glm) -> list[dict[str, Any]]:
        seen.append(parameters(model))
        return [{"id": "a", "answer": str(len(seen))}]

    around = Surroundings(sample=sample)
    whole_dir, parts = tmp_path / "whole", tmp_path / "parts"
    result, values = run(whole_dir, 10, lambda: read.append(rows(whole_dir)), evaluation=HELD_OUT, eval_every=5,
                         around=around)  # fmt: skip
    assert rows(whole_dir) == whole[2] and same(values, whole[1]) and same(seen[-1], values)
    assert read == [whole[2][:10]]  # the directory of a running run can be read
    found = evaluations(whole_dir)
    assert [row["step"] for row in found] == [5, 10, 12] and found[1]["samples"] == [{"id": "a", "answer": "2"}]
    losses = [row["loss"] for row in found]
    assert result.best == (found[int(np.argmin(losses))]["step"], min(losses))
    batches = PackedBatches(HELD_OUT, rows=16, sequence_length=32, targets_per_row=None, seed=1)
    assert batches.steps_per_epoch() == 1
    graph, state = nnx.split(MODELS[-1])
    loss = jax.jit(lambda state, batch: answer_loss(nnx.merge(graph, state), batch, chunk=1000))
    sums = loss(state, next(iter(batches)))
    assert losses[-1] == pytest.approx(float(sums.nll / sums.weight), rel=1e-6)
    assert found[-1]["accuracy"] == pytest.approx(float(sums.correct / sums.weight), rel=1e-6)
    with pytest.raises(Interrupted):
        run(parts, 7, lambda: os.kill(os.getpid(), signal.SIGTERM), evaluation=HELD_OUT, eval_every=5)
    again, values = run(parts, evaluation=HELD_OUT, eval_every=5)
    assert [row["loss"] for row in evaluations(parts)] == losses and again.best == result.best
    assert rows(parts) == whole[2] and same(values, whole[1])


def test_a_run_can_end_with_its_best_step(tmp_path):
    """At this learning rate the development loss rises again; the average of the parameters is what is scored."""
    seen = []
    around = Surroundings(sample=lambda model: seen.append(parameters(model)) or [])
    settings: dict[str, Any] = {"evaluation": HELD_OUT, "eval_every": 2, "final": "best", "ema_decay": 0.5,
                                "keep_last": 1, "learning_rate": 5e-2}  # fmt: skip
    result, values = run(tmp_path, around=around, **settings)
    assert result.best is not None and result.best[0] < 12  # else there is nothing to see here
    assert same(values, seen[result.best[0] // 2 - 1]) and not same(values, seen[-1])
    assert steps_saved(tmp_path) == [str(result.best[0]), "12"]
    again, values = run(tmp_path, 12, lambda: pytest.fail("a step was taken"), **settings)
    assert again.best == result.best and same(values, seen[result.best[0] // 2 - 1])


def test_evaluation_needs_examples(tmp_path):
    with pytest.raises(InputError, match="eval_every is set, but there are no development examples"):
        run(tmp_path, eval_every=5)


def test_a_profile_is_written_and_changes_nothing(whole, tmp_path):
    run(tmp_path, around=Surroundings(profile=True))
    assert rows(tmp_path) == whole[2]
    assert [path for path in (tmp_path / "profile").rglob("*.xplane.pb") if path.stat().st_size > 10_000]


def test_a_changed_recipe_can_be_allowed(whole, tmp_path, caplog):
    directory = tmp_path / "copy"
    shutil.copytree(whole[3], directory)
    shutil.rmtree(directory / "checkpoints" / "12")
    with caplog.at_level(logging.WARNING, logger="mentalglm_jax"):
        run(directory, around=Surroundings(allow_changed=True), learning_rate=2e-2)
    assert "train.learning_rate: 0.01 -> 0.02; going on with the new values" in caplog.text
    found = rows(directory)
    assert found[:8] == whole[2][:8]
    assert found[8]["learning_rate"] == pytest.approx(2 * whole[2][8]["learning_rate"])
    # What is saved now is of the new recipe.
    with pytest.raises(InputError, match=r"train.learning_rate: 0.02 -> 0.01"):
        run(directory)
    # An average of the parameters is one more array per parameter: the reason comes first, and nothing is deleted.
    with pytest.raises(InputError, match=r"recipe: train.ema_decay: None -> 0.9; .*Its arrays do not fit this one"):
        run(directory, around=Surroundings(allow_changed=True), learning_rate=2e-2, ema_decay=0.9)
    assert steps_saved(directory)[-1] == "12"


def child(directory: Path, cache: dict[str, str], *arguments: object) -> subprocess.Popen:
    """This file run as a program: ``main`` below, in a process of its own."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, **cache, "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(directory), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_process_goes_on_bit_for_bit(whole, compile_cache, tmp_path):
    process = child(tmp_path, compile_cache, 7)
    _, errors = process.communicate(timeout=250)
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
def test_a_kill_during_saving_falls_back(whole, compile_cache, tmp_path, moment):
    process = child(tmp_path, compile_cache, 0, moment)
    _, errors = process.communicate(timeout=250)
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
def test_twenty_kills_at_random_moments(compile_cache, tmp_path):
    """One run, killed twenty times at random steps, saving after every step so that many kills fall into a save."""
    many: dict[str, Any] = {"steps": 100, "save_every": 1}
    _, wanted = run(tmp_path / "reference", **many)
    moments = random.Random(0)
    for _ in range(20):
        process = child(tmp_path / "run", compile_cache, 0)
        assert process.stdout is not None
        last = moments.randrange(1, 5)
        for seen, _line in enumerate(process.stdout, start=1):  # one line per step
            if seen == last:
                time.sleep(moments.uniform(0, 0.05))
                process.kill()
                break
        _, errors = process.communicate(timeout=250)
        assert process.returncode == -signal.SIGKILL, errors
    _, values = run(tmp_path / "run", **many)
    assert rows(tmp_path / "run") == rows(tmp_path / "reference")  # no row of data repeated or left out
    assert same(values, wanted)


def test_a_full_disk_stops_the_run_and_loses_nothing(whole, compile_cache, tmp_path):
    """The file system refuses what the save of step 8 writes (a limit on the size of files stands in for the space)."""
    process = child(tmp_path, compile_cache, 0, "full disk")
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 1, errors
    assert re.fullmatch(r".*(cannot save the checkpoint|could not be written) \(File too large\)", output), errors
    assert "8" not in steps_saved(tmp_path) and "4" in steps_saved(tmp_path)
    _, values = run(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])


def test_a_finished_run_is_not_repeated(whole, tmp_path):
    """What a pipeline does that was killed between the last step and noting it: the same result, nothing trained."""
    result, values, lines, directory = whole
    shutil.copytree(directory, tmp_path / "copy")
    again, same_values = run(tmp_path / "copy", 12, lambda: pytest.fail("a step was taken"))
    assert (again.steps, again.loss, again.accuracy) == (12, result.loss, result.accuracy)
    assert same(same_values, values) and rows(tmp_path / "copy") == lines


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


def one_line(error: BaseException, code: int) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 700 and getattr(error, "exit_code", None) == code
    return text


@damaged
def test_nothing_but_damaged_checkpoints_is_one_line(whole, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(whole[3], directory)
    truncate(directory, 8, 12)
    with pytest.raises(RunError) as error:
        run(directory)
    assert "none of the checkpoints 8, 12 can be read" in one_line(error.value, 1)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"learning_rate": 2e-2}, "train.learning_rate: 0.01 -> 0.02"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"steps": 13}, "steps: 12 -> 13"),
        ({"examples": EXAMPLES[1:]}, "examples.count: 30 -> 29"),
        ({"examples": [*EXAMPLES[1:], EXAMPLES[0]]}, "examples.sha256: "),
    ],
)
def test_another_recipe_is_refused(whole, changes, key):
    with pytest.raises(InputError) as error:
        run(whole[3], **changes)
    assert key in one_line(error.value, 2)
    assert rows(whole[3]) == whole[2] and steps_saved(whole[3]) == ["8", "12"]  # untouched


@pytest.mark.parametrize(
    ("model", "trainable", "key"),
    [
        ("dora", "lora", "parameters.layers.mlp.down_proj.adapter.magnitude"),
        ("lora", "all", "trainable: 'lora' -> 'all'"),
    ],
)
def test_another_adapter_is_refused(whole, model, trainable, key):
    with pytest.raises(InputError) as error:
        train(tiny_model(dora=model == "dora"), EXAMPLES, tiny_config(**MASKED), whole[3], trainable=trainable, seed=3)
    assert key in str(error.value)


def test_the_callers_identity_counts(tmp_path):
    settings: dict[str, Any] = {"trainable": "lora", "seed": 0}
    config = tiny_config(steps=1)
    train(tiny_model(), EXAMPLES, config, tmp_path, identity={"base": "one"}, **settings)
    with pytest.raises(InputError, match="base: 'one' -> 'two'"):
        train(tiny_model(), EXAMPLES, config, tmp_path, identity={"base": "two"}, **settings)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError) as error:
        run(tmp_path / "file" / "run")
    assert "cannot keep checkpoints there" in one_line(error.value, 1)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(RunError) as error:
        run(tmp_path / "run")
    assert f"{tmp_path}/run: cannot write there (Is a directory)" in one_line(error.value, 1)


def test_a_save_that_fails_stops_the_run_in_one_line(tmp_path):
    def block() -> None:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("in the way")

    with pytest.raises(RunError) as error:
        run(tmp_path, 3, block)
    assert "checkpoint" in one_line(error.value, 1)


@pytest.fixture
def poison(monkeypatch):
    """Makes the batches of the given steps useless (the iterator and the rest of the loop stay as they are)."""
    real = loop._micro_batches

    def set_steps(*steps: int, start: int = 0) -> None:
        count = [start]

        def micro_batches(*arguments: Any) -> dict[str, Any]:
            count[0] += 1
            batch = real(*arguments)
            if count[0] in steps:
                batch["target_weights"] = batch["target_weights"] * np.float32("nan")
            return batch

        monkeypatch.setattr(loop, "_micro_batches", micro_batches)

    return set_steps


def test_bad_steps_are_skipped_counted_and_remembered(tmp_path, poison):
    poison(5, 6, 9)
    result, values = run(tmp_path / "whole", max_bad_steps=3)
    assert result.skipped_steps == 3 and np.isfinite(result.loss)
    lines = rows(tmp_path / "whole")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [line["step"] for line in lines if line["loss"] is None] == [5, 6, 9]
    # The schedule waits for a skipped step: the next one has its learning rate.
    rates = [line["learning_rate"] for line in lines]
    assert rates[4] == rates[5] == rates[6] and rates[3] != rates[4] and rates[6] != rates[7]
    # A resumed run still knows what it skipped, also in a row.
    poison(5, 6, 9)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", 5, lambda: os.kill(os.getpid(), signal.SIGTERM), max_bad_steps=3)
    poison(5, 6, 9, start=5)
    again, same_values = run(tmp_path / "parts", max_bad_steps=3)
    assert again.skipped_steps == 3 and rows(tmp_path / "parts") == lines and same(values, same_values)


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path, poison):
    poison(6, 7, 8)
    with pytest.raises(RunError) as error:
        run(tmp_path, max_bad_steps=3)
    text = one_line(error.value, 1)
    assert "3 steps in a row had no finite gradient (last: step 8, loss nan, examples record-" in text
    assert "look at those examples or lower learning_rate" in text
    batches = PackedBatches(EXAMPLES, rows=4, sequence_length=32, targets_per_row=None, seed=3)
    assert f"examples {', '.join(EXAMPLES[n]['id'] for n in batches.examples_of(7)[:8])}" in text
    assert steps_saved(tmp_path) == ["4"]
    # Interrupted in between, the row does not start anew.
    poison(6, 7, 8)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", 7, lambda: os.kill(os.getpid(), signal.SIGTERM), max_bad_steps=3)
    poison(8, start=7)
    with pytest.raises(RunError, match="3 steps in a row"):
        run(tmp_path / "parts", max_bad_steps=3)


def test_a_run_without_any_good_step_says_so(tmp_path, poison):
    poison(1, 2)
    with pytest.raises(RunError, match="none of 2 steps had a finite gradient"):
        run(tmp_path, steps=2)


def test_a_run_whose_last_step_is_no_good_ends_with_the_one_before(tmp_path, poison):
    """Though no finite step was ever due to be logged."""
    poison(4)
    result, _ = run(tmp_path, steps=4, log_every=10)
    assert result.skipped_steps == 1 and np.isfinite(result.loss)
    [line] = rows(tmp_path)
    assert (line["step"], line["loss"]) == (4, None)


def test_epochs_are_batches_that_hold_every_example(tmp_path):
    per_epoch = PackedBatches(EXAMPLES, rows=4, sequence_length=32, targets_per_row=None, seed=3).steps_per_epoch()
    result, _ = run(tmp_path, steps=None, epochs=2)
    assert result.steps == 2 * per_epoch
    targets = sum(len(item["target_ids"]) for item in EXAMPLES)
    assert sum(line["targets"] for line in rows(tmp_path)) == 2 * targets


def test_logging_now_and_then(whole, tmp_path):
    run(tmp_path, steps=7, log_every=3)
    assert [line["step"] for line in rows(tmp_path)] == [3, 6, 7]


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
