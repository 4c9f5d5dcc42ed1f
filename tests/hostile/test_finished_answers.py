"""Finished answers are not written over, nor mixed with another model's; half-done ones are gone on with."""

import json
import shutil

import pytest

from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.inputs import check_place
from mentalglm_jax.inference.generate import check_unfinished, open_partial, partial_file
from tests.hostile.attack import refused, run
from tests.hostile.world import contents

ASKED = ["--in", "records.jsonl", "--max-new-tokens", 2]
THERE = "is there already, and finished answers are not written over; name another place, or delete it"


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.csv"])
@pytest.mark.parametrize("how", ["the same model", "another temperature", "an adapter", "samples", "other posts"])
def test_generate(world, capsys, monkeypatch, name, how):
    """Whoever gave them; it is said before a model is loaded."""
    (world / name).write_text("somebody's answers")
    options = {"an adapter": ["--adapter", "trained/stages/a/adapter"], "another temperature": ["--temperature", "1"],
               "samples": ["--samples", "2", "--temperature", "1"], "other posts": ["--limit", "1"]}  # fmt: skip
    before = contents(world)

    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("mentalglm_jax.cli.generate.load_model", load)
    outcome = run(["mentalglm", "generate", "model", *ASKED, "--out", name, *options.get(how, [])], capsys)
    refused(outcome, rf"{name}: {THERE}")
    assert contents(world) == before


def test_generate_that_finishes_while_another_loads(world, capsys, monkeypatch):
    """The file comes between the first look and the lock."""
    from mentalglm_jax.cli import generate as command

    def load(*given, **named):
        (world / "answers.jsonl").write_text("another's answers")
        return real(*given, **named)

    real = command.load_model
    monkeypatch.setattr(command, "load_model", load)
    outcome = run(["mentalglm", "generate", "model", *ASKED, "--out", "answers.jsonl"], capsys)
    assert outcome.code == 2 and THERE in outcome.err
    assert (world / "answers.jsonl").read_text() == "another's answers"


def test_an_empty_file_and_half_done_answers_are_no_hindrance(tmp_path):
    out = tmp_path / "answers.jsonl"
    check_unfinished(out)
    out.touch()
    check_unfinished(out)
    out.write_text("{}")
    with pytest.raises(InputError, match=THERE):
        check_unfinished(out)
    partial_file(out).touch()
    check_unfinished(out)


@pytest.mark.parametrize("kind", ["a dangling link", "a directory"])
def test_what_is_no_file_is_in_the_way(tmp_path, kind):
    out = tmp_path / "answers.jsonl"
    out.mkdir() if kind == "a directory" else out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=THERE):
        check_unfinished(out)


NOTES = {"of several lines": '{\n "a": 1\n}', "of one": '{"a": 1}', "that ends": "a\n"}


@pytest.mark.parametrize("linked", [True, False], ids=["a link", "a file"])
@pytest.mark.parametrize("notes", NOTES)
def test_what_has_the_name_of_half_done_answers_is_not_cut(tmp_path, notes, linked):
    """Its last line was gone before its first was looked at."""
    mine, partial = tmp_path / "notes.json", partial_file(tmp_path / "answers.jsonl")
    mine.write_text(NOTES[notes])
    partial.symlink_to(mine) if linked else mine.rename(partial)
    with pytest.raises(InputError, match="is a link; " if linked else "was left by another model or other options"):
        open_partial(partial, {"model": "x"}, 10)
    assert partial.read_text() == NOTES[notes]


