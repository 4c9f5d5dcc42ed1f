"""One run that trains on conversations, stops by label F1 and calibrates its probabilities, and what it leaves."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml

from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import development
from mentalglm_jax.evaluate.answers import read_label_scores
from mentalglm_jax.pipeline import job as pipeline_job
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.export import export_run
from mentalglm_jax.pipeline.job import evaluate_run, run
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.pipeline.stage_inputs import dev_records, stage_examples
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.recipe import load_recipe
from tests.hostile.attack import refused
from tests.hostile.attack import run as command
from tests.mentalglm_jax.pipeline.conftest import QUESTION
from tests.mentalglm_jax.pipeline.test_changes import Seen

WORDS = (
    "rain", "wind", "snow", "soup", "tea", "fog", "hail", "sun", "mud", "ice", "dew", "frost", "sleet", "storm",
    "thunder", "cloud", "breeze", "drought", "flood", "heat", "cold", "mist", "gale", "shower", "thaw", "spring",
)  # fmt: skip
POSTS = {"dev": "Every night I dream of {} again.", "test": "Is there nobody who likes {} as I do?"}
TALKS = [
    ["Hello there.", "Good morning.", "How is the weather?", "It is fine."],
    ["Every night I dream of fog again.", "Do you?"],  # a development post
]


@pytest.fixture(scope="module")
def own(small, tmp_path_factory):
    """The recipe's overrides for 24 development and 6 test records, and a file of conversations."""
    directory = tmp_path_factory.mktemp("own")
    shutil.copytree(small.parent / "data", directory / "data")
    for split, words in (("dev", WORDS[:24]), ("test", WORDS[:6])):
        write_records(directory / "data" / f"{split}.jsonl", [
            Record(f"{split}{n}", "suicide_risk", "en", POSTS[split].format(what), QUESTION, "low" if n % 3 else "high",
                   split=split) for n, what in enumerate(words)
        ])  # fmt: skip
    roles = ("user", "assistant")
    (directory / "talks.jsonl").write_text("".join(
        json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(talk)]}) + "\n"
        for talk in TALKS))  # fmt: skip
    stops = "{patience: 1, metric: label_f1}"
    return directory, [
        f"data.root={directory / 'data'}", f"stages.a.conversations={directory / 'talks.jsonl'}",
        "stages.a.train_on=all", "stages.b.train.eval_every=1", f"stages.b.train.early_stopping={stops}",
        "stages.b.train.steps=6",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(small, own, tmp_path_factory):
    directory = tmp_path_factory.mktemp("done") / "run"
    seen = Seen()
    run(load_recipe(small, [f"run_dir={directory}", *own[1]]), seen)
    return directory, seen


def test_a_stage_trains_on_its_conversations_beside_its_records(small, own, tmp_path):
    job = Run(load_recipe(small, [f"run_dir={tmp_path / 'run'}", *own[1]]), say=(heard := []).append)
    data_stage(job, print)
    stage, tokenizer = job.recipe.stages[0], GlmTokenizer.load(tmp_path / "run" / "tokenizer")
    examples, too_long = stage_examples(job, stage, (), tokenizer)
    assert too_long == [] and [one["id"] for one in examples][-1] == "line 1"
    assert len(examples) == 5 + 1  # that with a development post is left out
    assert any("1 of 2 conversations are left out" in line for line in heard)
    trained = tokenizer.decode(examples[-1]["target_ids"].tolist(), skip_special=False)
    assert trained == "\nGood morning.<|user|>\nIt is fine.<|user|>"
    alone, _ = stage_examples(job, stage.model_copy(update={"tasks": (), "train_on": "last"}), (), tokenizer)
    assert [tokenizer.decode(one["target_ids"].tolist(), skip_special=False) for one in alone] == [
        "\nIt is fine.<|user|>"
    ]


def test_what_stops_a_stage_is_drawn_from_the_whole_of_a_sorted_file(small, own, tmp_path):
    shutil.copytree(own[0] / "data", tmp_path / "data")
    file = tmp_path / "data" / "dev.jsonl"
    write_records(file, sorted(read_records(file), key=lambda record: record.gold))  # 8 high, then 16 low
    sets = [f"run_dir={tmp_path / 'run'}", *own[1], f"data.root={tmp_path / 'data'}"]
    job = Run(load_recipe(small, [*sets, "stages.b.train.eval_examples=6"]))
    data_stage(job, print)
    stage = job.recipe.stages[1]
    seen = dev_records(job, stage)
    assert sorted(record.label for record in seen) == ["high"] * 2 + ["low"] * 4
    assert dev_records(job, stage) == seen  # as are those of a run that goes on, and of another seed
    whole = stage.model_copy(update={"train": stage.train.model_copy(update={"eval_examples": 24})})
    assert dev_records(job, whole) == job.records("dev")
    assert dev_records(job, job.recipe.stages[0]) == []  # which evaluates nothing


def test_labels_that_cannot_be_scored_are_refused_before_training(small, tmp_path):
    mood = {"kind": "single", "question": {"en": "Which mood?"}, "sentence": {"en": "Mood: {}"},
            "labels": {"sad": {}, "sad and tired": {}}}  # fmt: skip
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"mood": mood}}), "utf-8")
    sets = [f"run_dir={tmp_path / 'run'}", f"data.root={tmp_path}", f"tasks={tmp_path / 'tasks.yaml'}"]
    recipe = load_recipe(small, sets)
    for split in ("train", "test"):
        write_records(tmp_path / f"{split}.jsonl", [
            Record(f"{split}{n}", "mood", "en", f"I think of {what} all day long.", "Which mood?", "sad", split=split)
            for n, what in enumerate(WORDS[:3] if split == "train" else WORDS[5:7])
        ])  # fmt: skip
    with pytest.raises(InputError, match="'Mood: sad' is how 'Mood: sad and tired' begins"):
        data_stage(Run(recipe), print)
    unscored = load_recipe(small, [*sets, "generate.label_scores=false", f"run_dir={tmp_path / 'other'}"])
    data_stage(Run(unscored), print)


