"""A finished run that is asked for more: what is trained on, what is done again, and what is refused in one line."""

import json
import shutil
from typing import Any

import pytest
from safetensors.numpy import load_file

from mentalglm_jax.errors import InputError
from mentalglm_jax.pipeline.changes import outdated, reopened
from mentalglm_jax.pipeline.job import run
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.train.recipe import load_recipe, what_it_is

AGAIN = ["export", "generate", "evaluate", "summary"]


class Seen:
    """A reporter that keeps what it was told."""

    def __init__(self):
        self.stages, self.lines = [], []

    def stage(self, name):
        self.stages.append(name)
        return lambda *arguments: None

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(load_recipe(small, [f"run_dir={directory}"]), Seen())
    return directory


@pytest.fixture
def goes_on(small, whole, tmp_path):
    """``goes_on("a.b=c", ...)``: what the finished run did with a changed recipe."""
    shutil.copytree(whole, tmp_path / "run")

    def attempt(*overrides, allow_changed=True, until=None):
        seen = Seen()
        run(load_recipe(small, [f"run_dir={tmp_path / 'run'}", *overrides]), seen, allow_changed=allow_changed,
            until=until)  # fmt: skip
        return seen

    attempt.dir = tmp_path / "run"
    return attempt


def adapter(directory):
    return {name: value.tobytes() for name, value in load_file(directory / "adapter/adapter_model.safetensors").items()}


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert error.value.exit_code == 2 and "\n" not in text and len(text) < 500, text
    return text


def test_a_last_stage_made_longer_is_trained_on_and_all_that_rests_on_it_made_again(small, whole, goes_on, tmp_path):
    before = adapter(goes_on.dir)
    seen = goes_on("stages.b.train.steps=4")
    assert seen.stages == ["train b", *AGAIN]
    shutil.copytree(whole, tmp_path / "straight")  # as if stage b had never begun
    shutil.rmtree(tmp_path / "straight/stages/b")
    state = json.loads((whole / "run.json").read_text("utf-8"))
    state["stages"] = {name: state["stages"][name] for name in ("data", "train a")}
    (tmp_path / "straight/run.json").write_text(json.dumps(state), encoding="utf-8")
    straight = load_recipe(small, [f"run_dir={tmp_path / 'straight'}", "stages.b.train.steps=4"])
    run(straight, Seen(), until="train", allow_changed=True)
    assert adapter(goes_on.dir) == adapter(tmp_path / "straight/stages/b") != before
    assert goes_on("stages.b.train.steps=4", allow_changed=False).stages == []  # it is that run now


@pytest.mark.slow
def test_the_train_command_leaves_what_rests_on_it_to_run(goes_on):
    assert goes_on("stages.b.train.steps=3", until="train").stages == ["train b"]
    stages = json.loads((goes_on.dir / "run.json").read_text("utf-8"))["stages"]
    assert list(stages) == ["data", "train a", "train b"] and stages["train b"]["steps"] == 3
    assert goes_on("stages.b.train.steps=3", allow_changed=False).stages == AGAIN


@pytest.mark.slow
def test_a_stage_can_be_added(goes_on):
    before = adapter(goes_on.dir / "stages/b")
    more = json.dumps([{"name": name, "train": {"steps": 2, "rows": 1, "sequence_length": 128, "schedule": schedule,
                                                "warmup_ratio": 0.0, "save_every": 100, "learning_rate": 1e-2}}
                       for name, schedule in (("a", "constant"), ("b", "constant"), ("c", "linear"))])  # fmt: skip
    seen = goes_on(f"stages={more}")
    assert seen.stages == ["train c", *AGAIN] and seen.lines[0] == f"to be done again: {', '.join(AGAIN)}"
    assert adapter(goes_on.dir) == adapter(goes_on.dir / "stages/c") != before == adapter(goes_on.dir / "stages/b")