def test_generate_beside_a_link_loads_no_model(world, capsys, monkeypatch):
    monkeypatch.setattr("mentalglm_jax.cli.generate.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    partial_file(world / "answers.jsonl").symlink_to(world / "records.jsonl")
    outcome = run(["mentalglm", "generate", "model", *ASKED, "--out", "answers.jsonl"], capsys)
    refused(outcome, r"answers\.jsonl\.partial: is a link; half-done answers are kept in a file of that name")


@pytest.mark.parametrize("size", [0, 10])
def test_half_done_answers_that_a_crash_cut_are_gone_on_with(tmp_path, size):
    partial, row = tmp_path / "a.partial", '{"id": "a", "prompt_ids": [1], "output_ids": [2]}\n'
    open_partial(partial, {"model": "x"}, 10)
    header = partial.read_text()
    partial.write_text(header[:size])
    assert open_partial(partial, {"model": "x"}, 10) == {} and partial.read_text() == header
    partial.write_text(header + row + row[:size])
    assert [*open_partial(partial, {"model": "x"}, 10)] == ["a"] and partial.read_text() == header + row


NOT_OWN = r"is there already, and would be written over, or stand beside scores that are not its own"


@pytest.mark.parametrize("name", ["generations.jsonl", "label_scores.jsonl"])
@pytest.mark.parametrize("what", ["a model", "other answers"])
def test_evaluate(world, capsys, monkeypatch, name, what):
    """One directory held A's answers and B's scores."""
    monkeypatch.setattr("mentalglm_jax.cli.evaluate.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    (world / "mine").mkdir()
    (world / "mine" / name).write_text("mine")
    of = ["model", "--data", "records.jsonl"] if what == "a model" else ["finished"]
    before = contents(world)
    refused(run(["mentalglm", "evaluate", *of, "--out", "mine"], capsys), rf"mine/{name}: {NOT_OWN}")
    assert contents(world) == before


def test_evaluate_of_another_file_of_the_same_directory(world, capsys):
    shutil.copy(world / "finished" / "generations.jsonl", world / "finished" / "other.jsonl")
    refused(run(["mentalglm", "evaluate", "finished/other.jsonl", "--out", "finished"], capsys), NOT_OWN)


@pytest.mark.parametrize("of", ["finished", "finished/generations.jsonl"])
def test_answers_are_scored_where_they_are(world, capsys, of):
    for _ in range(2):
        assert run(["mentalglm", "evaluate", of, "--out", "finished"], capsys).code == 0


def test_evaluate_goes_on_until_its_page_is_written(world, capsys, monkeypatch):
    """Answers are finished when all is done that they are for."""
    command = ["mentalglm", "evaluate", "model", "--data", "records.jsonl", "--max-new-tokens", 2, "--out", "mine"]
    with monkeypatch.context() as patch:
        patch.setattr("mentalglm_jax.evaluate.report.write_report", lambda *_, **__: (_ for _ in ()).throw(OSError))
        assert run(command, capsys).code != 0
    assert (world / "mine" / "generations.jsonl").exists()
    assert run(command, capsys).code == 0
    answers = (world / "mine" / "generations.jsonl").read_bytes()
    assert not partial_file(world / "mine" / "generations.jsonl").exists()
    refused(run(command, capsys), NOT_OWN)
    assert (world / "mine" / "generations.jsonl").read_bytes() == answers


def test_a_place_that_is_new(tmp_path):
    check_place(tmp_path / "new", None)
    check_place(tmp_path / "new", tmp_path)


def edited(world, **changes):
    """A trained run with answers and a page of scores, of which somebody changed some."""
    for name in ("generations.jsonl", "evaluation.json"):
        shutil.copy(world / "finished" / name, world / "trained" / name)
    shutil.copytree(world / "data", world / "trained" / "data" / "faithful")
    state = json.loads((world / "trained" / "run.json").read_text())
    state["stages"] = {name: {"seconds": 1.0} for name in ("data", "train a", "generate", "evaluate")}
    (world / "trained" / "run.json").write_text(json.dumps(state))
    file = world / "trained" / "evaluation.json"
    scores = json.loads(file.read_text())
    scores["suicide_risk"].update(changes)
    file.write_text(json.dumps(scores))


@pytest.mark.parametrize("changes", [{"weighted_f1": 0.123}, {"macro_f1": 0.99}, {"n": 4000}], ids=repr)
def test_no_card_quotes_scores_of_other_answers(world, capsys, changes):
    edited(world, **changes)
    outcome = run(["mentalglm", "export", "trained", "--to", "peft", "--out", "exported"], capsys)
    refused(outcome, r"evaluation\.json: suicide_risk: .* the answers beside it give")
    assert not (world / "exported").exists()


@pytest.mark.parametrize("changes", [{"cut_off": "<b>0</b>"}, {"parse_failure_rate": "0"}, {"ci95": ["a", "b"]},
                                     {"parse_failure_rate": 7}, {"floors": []}], ids=repr)  # fmt: skip
def test_no_card_quotes_what_is_no_number(world, capsys, changes):
    edited(world, **changes)
    outcome = run(["mentalglm", "export", "trained", "--to", "peft", "--out", "exported"], capsys)
    refused(outcome, rf"evaluation\.json: suicide_risk: .*{next(iter(changes))}")


def test_a_card_of_sound_scores(world, capsys):
    edited(world)
    assert run(["mentalglm", "export", "trained", "--to", "peft", "--out", "exported"], capsys).code == 0
    assert "weighted F1" in (world / "exported" / "README.md").read_text()
