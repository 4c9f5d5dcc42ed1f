"""Early stopping ends a stage at the right step, with its best, also when the run was stopped in between; and a
finished run can be made longer where its schedule allows."""

import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from mentalglm_jax.devices.stopping import Interrupted
from mentalglm_jax.errors import InputError
from mentalglm_jax.train.loop import Surroundings, _Tally
from mentalglm_jax.train.recipe import EarlyStopping
from tests.mentalglm_jax.runs import HELD_OUT, run, steps_saved
from tests.mentalglm_jax.tiny import parameters, rows, same, tiny_config


def config(patience: int, metric: str = "loss", min_delta: float = 0.0):
    stops = EarlyStopping.model_validate({"patience": patience, "metric": metric, "min_delta": min_delta})
    return tiny_config(eval_every=1, early_stopping=stops)


def stopped_at(settings, values: list[float], metric: str = "loss") -> tuple[int | None, _Tally]:
    """After which of the evaluations patience is used up, the counts passing through JSON as in a checkpoint."""
    tally = _Tally()
    for step, value in enumerate(values, start=1):
        tally = _Tally.read(json.loads(json.dumps(vars(tally))) | {"of_a_later_version": 1})
        tally.note(step, {"loss": 1.0, "accuracy": 0.5, metric: float(value)}, settings)
        if tally.out_of_patience(settings):
            return step, tally
    return None, tally


@pytest.mark.parametrize(
    ("patience", "min_delta", "values", "stop", "best"),
    [
        (2, 0.0, [3, 2, 2.5, 2.1, 1], 4, 2),
        (2, 0.0, [3, 2, 2.5, 1.9, 1.8, 1.85, 1.8, 9], 7, 7),  # of two equals the later, which is no better
        (1, 0.0, [3, 3], 2, 2),
        (2, 0.5, [3, 2.8, 2.6, 0], 3, 3),  # better, but by no more than min_delta: counted, and still the best
        (2, 0.5, [3, 2.7, 2.4, 2.3, 2.2], 5, 5),  # against the last that counted, not the last
        (3, 0.0, [3, math.nan, math.inf, math.nan], 4, 1),
        (2, 0.0, [math.nan, math.nan], 2, None),
        (3, 0.0, [3, 2, 1], None, 3),
    ],
)
def test_patience(patience, min_delta, values, stop, best):
    at, tally = stopped_at(config(patience, min_delta=min_delta), values)
    assert (at, tally.best_step) == (stop, best)


def test_accuracy_is_to_rise():
    at, tally = stopped_at(config(2, "accuracy"), [0.5, 0.7, 0.6, 0.7, 0.9], "accuracy")
    assert (at, tally.best_step, tally.best) == (4, 4, 0.7)


def test_without_early_stopping_nothing_stops():
    assert stopped_at(tiny_config(eval_every=1), [1.0, 2.0, 3.0, 4.0])[0] is None


STOPS: dict[str, Any] = {"evaluation": HELD_OUT, "eval_every": 2, "learning_rate": 5e-2, "keep_last": 1, "steps": 20,
                         "early_stopping": EarlyStopping(patience=2)}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stops early: at this learning rate the development loss rises again."""
    directory, seen = tmp_path_factory.mktemp("stopped"), []
    around = Surroundings(sample=lambda model: seen.append(parameters(model)) or [])
    result, values = run(directory, around=around, **STOPS)
    losses = [json.loads(line)["loss"] for line in (directory / "evaluation.jsonl").read_text("utf-8").splitlines()]
    return result, values, directory, seen, losses


def test_a_run_stops_early_and_ends_with_its_best(stopped):
    result, values, directory, seen, losses = stopped
    best = losses.index(min(losses))
    assert (result.planned, result.steps) == (20, 2 * (best + 1 + 2)) and result.steps < 20  # two evaluations later
    assert result.best == (2 * (best + 1), min(losses))
    assert same(values, seen[best]) and not same(values, seen[-1])
    assert steps_saved(directory) == [str(result.best[0]), str(result.steps)]


def test_killed_in_between_it_stops_at_the_same_step(stopped, tmp_path):
    """Also when the kill comes after an evaluation that used some patience up, and with the last step."""
    result, values, directory, _, losses = stopped
    for at in (result.steps - 1, result.steps):
        with pytest.raises(Interrupted):
            run(tmp_path, at, lambda: os.kill(os.getpid(), signal.SIGTERM), **STOPS)
    again, others = run(tmp_path, **STOPS)
    assert (again.steps, again.best, again.planned) == (result.steps, result.best, 20)
    assert rows(tmp_path) == rows(directory) and same(others, values)
    found = [json.loads(line)["loss"] for line in (tmp_path / "evaluation.jsonl").read_text("utf-8").splitlines()]
    assert found == losses


@pytest.mark.slow
def test_finished_early_it_is_not_gone_on_with_unless_patience_is_raised(stopped, tmp_path, caplog):
    result, values, directory, *_ = stopped
    shutil.copytree(directory, tmp_path / "copy")
    again, others = run(tmp_path / "copy", result.steps + 1, lambda: pytest.fail("a step was taken"), **STOPS)
    assert again.steps == result.steps and same(others, values)
    patient = STOPS | {"early_stopping": EarlyStopping(patience=3)}
    straight, wanted = run(tmp_path / "straight", **patient)
    assert straight.steps > result.steps
    with caplog.at_level(logging.WARNING, logger="mentalglm_jax"):
        longer, found = run(tmp_path / "copy", around=Surroundings(allow_changed=True), **patient)
    assert "train.early_stopping.patience: 2 -> 3; going on" in caplog.text
    assert longer.steps == straight.steps and longer.best == straight.best and same(found, wanted)
    assert rows(tmp_path / "copy") == rows(tmp_path / "straight")


@pytest.mark.slow
def test_a_constant_schedule_made_longer_is_the_longer_run(tmp_path):
    """Bit for bit: nothing of a state depends on the end of its run."""
    constant: dict[str, Any] = {"schedule": "constant", "warmup_ratio": 0.0}
    _, wanted = run(tmp_path / "straight", steps=9, **constant)
    run(tmp_path / "run", steps=6, **constant)
    with pytest.raises(InputError, match=r"train\.steps: 6 -> 9"):
        run(tmp_path / "run", steps=9, **constant)
    _, found = run(tmp_path / "run", steps=9, around=Surroundings(allow_changed=True), **constant)
    assert same(found, wanted) and rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_development_loss_that_is_not_a_number_is_written_as_json(tmp_path):
    from mentalglm_jax.train.metrics import MetricsLog

    log = MetricsLog(Path(tmp_path), 0)
    log.write_evaluation(1, {"loss": math.nan, "accuracy": 0.5}, [])
    log.close()
    log = MetricsLog(Path(tmp_path), 1)  # and is not dropped as damaged by a run that goes on
    log.close()
    line = (tmp_path / "evaluation.jsonl").read_text("utf-8")
    assert json.loads(line) == {"step": 1, "loss": None, "accuracy": 0.5, "samples": []}
