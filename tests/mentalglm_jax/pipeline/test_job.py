"""The main job on a model of a few thousand parameters: whole, interrupted at every stage, and with damaged input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.selection import weighted
from mentalglm_jax.devices.stopping import Interrupted
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.pipeline import job as pipeline
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.export import export_run
from mentalglm_jax.pipeline.job import run
from mentalglm_jax.pipeline.run_dir import Run, written_by_run
from mentalglm_jax.pipeline.stage_inputs import stage_examples
from mentalglm_jax.train.metrics import _continued
from mentalglm_jax.train.recipe import load_recipe

TRAIN = {"rows": 2, "sequence_length": 256, "learning_rate": 1e-3, "save_every": 2, "log_every": 1}
RECIPE = {
    "data": {"source": "synthetic", "synthetic": {"n_train": 6, "n_dev": 0, "n_test": 2, "tasks": ["suicide_risk"]}},
    "model": {"geometry": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "head_dim": 16, "initializer_range": 0.1}},
    "pretrain": {"chats": 30, "train": {"steps": 3, **TRAIN},
                 "then": [{"name": "answers", "languages": ["zh"], "train": {"steps": 2, **TRAIN}}]},
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
    "stages": [
        {"name": "english", "languages": ["en"], "train": {"steps": 4, **TRAIN}},
        {"name": "chinese", "languages": ["zh"], "replay": 0.5, "train": {"steps": 3, **TRAIN}},
    ],
    "verify": False,
    "generate": {"max_new_tokens": 8, "batch_size": 2},
    "probe": {"posts": 0},
}  # fmt: skip
STAGES = ["data", "pretrain", "train english", "train chinese", "export", "generate", "evaluate", "summary"]


class Script:
    """A reporter that may pull the plug: in stage ``at``, at its ``after``-th progress call (0: when it starts)."""

    def __init__(self, at=None, after=0):
        self.at, self.after, self.seen = at, after, []

    def stage(self, name):
        self.seen.append(name)
        calls = 0

        def progress(done, total, text=""):
            nonlocal calls
            calls += 1
            if name == self.at and calls == self.after:
                os.kill(os.getpid(), signal.SIGINT)

        if name == self.at and self.after == 0:
            os.kill(os.getpid(), signal.SIGINT)  # arrives while the stage starts
        return progress

    def say(self, line):
        pass


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "unset", **RECIPE}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    reporter = Script()
    summary = run(load_recipe(recipe_file, [f"run_dir={directory}"]), reporter)
    assert reporter.seen == STAGES
    return directory, summary


def adapter(directory):
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def test_the_run_leaves_what_the_contract_names(whole):
    directory, summary = whole
    for name in ("summary.json", "adapter/adapter_config.json", "merged/config.json", "generations.jsonl",
                 "reference_logits.npz", "stages/english/metrics.jsonl", "stages/english/tensorboard",
                 "pretrain/answers/metrics.jsonl", "label_scores.jsonl", "evaluation.html", "evaluation.csv",
                 "model_card.md"):  # fmt: skip
        assert (directory / name).exists(), name
    assert set(summary) >= {"parity", "eval", "probes", "seconds"}
    assert summary["eval_split"] == "test"
    entry = summary["eval"]["suicide_risk"]
    assert set(entry) >= {"weighted_f1", "micro_f1", "macro_f1", "n", "ci95", "floors"}
    assert entry["n"] == entry["label_reading"]["n"] == 4
    assert set(entry["floors"]) == {"majority", "tfidf_logreg"}
    assert set(summary["seconds"]) == set(STAGES) - {"summary"}
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text("utf-8").splitlines()]
    assert {"prompt_ids", "output_ids", "output_text", "parsed_label", "parsed_explanation", "parse_status"} <= set(
        rows[0]
    )


def test_the_lines_of_the_readme_run(whole, monkeypatch, tmp_path, capsys):
    text = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100 and len(text.split()) <= 600
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(whole[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "Parsed(" in capsys.readouterr().out


def test_stages_hand_the_adapter_on(whole):
    directory, _ = whole
    first = load_file(directory / "stages/english/adapter/adapter_model.safetensors")
    last = load_file(directory / "stages/chinese/adapter/adapter_model.safetensors")
    final = adapter(directory)
    assert all((final[name] == last[name]).all() for name in final)
    assert any((first[name] != last[name]).any() for name in first)
    # A stage that started from a fresh adapter instead of the one before would have B near zero again.
    grown = np.mean([np.abs(last[n]).mean() > np.abs(first[n]).mean() for n in first if "lora_B" in n])
    assert grown > 0.5


@pytest.mark.parametrize(
    ("stage", "after"),
    [("train english", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("data", 0), ("pretrain", 2), ("train english", 1), ("train chinese", 2), ("export", 0), ("generate", 1),
        ("evaluate", 0), ("summary", 0)])],
)  # fmt: skip
def test_interrupted_anywhere_the_same_call_continues_to_the_same_result(recipe_file, whole, tmp_path, stage, after):
    recipe = load_recipe(recipe_file, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises((Interrupted, KeyboardInterrupt)) as stopped:
        run(recipe, Script(stage, after))
    assert isinstance(stopped.value, Interrupted) and "\n" not in str(stopped.value)
    assert "continue" in str(stopped.value)
    reporter = Script()
    summary = run(recipe, reporter)
    assert reporter.seen == STAGES[STAGES.index(stage) :]
    directory, expected = whole
    assert summary["eval"] == expected["eval"]
    one, other = adapter(tmp_path / "run"), adapter(directory)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    assert (tmp_path / "run/generations.jsonl").read_bytes() == (directory / "generations.jsonl").read_bytes()


def test_a_finished_run_is_not_done_again(recipe_file, whole):
    directory, expected = whole
    reporter = Script()
    assert run(load_recipe(recipe_file, [f"run_dir={directory}"]), reporter) == expected
    assert reporter.seen == []


def test_another_recipe_is_refused_with_the_keys_that_differ(recipe_file, whole):
    directory, _ = whole
    other = load_recipe(recipe_file, [f"run_dir={directory}", "lora.rank=3"])
    with pytest.raises(InputError, match=r"lora\.rank: 2 -> 3.*--restart"):
        run(other, Script())
    assert adapter(directory)


def test_a_foreign_directory_is_never_touched(recipe_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    recipe = load_recipe(recipe_file, [f"run_dir={tmp_path}"])
    for restart in (False, True):
        with pytest.raises(InputError, match="not empty and not a run directory"):
            run(recipe, Script(), restart=restart)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_damaged_checkpoint_everywhere_gives_one_line(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(Interrupted):
        run(recipe, Script("pretrain", 2))
    for file in (tmp_path / "run/pretrain/checkpoints").rglob("*"):
        if file.is_file() and "state" in str(file.relative_to(tmp_path)):
            file.write_bytes(b"")
    with pytest.raises(RunError, match="checkpoints") as refused:
        run(recipe, Script())
    assert "\n" not in str(refused.value)


def test_export_of_a_finished_run(whole, tmp_path):
    directory, _ = whole
    export_run(directory, "peft", tmp_path / "peft")
    assert load_file(tmp_path / "peft/adapter_model.safetensors").keys() == adapter(directory).keys()
    export_run(directory, "peft", tmp_path / "first", stage="english")
    assert (tmp_path / "first/adapter_model.safetensors").read_bytes() != (
        tmp_path / "peft/adapter_model.safetensors"
    ).read_bytes()
    named = json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((directory / "base").resolve())
    export_run(directory, "vllm", tmp_path / "named", base_name="org/name")
    named = json.loads((tmp_path / "named/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "org/name"
    assert not any(str(directory).encode() in file.read_bytes() for file in (tmp_path / "named").iterdir())
    with pytest.raises(InputError, match=r"--push would publish the local path .*--base-name ORG/NAME"):
        export_run(directory, "peft", tmp_path / "x", push="me/mine")
    for name in ("a/b/c", str(directory)):
        with pytest.raises(InputError, match=r"--base-name .*give a Hub id, ORG/NAME, that is no directory here"):
            export_run(directory, "peft", tmp_path / "x", base_name=name)
    for option in ({"public": True}, {"dry_run": True}):
        with pytest.raises(InputError, match=f"--{next(iter(option)).replace('_', '-')} goes with --push"):
            export_run(directory, "peft", tmp_path / "x", **option)
    with pytest.raises(InputError, match="not one of peft"):
        export_run(directory, "onnx", tmp_path / "x")
    with pytest.raises(InputError, match="stage 'french'"):
        export_run(directory, "peft", tmp_path / "x", stage="french")
    with pytest.raises(InputError, match="not a run directory"):
        export_run(tmp_path, "peft", tmp_path / "x")


def test_every_export_has_a_card(whole, tmp_path):
    """The run's say what it found, a stage's what it came to; a merged model pre-trained here names no base."""
    directory, summary = whole
    f1 = f"{summary['eval']['suicide_risk']['weighted_f1']:.3f}"
    for name, library in (("adapter", "peft"), ("merged", "transformers")):
        text = (directory / name / "README.md").read_text("utf-8")
        assert ModelCard(text).data.library_name == library and f"| {f1} (" in text
        assert "Synthetic posts" in text and "pre-trained from nothing" in text and str(directory.parent) not in text
    english = (directory / "stages/english/adapter/README.md").read_text("utf-8")
    assert "only the last one was evaluated" in english and re.search(r"; \d+ steps, .*, last loss ", english)
    done = export_run(directory, "merged", tmp_path / "merged", push="me/mine", dry_run=True, licence="mit")
    assert done.pushed is None and ModelCard(done.card).data.license == "mit" and f"| {f1} (" in done.card
    assert set(done.files) == {path.name for path in (tmp_path / "merged").iterdir()} >= {"README.md", "config.json"}
    export_run(directory, "merged", tmp_path / "merged")  # what it wrote itself may be replaced
    assert written_by_run("merged/README.md")


# --- the command line: one line, the right exit code ---

RECORD = {"id": "a", "task": "suicide_risk", "language": "en", "post": "I like rain.", "label": "low", "split": "train",
          "question": "Q?", "source": "test"}  # fmt: skip


def refused(capsys, *arguments):
    """Exit code and the one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mentalglm: ")]
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return stop.value.code, lines[0]


