"""`mentalglm evaluate RUN` right after training: base, adapter, tokenizer and records are the run's own."""

import hashlib
import json
import shutil

import pytest

from mentalglm_jax.pipeline.job import run
from mentalglm_jax.train.recipe import load_recipe
from tests.hostile import attack
from tests.mentalglm_jax.pipeline.test_changes import Seen


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "run"
    run(load_recipe(small, [f"run_dir={directory}"]), Seen(), until="train")
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def printed(capsys, *arguments) -> dict:
    outcome = attack.run(["mentalglm", "evaluate", *arguments, "--json"], capsys)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_right_after_train_and_then_run(small, copy, capsys):
    result = printed(capsys, copy)
    assert (result["suicide_risk"]["n"], result["suicide_risk"]["label_reading"]["n"]) == (1, 1)  # the test record
    assert set(result["suicide_risk"]["floors"]) == {"majority", "tfidf_logreg"}  # by the run's own training records
    adapter = (copy / "stages/b/adapter/adapter_model.safetensors").read_bytes()
    assert result["suicide_risk"]["adapter"] == hashlib.sha256(adapter).hexdigest()
    kept = {name: (copy / name).read_bytes() for name in ("generations.jsonl", "label_scores.jsonl")}
    assert printed(capsys, copy) == result == json.loads((copy / "evaluation.json").read_text("utf-8"))
    seen = Seen()
    summary = run(load_recipe(small, [f"run_dir={copy}"]), seen)
    assert seen.stages == ["export", "summary"]  # what was answered is not answered again
    assert summary["eval"] == result and {name: (copy / name).read_bytes() for name in kept} == kept
    assert printed(capsys, copy) == result


@pytest.mark.slow
def test_another_split_and_other_records_are_answered_elsewhere(copy, capsys, tmp_path):
    dev = printed(capsys, copy, "--split", "dev", "--max-new-tokens", "2", "--out", tmp_path / "dev")
    assert dev["suicide_risk"]["n"] == 2 and (tmp_path / "dev/generations.jsonl").is_file()
    assert not (copy / "generations.jsonl").exists()
    given = printed(capsys, copy, "--data", copy / "data/faithful/dev.jsonl", "--max-new-tokens", "2")
    assert dev["suicide_risk"].pop("floors") and not given["suicide_risk"].pop("floors")
    for one in (dev["suicide_risk"], dev["suicide_risk"]["label_reading"]):
        assert one.pop("against_tfidf")
    del dev["suicide_risk"]["explanation"]["consistency"]
    assert given == dev
    train = printed(capsys, copy, "--split", "train", "--max-new-tokens", "2")["suicide_risk"]
    assert train["n"] == 5 and train["floors"] == {}  # no floor is fitted on what it is asked
    printed(capsys, copy, "--out", tmp_path / "out")
    assert (tmp_path / "out/evaluation.html").is_file()


def test_what_a_run_cannot_answer(copy, capsys, tmp_path):
    def refused(says, *options):
        attack.refused(attack.run(["mentalglm", "evaluate", *options], capsys), says)

    refused(r"run: holds its adapter; --adapter goes with a model", copy, "--adapter", "x")
    refused(r"answers as its recipe says; --max-new-tokens goes with --split or --data", copy, "--max-new-tokens", "3")
    shutil.rmtree(copy / "stages/b/adapter")
    refused(r"run/stages/b/adapter: is missing", copy)
    state = json.loads((copy / "run.json").read_text("utf-8"))
    del state["stages"]["train b"]
    (copy / "run.json").write_text(json.dumps(state), encoding="utf-8")
    refused(r"run: stage 'train b' is not finished; `mentalglm train` with its recipe goes on", copy)
    (copy / "run.json").write_text("{", encoding="utf-8")
    refused(r"run: not a run directory \(no readable run\.json\)", copy)


@pytest.mark.slow
def test_answers_of_an_adapter_that_was_trained_on_are_not_taken(small, copy, capsys):
    printed(capsys, copy)
    longer = load_recipe(small, [f"run_dir={copy}", "stages.b.train.steps=12", "stages.b.train.learning_rate=0.5"])
    before = (copy / "label_scores.jsonl").read_bytes()
    run(longer, Seen(), until="train", allow_changed=True)
    assert not {"label_scores.jsonl", "generations.jsonl", "evaluation.json"} & {path.name for path in copy.iterdir()}
    printed(capsys, copy)
    assert (copy / "label_scores.jsonl").read_bytes() != before