def test_where_the_development_records_are_judged_they_are_scored_once(done, tmp_path, monkeypatch):
    """And calibrate as they do beside a test part, without being told better by themselves."""
    shutil.copytree(done[0], tmp_path / "run")
    monkeypatch.setattr(Run, "eval_split", "dev")
    Run.opened(tmp_path / "run").forget(["generate", "evaluate"])
    scored, score = [], pipeline_job.score_records

    def counted(*given, **more):
        scored.append(given)
        return score(*given, **more)

    for module in (pipeline_job, development):
        monkeypatch.setattr(module, "score_records", counted)
    evaluate_run(tmp_path / "run", Seen())
    assert len(scored) == 1
    places = (tmp_path / "run", done[0])
    kept, before = (json.loads((place / "calibration.json").read_text("utf-8")) for place in places)
    assert kept == before and kept["suicide_risk"]["records"] == 24
    rows = read_label_scores(tmp_path / "run" / "label_scores.jsonl")
    assert {row["split"] for row in rows} == {"dev"} and not any("temperature" in row for row in rows)


BAD = {
    "no such file": ("stages.a.conversations=nowhere.jsonl", "nowhere.jsonl: no such file"),
    "train_on of nothing": ("stages.b.train_on=all", "stages.1: train_on is of conversations, and none are named"),
    "another word": ("stages.a.train_on=first", "stages.0.train_on.*'last' or 'all'"),
    "a metric of its own": ("stages.b.train.early_stopping.metric=f1", "early_stopping.metric.*'label_f1'"),
    "labels after explanations": ("answer_order=explanation_first", "stage b: early_stopping.metric label_f1"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_recipe_that_cannot_be_done_is_refused_before_it_begins(small, own, tmp_path, capsys, bad):
    sets = [word for one in (f"run_dir={tmp_path / 'run'}", *own[1], bad[0]) for word in ("--set", one)]
    outcome = command(["mentalglm", "train", small, *sets], capsys)
    said = [line for line in outcome.err.splitlines() if line != "data ..."]
    refused(dataclasses.replace(outcome, err="\n".join(said)), bad[1])


def test_label_f1_stops_a_stage_and_says_so(done):
    directory, _ = done
    found = [json.loads(line) for line in (directory / "stages/b/evaluation.jsonl").read_text("utf-8").splitlines()]
    scores = [one["label_f1"] for one in found]
    assert all(0 <= score <= 1 for score in scores)
    result = Run.opened(directory).result["train b"]
    assert result["best"] == {
        "step": 1 + max(range(len(scores)), key=lambda i: (scores[i], i)),
        "label_f1": max(scores),
    }
    assert "highest development label F1" in result["say"][0]
    assert result["steps"] < 6 or len(scores) == 6


def test_probabilities_are_calibrated_by_the_development_records(done, small, tmp_path, capsys):
    directory, _ = done
    kept = json.loads((directory / "calibration.json").read_text("utf-8"))
    assert kept["suicide_risk"]["records"] == 24
    temperature = kept["suicide_risk"]["temperature"]
    rows = read_label_scores(directory / "label_scores.jsonl")
    assert {row["temperature"] for row in rows} == {temperature} and {row["split"] for row in rows} == {"test"}
    reading = json.loads((directory / "evaluation.json").read_text("utf-8"))["suicide_risk"]["label_reading"]
    assert reading["calibrated"]["n"] == 6 and reading["calibration"]["ece"] is not None
    (line,) = Run.opened(directory).result["evaluate"]["say"]
    assert f"temperature {temperature:.2f} of 24 development records; expected calibration error " in line
    for name in ("adapter", "merged"):
        assert json.loads((directory / name / "calibration.json").read_text("utf-8")) == kept
    export_run(directory, "peft", tmp_path / "peft")
    export_run(directory, "peft", tmp_path / "first", stage="a")
    assert (tmp_path / "peft" / "calibration.json").is_file()
    assert not (tmp_path / "first" / "calibration.json").exists()  # another model's
    (tmp_path / "in.txt").write_text("I think of tea.\n")
    base = Run.opened(directory).recipe.model.path
    outcome = command(["mentalglm", "generate", base, "--adapter", tmp_path / "peft", "--task", "suicide_risk", "--in",
                       tmp_path / "in.txt", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 2,
                       "--json"], capsys)  # fmt: skip
    assert outcome.code == 0, outcome.err
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())
    assert row["probabilities_calibrated"] is True
    assert np.isclose(sum(row["label_probabilities"].values()), 1)


def test_the_records_that_said_the_temperature_are_not_scored_with_it(done, capsys, tmp_path):
    directory, _ = done
    outcome = command(["mentalglm", "evaluate", directory, "--split", "dev", "--max-new-tokens", 2, "--json"], capsys)
    assert json.loads(outcome.out)["suicide_risk"]["label_reading"]["calibrated"] is None
    outcome = command(["mentalglm", "evaluate", directory / "merged", "--data", directory / "data/faithful/test.jsonl",
                       "--max-new-tokens", 2, "--json"], capsys)  # fmt: skip
    assert json.loads(outcome.out)["suicide_risk"]["label_reading"]["calibrated"]["n"] == 6


def test_train_needs_a_measure_for_label_f1(tmp_path):
    from mentalglm_jax.train.recipe import EarlyStopping
    from tests.mentalglm_jax.runs import HELD_OUT
    from tests.mentalglm_jax.runs import run as train_tiny

    with pytest.raises(InputError, match="label_f1 needs records with labels"):
        train_tiny(tmp_path, evaluation=HELD_OUT, eval_every=2,
                   early_stopping=EarlyStopping(patience=1, metric="label_f1"))  # fmt: skip