def jsonl_run(recipe_file, root, tmp_path, *more):
    data = f"data={{source: jsonl, root: {root}}}"
    return ("run", recipe_file, "--set", data, "--set", f"run_dir={tmp_path / 'run'}", *more)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "train.jsonl"),
        (b"\xff\xfe broken", "UTF-8"),
        (b"", "no"),
        (b"{not json}\n", "train.jsonl:1"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "label"}).encode(), "label"),
        (json.dumps({**RECORD, "post": "  "}).encode(), "post"),
        (json.dumps({**RECORD, "label": "medium"}).encode(), "medium"),
    ],
    ids=["missing", "encoding", "empty", "json", "no label", "empty post", "unknown label"],
)
def test_bad_data_files(recipe_file, tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    code, line = refused(capsys, *jsonl_run(recipe_file, tmp_path, tmp_path))
    assert code == 2
    assert says in line


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def jsonl_data(recipe_file, tmp_path, *more):
    """The data stage of `mentalglm run` on the files in ``tmp_path``: the run and what the stage says."""
    data = f"data={{source: jsonl, root: {tmp_path}}}"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    job = Run(load_recipe(recipe_file, [data, f"run_dir={tmp_path / 'run'}", *more]))
    _, stage = next(iter(pipeline._stages(job.recipe, None)))
    return job, stage(job, lambda *_: None)["say"]


def rows_of(part, count=4, **more):
    return [{**RECORD, "id": f"{part}{i}", "post": f"{part} post {i}", "split": part, **more} for i in range(count)]


def test_results_are_on_test_records_or_else_on_development_ones(recipe_file, tmp_path):
    written(tmp_path / "train.jsonl", rows_of("train"))
    written(tmp_path / "dev.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in rows_of("dev", 2)])
    job, said = jsonl_data(recipe_file, tmp_path)
    assert (job.eval_split, said[-1]) == ("dev", "results are on the dev records")
    assert [len(job.records(split)) for split in ("train", "dev")] == [4, 2]  # the file says it, not the missing field
    written(tmp_path / "test.jsonl", rows_of("test", 3))
    job, said = jsonl_data(recipe_file, tmp_path)
    assert (job.eval_split, said[-1]) == ("test", "results are on the test records")
    assert {record.id for record in pipeline._eval_records(job)} == {"test0", "test1", "test2"}
    with pytest.raises(InputError, match=r"probe\.task 'cognitive_distortion' has no test record"):
        jsonl_data(recipe_file, tmp_path, "probe={task: cognitive_distortion, posts: 3}")


def test_without_records_to_evaluate_nothing_is_trained(recipe_file, tmp_path):
    written(tmp_path / "train.jsonl", rows_of("train"))
    data = f"data={{source: jsonl, root: {tmp_path}}}"
    recipe = load_recipe(recipe_file, [data, f"run_dir={tmp_path / 'run'}"])
    reporter = Script()
    with pytest.raises(InputError, match=r"no test or dev record.*add .*test\.jsonl or dev\.jsonl") as refused:
        run(recipe, reporter)
    assert reporter.seen == ["data"] and "\n" not in str(refused.value)
    written(tmp_path / "dev.jsonl", rows_of("dev"))
    stopped = Script("pretrain", 1)
    with pytest.raises(Interrupted):  # the same command, once the file is there
        run(recipe, stopped)
    assert stopped.seen == ["data", "pretrain"]


def test_training_alone_needs_no_records_to_evaluate(recipe_file, tmp_path):
    written(tmp_path / "train.jsonl", rows_of("train"))
    data = f"data={{source: jsonl, root: {tmp_path}}}"
    recipe = load_recipe(recipe_file, [data, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(Interrupted):
        run(recipe, Script("pretrain", 1), until="train")
    with pytest.raises(InputError, match=r"so nothing can be evaluated.*--restart"):  # before the rest of the training
        run(recipe, Script())


def test_no_post_is_trained_on_and_evaluated(recipe_file, tmp_path):
    written(tmp_path / "train.jsonl", [*rows_of("train"), {**RECORD, "id": "x", "post": " TEST  post 1"}])
    written(tmp_path / "dev.jsonl", rows_of("dev", 2))
    written(tmp_path / "test.jsonl", rows_of("test", 2))
    job, said = jsonl_data(recipe_file, tmp_path)
    assert [[r.id for r in job.records(split)] for split in ("train", "dev", "test")] == [
        ["train0", "train1", "train2", "train3"], ["dev0", "dev1"], ["test0", "test1"]]  # fmt: skip
    assert "1 training records are left out" in " ".join(said)
    written(tmp_path / "train.jsonl", [{**RECORD, "post": "test post 1"}])
    with pytest.raises(InputError, match="no training records; 1 training records are left out"):
        jsonl_data(recipe_file, tmp_path)


def test_a_line_separator_inside_a_post_is_no_line_end(tmp_path):
    rows = [{"post": f"one{mark}two"} for mark in "\u2028\u2029\x85\x0b\x0c\x1c"]
    written(tmp_path / "generations.jsonl", rows)
    assert pipeline._read_jsonl(tmp_path / "generations.jsonl") == rows
    written(tmp_path / "evaluation.jsonl", [{"step": step, **row} for step, row in enumerate(rows)])
    _continued(tmp_path / "evaluation.jsonl", 3).close()
    assert [row["step"] for row in pipeline._read_jsonl(tmp_path / "evaluation.jsonl")] == [0, 1, 2, 3]


def test_a_post_longer_than_the_rows_is_named(recipe_file, tmp_path, capsys):
    row = {**RECORD, "post": "rain and wind and " * 400}
    (tmp_path / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    written(tmp_path / "dev.jsonl", rows_of("dev"))
    code, line = refused(capsys, *jsonl_run(recipe_file, tmp_path, tmp_path))
    assert code == 2
    assert "sequence_length" in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.english.train.learning_rte=1", "did you mean 'learning_rate'"),
        ("stages.french.train.steps=1", "'french'"),
        ("lora.rank=0", "lora.rank"),
        ("model.path=x", "path"),
        ("lora.target_modules=[query]", "query"),
        ("nonsense", "section.key=value"),
    ],
)
def test_bad_recipes(recipe_file, tmp_path, capsys, override, says):
    code, line = refused(capsys, "run", recipe_file, "--set", f"run_dir={tmp_path / 'run'}", "--set", override)
    assert code == 2
    assert says in line
    assert not (tmp_path / "run").exists()


def test_bad_usage(capsys, tmp_path):
    assert refused(capsys, "run", tmp_path / "none.yaml") == (2, f"mentalglm: {tmp_path / 'none.yaml'}: no such recipe")
    assert refused(capsys, "fly")[0] == 2
    assert refused(capsys, "convert", tmp_path / "none", tmp_path / "out")[0] == 2
    assert refused(capsys, "data", "inspect", tmp_path / "none")[0] == 2


def test_json_is_all_that_stdout_holds(whole, recipe_file, capsys):
    directory, expected = whole
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe_file), "--set", f"run_dir={directory}", "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_the_table_shows_every_score_and_the_safety_note(whole, recipe_file, capsys):
    directory, expected = whole
    with pytest.raises(SystemExit):
        main(["run", str(recipe_file), "--set", f"run_dir={directory}"])
    out = capsys.readouterr().out
    assert f"{expected['eval']['suicide_risk']['weighted_f1']:.3f}" in out
    assert "Result on the test records" in out
    assert "not a diagnosis" in out.replace("\n", " ") and "summary.json" in out


def test_ctrl_c_on_the_command_line_exits_1_with_one_line(recipe_file, tmp_path):
    """A real process and a real signal, sent as soon as the first optimiser steps are logged."""
    command = [sys.executable, "-m", "mentalglm_jax", "run", str(recipe_file), "--set", f"run_dir={tmp_path / 'run'}",
               "--set", "pretrain.train.steps=100000"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/pretrain/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    lines = [line for line in err.splitlines() if line.startswith("mentalglm: ")]
    assert len(lines) == 1 and "continues from there" in lines[0]
    assert out == ""


def test_weights_say_how_often_a_data_set_is_seen():
    records = [Record(f"{source}{i}", "suicide_risk", "zh", f"帖子{i}", "？", label="high", source=source)
               for source in "ab" for i in range(10)]  # fmt: skip
    assert weighted(records, {}, 0) == records
    found = weighted(records, {"a": 2.5, "b": 0.3}, 0)
    times = Counter(record.id for record in found)
    assert sorted(times[f"a{i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert sorted(times[f"b{i}"] for i in range(10)) == [0] * 7 + [1] * 3
    assert [r.id for r in found] == sorted(r.id for r in found)
    assert found == weighted(records, {"b": 0.3, "a": 2.5}, 0) != weighted(records, {"a": 2.5, "b": 0.3}, 1)
    assert weighted(records, {"suicide_risk": 2.0, "b": 0.0}, 0) == [r for r in records[:10] for _ in range(2)]
    with pytest.raises(InputError, match="no record of data set 'c'; there are: a, b, suicide_risk"):
        weighted(records, {"c": 1.0}, 0)


def test_order_weights_and_replay_reach_the_training_examples(recipe_file, tmp_path):
    """By what the examples say, for every way a stage can be reached."""
    recipe = load_recipe(recipe_file, [
        f"run_dir={tmp_path / 'run'}", "answer_order=explanation_first", "stages.english.weights={suicide_risk: 2}",
        "data.synthetic.n_dev=4", "stages.chinese.replay=1"])  # fmt: skip
    job = Run(recipe)
    data_stage(job, lambda *_: None)
    tokenizer, (english, chinese) = job.tokenizer(), recipe.stages

    def said(stage, earlier):
        examples, _ = stage_examples(job, stage, earlier, tokenizer)
        return [tokenizer.decode(e["target_ids"].tolist()).strip() for e in examples], [e.get("id") for e in examples]

    texts, ids = said(english, ())
    assert len(ids) == 2 * len(set(ids)) == 12
    assert all(text.startswith("Reasoning: ") and " Answer: This post shows" in text for text in texts)
    texts, ids = said(chinese, (english,))
    assert len(ids) == len(set(ids)) == 12  # six of its own, and all that came before, once each
    assert [sum(text.startswith(word) for text in texts) for word in ("推理：", "Reasoning: ")] == [6, 6]
    with pytest.raises(InputError, match="stage english: weights: no record of data set 'sos_hl_1k'"):
        stage_examples(job, english.model_copy(update={"weights": {"sos_hl_1k": 1.0}}), (), tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_explains_first(recipe_file, tmp_path, monkeypatch):
    """Trained just long enough to begin every answer with its explanation; the label is then scored after it."""
    monkeypatch.setattr("mentalglm_jax.evaluate.calibrated.LEAST", 1)
    steps = ["pretrain.then.answers.train.steps=60", "pretrain.then.answers.train.learning_rate=1e-2",
             "pretrain.then.answers.languages=[zh, en]", "pretrain.then.answers.train.save_every=100",
             "stages.english.train.steps=1", "stages.chinese.train.steps=1", "data.synthetic.n_dev=4"]  # fmt: skip
    recipe = load_recipe(recipe_file, [f"run_dir={tmp_path / 'run'}", "answer_order=explanation_first", *steps])
    run(recipe, Script())
    rows = [json.loads(line) for line in (tmp_path / "run/generations.jsonl").read_text("utf-8").splitlines()]
    assert all(row["output_text"].startswith(("Reasoning:", "推理：")) for row in rows)
    values = [json.loads(line) for line in (tmp_path / "run/label_scores.jsonl").read_text("utf-8").splitlines()]
    assert {row["answer_order"] for row in values} == {"explanation_first"}
    kept = json.loads((tmp_path / "run/merged/calibration.json").read_text("utf-8"))["suicide_risk"]
    answered = (tmp_path / "run/dev_generations.jsonl").read_text("utf-8").splitlines()
    assert kept["answer_order"] == "explanation_first" and len(answered) == kept["records"] > 0
    assert {row["temperature"] for row in values} == {kept["temperature"]}
    assert "scored after the explanation" in (tmp_path / "run/evaluation.html").read_text("utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path / "run/merged"), "--data", str(tmp_path / "run/data/faithful/test.jsonl"),
              "--max-new-tokens", "8", "--out", str(tmp_path / "again")])  # fmt: skip
    assert stop.value.code == 0
    again = [json.loads(line) for line in (tmp_path / "again/label_scores.jsonl").read_text("utf-8").splitlines()]
    assert {row["answer_order"] for row in again} == {"explanation_first"}  # without being told
    for one, other in zip(again, values, strict=True):
        assert one["label_logprobs"] == pytest.approx(other["label_logprobs"], abs=1e-3)