def test_answers_are_made_again_when_asked_for_otherwise(goes_on):
    assert goes_on("generate.max_new_tokens=3").stages == ["generate", "evaluate", "summary"]
    rows = [json.loads(line) for line in (goes_on.dir / "generations.jsonl").read_text("utf-8").splitlines()]
    assert max(len(row["output_ids"]) for row in rows) == 3
    assert goes_on("generate.label_scores=false", "generate.max_new_tokens=3").stages == ["evaluate", "summary"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["lora.rank=3"], r"nothing was done: .*\(lora.rank: 2 -> 3\)"),
        (
            ["stages.a.train.learning_rate=0.5", "seed=1"],
            r"nothing was done: .*seed: 0 -> 1; stages.a.train.learning_rate",
        ),
        (["stages.b.train.steps=1"], r"nothing was done: .*stages.b.train.steps: 2 -> 1"),
        (["stages.a.train.steps=4"], r"stages.a is finished, and stage b began from its adapter"),
        (["stages.b.train.epochs=4", "stages.b.train.steps=null"], r"stages.b.train: .*say in steps, as before"),
        (["stages.b.train.steps=4", "stages.b.train.schedule=cosine"], r"stages.b.train: the stage has ended"),
        (["stages.a.name=z"], r"stages: a, b began, each from the adapter of the one before"),
    ],
)
@pytest.mark.parametrize("until", [None, "train"])
def test_what_changes_nothing_is_refused_and_leaves_the_run_alone(goes_on, change, says, until):
    before = {path: path.read_bytes() for path in goes_on.dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=says) as error:
        goes_on(*change, until=until)
    one_line(error)
    assert {path: path.read_bytes() for path in goes_on.dir.rglob("*") if path.is_file()} == before


