"""A sweep: points and commands, going on, failures that stop nothing, the table; one with real processes."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.cli.sweep import sweep_table
from mentalglm_jax.devices.stopping import Interrupted, Preempted
from mentalglm_jax.errors import InputError
from mentalglm_jax.pipeline import sweep as sweeps
from tests.hostile import attack

ONE = "stages=[{name: a, train: {steps: 1, rows: 1, sequence_length: 128, eval_every: 1, eval_samples: 0}}]"


def in_process(arguments, log: Path, stopped) -> int:
    """A command in this process; its reason goes to the log as a child's does."""
    del stopped
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        main(list(arguments))
    except SystemExit as end:
        log.write_text("mentalglm: it went wrong\n") if end.code else None
        return int(end.code or 0)
    return 0


def test_points_are_every_combination_with_every_seed(small, tmp_path):
    grid = ["train.learning_rate=1e-4,3e-4", "lora.target_modules=all-linear,[q_proj, k_proj]"]
    out, points = sweeps.make_points(small, grid, 2, tmp_path / "it's", ["seed=5"])
    assert len(points) == 8 and len({point.directory for point in points}) == 8
    assert {(p.recipe.stages[0].train.learning_rate, p.recipe.lora.target_modules, p.recipe.seed) for p in points} == {
        (rate, modules, seed) for rate in (1e-4, 3e-4)
        for modules in ("all-linear", ("q_proj", "k_proj")) for seed in (5, 6)
    }  # fmt: skip
    assert points[0].label == "learning_rate=1e-4,target_modules=all-linear/seed-5"
    assert points[0].directory == out / points[0].label and points[0].recipe.run_dir == points[0].directory
    assert sweeps.make_points(small, [], 1)[0] == Path("run-sweep")
    assert sweeps.make_points(small, [], 1, overrides=["run_dir=x/y"])[1][0].directory == Path(
        "x/y-sweep/recipe/seed-0"
    )


def test_names_of_directories_are_harmless_and_tell_points_apart():
    names = [sweeps.point_name([f"model.path={value}"]) for value in ("../a", "/a", "a/b", "a b", "x" * 300, "x" * 301)]
    assert len(set(names)) == 6 and all("/" not in name and len(name) < 120 and name[0] != "." for name in names)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["lora.rank"], "--grid lora.rank: write it as section.key=value,value"),
        (["lora.rank=8,"], "write it as section.key=value,value"),
        (["=8"], "write it as"),
        (["seed=1,2"], "--grid seed: it is what the sweep itself sets; see --seeds"),
        (["lora.rank=8", "lora.rank=9"], "a key is given twice"),
        (["lora.rnk=8"], r"unknown key 'lora.rnk' \(did you mean 'rank'"),
        (["lora.rank=8,many"], "lora.rank: "),
        ([f"lora.rank={','.join(map(str, range(1, 1002)))}"], "1001 runs are more than 1000"),
    ],
)
def test_a_grid_is_checked_before_anything_runs(small, tmp_path, capsys, grid, says):
    options = [part for one in grid for part in ("--grid", one)]
    attack.refused(attack.run(["mentalglm", "sweep", small, *options, "--out", tmp_path / "out"], capsys), says)
    assert not (tmp_path / "out").exists()


def test_a_sweep_goes_on_and_a_failure_stops_nothing(small, tmp_path, capsys):
    said: list[str] = []
    out, points = sweeps.make_points(small, ["train.sequence_length=16,128"], 1, tmp_path / "out", [ONE])
    result = sweeps.sweep(small, out, points, say=said.append, start=in_process)
    states = [(row["state"], row["reason"]) for row in result["points"]]
    assert states == [("failed", "it went wrong (exit code 2)"), ("done", "")]
    assert said[0] == f"2 runs in {out}, 0 of them finished"
    assert said[1:] == ["1/2 sequence_length=16/seed-0: failed: it went wrong (exit code 2)",
                        "2/2 sequence_length=128/seed-0: done"]  # fmt: skip
    assert json.loads((out / "sweep.json").read_text("utf-8")) == result
    best = json.loads((points[1].directory / "run.json").read_text("utf-8"))["stages"]["train a"]["best"]
    assert result["points"][1]["development"] == {"loss": best["loss"]}
    scores = json.loads((points[1].directory / "evaluation.json").read_text("utf-8"))
    assert result["points"][1]["weighted_f1"] == {"suicide_risk": scores["suicide_risk"]["weighted_f1"]}
    capsys.readouterr()
    started = []
    again = sweeps.sweep(small, out, points, say=said.append,
                         start=lambda arguments, log, stopped: started.append(arguments) or 3)  # fmt: skip
    assert [arguments[0] for arguments in started] == ["train"] and "sequence_length=16" in " ".join(started[0])
    assert [row["state"] for row in again["points"]] == ["failed", "done"]
    # Of another recipe, nothing is finished.
    _, others = sweeps.make_points(small, ["train.sequence_length=16,128"], 1, out, [ONE, "lora.alpha=9"])
    assert list(map(sweeps.is_done, points + others)) == [False, True, False, False]


