"""Optuna's search over runs: its proposals reach the recipe, it goes on where it stopped, bad input is one line.

The runs are files that a function of the values writes, as finished runs have them; test_sweep.py has real ones.
"""

import json
import math
import sys
from pathlib import Path

import pytest

from mentalglm_jax.errors import InputError
from mentalglm_jax.pipeline.search import JOURNAL, read_spaces, search
from mentalglm_jax.train.recipe import load_recipe, what_it_is
from tests.hostile import attack

ONE = "stages=[{name: a, train: {steps: 1, rows: 2, eval_every: 1}}]"
RATE = "train.learning_rate=log:1e-6:1"


class Runs:
    """Stands for `mentalglm train`: the development loss is how far the learning rate is from 1e-3, in decades."""

    def __init__(self, stop_at: int | None = None):
        self.rates: list[float] = []
        self.stop_at = stop_at

    def __call__(self, arguments, log: Path, stopped) -> int:
        if arguments[0] == "evaluate":
            return 0
        recipe = load_recipe(arguments[1], arguments[3::2])
        if len(self.rates) == self.stop_at:
            raise KeyboardInterrupt
        rate = recipe.stages[0].train.learning_rate
        self.rates.append(rate)
        if rate > 0.1:
            return 1
        recipe.run_dir.mkdir(parents=True)
        best = {"step": 1, "loss": abs(math.log10(rate) + 3) + 0.01 * recipe.seed}
        state = {"recipe": what_it_is(recipe), "stages": {"train a": {"best": best}, "generate": {}, "evaluate": {}}}
        (recipe.run_dir / "run.json").write_text(json.dumps(state))
        scores = {"n": 1, "weighted_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.5, "ci95": [0.0, 1.0], "floors": {}}
        (recipe.run_dir / "evaluation.json").write_text(json.dumps({"suicide_risk": scores}))
        return 0


def test_proposals_get_better_and_failures_count(small, tmp_path):
    runs, said = Runs(), []
    _, found = search(
        small, read_spaces([RATE]), 25, out=tmp_path / "out", overrides=[ONE], say=said.append, start=runs
    )
    assert len(runs.rates) == 25 and any(rate > 0.1 for rate in runs.rates)
    rows = found["points"]
    assert [row["state"] for row in rows] == ["failed" if rate > 0.1 else "done" for rate in runs.rates]
    good = [abs(math.log10(rate) + 3) for rate in runs.rates]
    assert sum(good[15:]) / 10 < sum(good[:10]) / 10  # what was found is used
    best = min(row["development"]["loss"] for row in rows if row["development"])
    assert found["table"][0]["development"]["loss"][0] == best == pytest.approx(min(good))
    assert json.loads((tmp_path / "out/sweep.json").read_text("utf-8")) == found
    assert len([line for line in said if line.startswith("trial ")]) == 25


def test_a_search_goes_on_with_the_run_that_was_under_way(small, tmp_path):
    """Two seeds a trial; stopped in the second of them, in the third trial."""
    settings = {"seeds": 2, "out": tmp_path / "out", "overrides": [ONE], "say": lambda line: None}
    stopped = Runs(stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        search(small, read_spaces(["train.learning_rate=log:1e-6:0.1"]), 4, start=stopped, **settings)
    runs = Runs()
    _, found = search(small, read_spaces(["train.learning_rate=log:1e-6:0.1"]), 4, start=runs, **settings)
    assert len(runs.rates) == 3 and runs.rates[0] == stopped.rates[4]  # the other seed, then both of the last trial
    assert [row["state"] for row in found["points"]] == ["done"] * 8
    assert [row["runs"] for row in found["table"]] == [2] * 4 and found["table"][0]["development"]["loss"][1] > 0
    assert search(small, read_spaces([RATE]), 4, start=lambda *a: pytest.fail("again"), **settings)[1] == found


def test_values_that_do_not_go_together_are_a_failed_trial(small, tmp_path):
    said = []
    spaces = read_spaces(["train.rows=2,3", "train.accumulate=2"])
    search(small, spaces, 6, out=tmp_path / "out", overrides=[ONE], say=said.append, start=Runs())
    assert [line for line in said if "rows (3) must be a multiple of accumulate (2)" in line]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search", "optuna:3"], "--search needs --space; write it as KEY=log:LOW:HIGH"),
        (["--search", "optuna"], "--search optuna: write it as optuna:N"),
        (["--search", "optuna:0", "--space", RATE], "N from 1 to 1000"),
        (["--search", "hyperopt:3", "--space", RATE], "write it as optuna:N"),
        (["--space", RATE], "--space goes with --search"),
        (["--search", "optuna:3", "--space", RATE, "--grid", "lora.rank=1"], "--search and --grid do not go together"),
        (["--search", "optuna:3", "--space", RATE, "--print"], "--search and --print do not go together"),
        (["--search", "optuna:3", "--space", RATE, "--space", RATE], "--space: a key is given twice"),
        (["--search", "optuna:3", "--space", "lora.rank"], "--space lora.rank: write it as"),
        (["--search", "optuna:3", "--space", "lora.rank=int:1"], "--space lora.rank: write it as"),
        (["--search", "optuna:3", "--space", "lora.rank=int:1.5:3"], "--space lora.rank: write it as"),
        (["--search", "optuna:3", "--space", "lora.rank=int:9:3"], "from 9 to 3 is no int range"),
        (["--search", "optuna:3", "--space", "lora.alpha=log:0:3"], "is no log range"),
        (["--search", "optuna:3", "--space", "lora.alpha=float:0:inf"], "is no float range"),
        (["--search", "optuna:3", "--space", "lora.rnk=int:1:3"], r"unknown key 'lora.rnk' \(did you mean 'rank'"),
        (["--search", "optuna:3", "--space", RATE, "--set", "train.eval_every=null"],
         r"--search goes by the development score of the last stage: set stages\.a\.train\.eval_every"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(small, tmp_path, capsys, options, says):
    command = ["mentalglm", "sweep", small, "--out", tmp_path / "out", "--set", ONE, *options]
    attack.refused(attack.run(command, capsys), says)
    assert not (tmp_path / "out").exists()


def test_without_the_extra(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    command = ["mentalglm", "sweep", small, "--out", tmp_path / "out", "--search", "optuna:2", "--space", RATE]
    attack.refused(attack.run(command, capsys), r"--search needs the sweep extra: .*pip install ")


@pytest.mark.parametrize("damage", ["{", "[]\n", "\x00" * 50 + "\n", '{"op_code": 99, "worker_id": "x"}\n'])
def test_a_damaged_study_is_one_line(small, tmp_path, damage):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text(damage + "\n" + damage)
    with pytest.raises(
        InputError, match=r"optuna\.journal: is of another search, or damaged \(.*; choose another --out"
    ):
        search(
            small, read_spaces([RATE]), 2, out=tmp_path / "out", overrides=[ONE], say=lambda line: None, start=Runs()
        )