def test_the_refusal_of_another_recipe_is_short(goes_on):
    change = ["data.root=/elsewhere/" + "x" * 500, "stages=[{name: a, train: {steps: 7}}]", "seed=5", "lora.rank=7"]
    with pytest.raises(InputError) as error:
        goes_on(*change, allow_changed=False)
    text = one_line(error)
    assert "lora.rank: 2 -> 7" in text and "and 8 more" in text and "--allow-changed goes on" in text


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(goes_on):
    state = json.loads((goes_on.dir / "run.json").read_text("utf-8"))
    del state["recipe"]["answer_order"], state["recipe"]["stages"][0]["train"]["early_stopping"]
    (goes_on.dir / "run.json").write_text(json.dumps(state), encoding="utf-8")
    assert goes_on(allow_changed=False).stages == []
    state["recipe"]["of_another_version"] = 1
    (goes_on.dir / "run.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InputError, match="of_another_version: 1 -> None"):
        goes_on(allow_changed=False)
    with pytest.raises(InputError, match=r"its recipe is none that this version can go on with"):
        goes_on()


def test_of_several_processes_only_the_first_reports(small, tmp_path, monkeypatch):
    seen = Seen()
    monkeypatch.setattr("mentalglm_jax.pipeline.job.is_primary", lambda: False)
    run(load_recipe(small, [f"run_dir={tmp_path / 'run'}"]), seen, until="train")
    assert (seen.stages, seen.lines) == ([], [])


# ---- which stages a change reaches, without training ---------------------------------------------------------------

STOPS = {"steps": 100, "eval_every": 5, "schedule": "cosine", "early_stopping": {"patience": 2}}


def asked(small, old: dict[str, Any], new: dict[str, Any], result: dict[str, Any], *more: str) -> list[str]:
    """What is reopened of a finished run whose last stage was trained with ``old`` and is now asked for ``new``."""
    base = "stages=[{name: a, train: {steps: 2}}, {name: b, train: %s}]"
    recipes = [load_recipe(small, [base % json.dumps(train), *extra]) for train, extra in ((old, ()), (new, more))]
    finished = {"train a": {}, "train b": result, "generate": {}, "evaluate": {}, "probe": {}, "train control": {}}
    return reopened(*recipes, finished, lambda name: name in ("a", "b"))


def test_patience_that_was_used_up_can_be_raised(small):
    stopped = {"steps": 40, "planned": 100}
    assert asked(small, STOPS, STOPS | {"early_stopping": {"patience": 3}}, stopped) == ["train b"]
    assert asked(small, STOPS, {"steps": 100, "schedule": "cosine"}, stopped) == ["train b"]
    assert asked(small, STOPS, STOPS | {"early_stopping": {"patience": 1}}, stopped) == []
    assert asked(small, STOPS, STOPS | {"early_stopping": {"patience": 3}}, {"steps": 100, "planned": 100}) == []
    with pytest.raises(InputError, match=r"early stopping ended this stage at step 40 of 100; raise early_stopping"):
        asked(small, STOPS, STOPS | {"steps": 200}, stopped)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_schedule_that_has_ended_says_what_to_do(small, schedule):
    train = {"steps": 10, "schedule": schedule}
    with pytest.raises(InputError, match=rf"its {schedule} schedule with it .*Add a stage after it") as error:
        asked(small, train, train | {"steps": 20}, {"steps": 10, "planned": 10})
    one_line(error)


def test_epochs_count_as_steps_do_and_an_edited_run_json_is_no_traceback(small):
    train = {"epochs": 2, "schedule": "constant"}
    assert asked(small, train, train | {"epochs": 3.5}, {"steps": 10, "planned": 10}) == ["train b"]
    assert asked(small, train, train | {"epochs": 3.5}, {"steps": "ten", "planned": None}) == ["train b"]


def test_probes_and_answers_are_reached_by_their_own_keys(small):
    train = {"steps": 10}
    assert asked(small, train, train, {}, "generate.limit=3") == ["generate", "evaluate"]
    assert asked(small, train, train, {}, "probe.posts=3") == ["probe"]
    control = "probe.control={name: control, train: {steps: 1}}"
    assert asked(small, train, train, {}, control) == ["train control", "probe"]
    assert asked(small, train, train, {}, "lora.rank=7") == []


def test_what_rests_on_what():
    assert outdated("train a")[0] == "train control" and outdated("data") == outdated("train a")
    assert set(outdated("generate")) == {"evaluate", "probe", "summary"} and outdated("summary") == ()


def test_a_control_that_began_from_the_old_adapter_is_deleted(small, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("checkpoints/1/state/x", "adapter/adapter_config.json", "generations.jsonl", "notes.txt"):
        (tmp_path / "run/control" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/control" / name).write_text("old")
    (tmp_path / "run/generations.jsonl.partial").write_text("old")
    recipe = load_recipe(small, [f"run_dir={tmp_path / 'run'}", "stages.b.train.steps=4"])
    job = Run(recipe, allow_changed=True)
    assert job.reopened == ["train b"] and list(job.result) == ["data", "train a"]
    job.begin()
    assert list(json.loads((tmp_path / "run/run.json").read_text("utf-8"))["stages"]) == ["data", "train a"]  # at once
    job.forget(outdated("train b"))
    left = [path for path in (tmp_path / "run/control").rglob("*") if path.is_file()]
    assert left == [tmp_path / "run/control/notes.txt"]  # which no run wrote
    assert not (tmp_path / "run/generations.jsonl.partial").exists()
    assert (tmp_path / "run/stages/b/adapter/adapter_config.json").is_file()


def test_how_many_processes_probe_makes_nothing_out_of_date(small):
    old, faster, fewer = (load_recipe(small, ["probe.posts=2", *more])
                          for more in ([], ["probe.processes=2"], ["probe.posts=1"]))  # fmt: skip
    assert what_it_is(old) == what_it_is(faster)
    assert reopened(old, faster, {"probe": {}}, lambda stage: False) == []
    assert reopened(old, fewer, {"probe": {}}, lambda stage: False) == ["probe"]