def test_the_table_is_mean_and_deviation_best_development_score_first():
    def row(name, loss, f1, state="done"):
        return {"name": name, "state": state, "development": {"loss": loss}, "weighted_f1": {"t": f1}}

    rows = [row("a", 2.0, 0.5), row("a", 4.0, 0.7), row("b", 1.0, 0.2), row("b", 0.0, 0.0, "failed")]
    found = sweeps.table(rows)
    assert [entry["name"] for entry in found] == ["b", "a"]
    assert found[1]["development"]["loss"] == pytest.approx([3.0, 2**0.5])
    assert found[1]["weighted_f1"]["t"] == pytest.approx([0.6, 0.02**0.5])
    assert (found[0]["runs"], found[0]["failed"], found[0]["development"]["loss"]) == (1, 1, [1.0, None])
    rising = [{**one, "development": {"accuracy": one["development"]["loss"]}} for one in (rows[0], rows[2])]
    assert [entry["name"] for entry in sweeps.table(rising)] == ["a", "b"]
    assert [entry["name"] for entry in sweeps.table([{**rows[0], "development": None}, rows[2]])] == ["b", "a"]
    assert [entry["name"] for entry in sweeps.table([{**row, "development": None} for row in rows])] == ["a", "b"]
    assert sweep_table(found).row_count == 2


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)])
def test_a_signal_reaches_the_runs_once_and_the_rest_is_left(small, tmp_path, number, kind):
    _, points = sweeps.make_points(small, ["lora.rank=1,2,3"], 1, tmp_path / "out")
    told, began = [], threading.Event()

    def start(arguments, log, stopped):
        began.set()
        while stopped() is None:
            time.sleep(0.001)
        told.append(stopped())
        return 1

    threading.Thread(target=lambda: (began.wait(), signal.raise_signal(number))).start()
    with pytest.raises(kind, match="the same command continues"):
        sweeps.sweep(small, tmp_path / "out", points, say=lambda line: None, start=start)
    assert told == [number]  # the two others were not begun


def test_commands_for_several_hosts(small, tmp_path, capsys):
    outcome = attack.run(["mentalglm", "sweep", small, "--grid", "lora.rank=1,2", "--seeds", "2", "--print", "--out",
                          tmp_path / "a b"], capsys)  # fmt: skip
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and len(lines) == 4 and not (tmp_path / "a b").exists()
    import shlex

    train, evaluate = lines[3].split(" && ")
    arguments = shlex.split(train)
    assert arguments[:3] == ["mentalglm", "train", str(small)]
    sets = dict(one.split("=", 1) for one in arguments[4::2])
    where = tmp_path / "a b" / "rank=2" / "seed-1"
    assert sets == {"lora.rank": "2", "seed": "1", "run_dir": f"'{where}'"} and yaml.safe_load(sets["run_dir"]) == str(
        where
    )
    assert shlex.split(evaluate) == ["mentalglm", "evaluate", str(where)]


@pytest.mark.slow
def test_in_processes_of_their_own(small, tmp_path, capsys):
    outcome = attack.run(["mentalglm", "sweep", small, "--grid", "train.sequence_length=128,16", "--jobs", "2",
                          "--out", tmp_path / "out", "--set", ONE], capsys)  # fmt: skip
    assert outcome.code == 1 and "Sweep" in outcome.out and "1 failed" in outcome.out
    (line,) = [line for line in outcome.err.splitlines() if "failed: " in line]
    assert "none of 5 records fits into sequence_length = 16 tokens; raise it (exit code 2)" in line
    assert "train a" in (tmp_path / "out/sequence_length=128/seed-0.log").read_text("utf-8")
    assert (tmp_path / "out/sequence_length=16/seed-0.log").stat().st_mode & 0o777 == 0o600


def test_a_directory_that_is_no_sweeps_is_left_to_its_owner(small, tmp_path):
    _, points = sweeps.make_points(small, [], 1, tmp_path / "out")
    points[0].directory.mkdir(parents=True)
    (points[0].directory / "run.json").write_text("[]")
    assert not sweeps.is_done(points[0])
    with pytest.raises(InputError, match=r"run\.json"):
        sweeps.collected(points, {})
