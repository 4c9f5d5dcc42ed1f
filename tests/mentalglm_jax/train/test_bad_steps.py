"""Steps without a finite gradient are skipped, counted, remembered over a resume, and end a run that has no others."""

import os
import signal
from typing import Any

import numpy as np
import pytest

from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.devices.stopping import Interrupted
from mentalglm_jax.errors import RunError
from mentalglm_jax.train import loop
from tests.mentalglm_jax.runs import EXAMPLES, one_line, run, steps_saved
from tests.mentalglm_jax.tiny import rows, same


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
