"""Posts cut between two UTF-16 units: half a surrogate pair written as a JSON escape, wherever a post is read."""

import json
import re

import pytest

from mentalglm_jax.cli.data import data_app
from mentalglm_jax.cli.main import app
from mentalglm_jax.data.explain.build import BuildData
from mentalglm_jax.data.held_out import records_split
from mentalglm_jax.data.records import Record, iter_records, read_records
from mentalglm_jax.data.sources import load_upstream
from mentalglm_jax.data.surrogates import replacing_surrogates
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import parse_yaml
from mentalglm_jax.train.recipe import DataSection
from tests.hostile.attack import refused, run

QUESTION = "Does the post show high or low suicide risk?"
ROW = {"id": "a", "task": "suicide_risk", "language": "en", "post": "so tired", "question": QUESTION, "label": "low"}
ANSWER = {"prompt_ids": [1], "output_ids": [2], "output_text": "x", "parsed_label": "low", "parse_status": "ok"}
HALF = "so tired \\ud83d"  # as it stands in the file
WANTED = "so tired \ufffd"


def line(row, field="post", half=HALF):
    return json.dumps(row | {field: "HALF"}).replace("HALF", half) + "\n"


def records(folder):
    file = folder / "train.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + line(ROW | {"id": "b"}))
    return file


def chats(folder):
    turns = [{"role": "user", "content": "HALF"}, {"role": "assistant", "content": "高自杀风险"}]
    file = folder / "suicide_train.jsonl"
    file.write_text(json.dumps({"messages": turns}, ensure_ascii=False).replace("HALF", HALF), encoding="utf-8")
    return file


def instructions(folder):
    row = {"instruction": "这个帖子体现的自杀风险是高还是低？", "input": "HALF", "output": "这个帖子体现了高自杀风险。"}
    file = folder / "train.json"
    file.write_text("[\n" + json.dumps(row, ensure_ascii=False).replace("HALF", HALF) + "]", encoding="utf-8")
    return file


READERS = {
    "records": (records, lambda file: read_records(file)[1].post, r"train.jsonl:2, field 'post'"),
    "record-stream": (records, lambda file: list(iter_records(file))[1].post, r"train.jsonl:2, field 'post'"),
    "data-root": (records, lambda file: records_split(file.parent).records[1].post, r"train.jsonl:2, field 'post'"),
    "chats": (chats, lambda file: load_upstream(file, ["sos_hl_1k"])[0].post,
              r"suicide_train.jsonl:1, field 'messages\[0\].content'"),
    "instructions": (instructions, lambda file: load_upstream(file, ["c_imhi"])[0].post,
                     r"train.json:2, field 'input'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(READERS))
def test_where_a_post_is_read_half_a_pair_is_named_or_replaced(tmp_path, name):
    write, read, where = READERS[name]
    file = write(tmp_path)
    with pytest.raises(InputError, match=rf"{where}: character 10 is half of a UTF-16 surrogate pair.*replace_surrog"):
        read(file)
    with replacing_surrogates():
        assert read(file) == WANTED
    with pytest.raises(InputError, match="surrogate"):
        read(file)


@pytest.mark.parametrize(
    ("half", "bad"),
    [("\\ud83d", True), ("\\uDE00 x", True), ("\\ude00\\ud83d", True), ("\\ud83d\\ude00", False), ("\\\\ud83d", False),
     ("\\ud83d\\\\ude00", True)],
    ids=["first-half", "second-half", "wrong-order", "a-pair", "no-escape", "half-and-text"],
)  # fmt: skip
def test_only_halves_are_refused(tmp_path, half, bad):
    file = tmp_path / "train.jsonl"
    file.write_text(line(ROW, half=half))
    if bad:
        with pytest.raises(InputError, match="surrogate pair"):
            read_records(file)
        with replacing_surrogates():
            read_records(file)[0].post.encode()
    else:
        assert read_records(file)[0].post == json.loads(f'"{half}"')


@pytest.mark.parametrize("field", ["output_text", "parsed_explanation", "explanation", "id"])
def test_a_finished_answer_with_half_a_pair_is_one_line(tmp_path, capsys, field):
    file = tmp_path / "generations.jsonl"
    file.write_text(line(ROW | ANSWER | {"finish": "stop"}, field))
    refused(
        run(["mentalglm", "evaluate", file], capsys), rf"generations.jsonl:1, field '{field}': character 10 is half"
    )
    done = run(["mentalglm", "evaluate", file, "--replace-surrogates", "--json"], capsys)
    assert done.code == 0 and json.loads(done.out)["suicide_risk"]["n"] == 1


def test_commands_refuse_in_one_line_before_a_model_is_loaded(tmp_path, capsys):
    file = records(tmp_path)
    says = r"train.jsonl:2, field 'post'"
    refused(run(["mentalglm", "generate", tmp_path / "no-model", "--in", file, "--out", tmp_path / "o"], capsys), says)
    refused(run(["mentalglm", "evaluate", tmp_path / "no-model", "--data", file], capsys), says)
    refused(run(["mentalglm", "data", "inspect", tmp_path], capsys), says)
    done = run(["mentalglm", "data", "inspect", tmp_path, "--replace-surrogates", "--json"], capsys)
    assert done.code == 0 and json.loads(done.out)["tasks"]["suicide_risk"]["-"]["train"]["records"] == 2


def test_the_switch_has_one_name():
    commands = {**{one.callback.__name__: one for one in app.registered_commands},
                **{one.callback.__name__: one for one in data_app.registered_commands}}  # fmt: skip
    for name in ("generate", "evaluate", "data_inspect"):
        assert "replace_surrogates" in commands[name].callback.__annotations__
    assert "replace_surrogates" in DataSection.model_fields and "replace_surrogates" in BuildData.model_fields


def test_a_record_made_in_code_is_checked_too():
    with pytest.raises(InputError, match=re.escape("record 'a': post: character 4 is half")):
        Record.from_dict(ROW | {"post": "abc\ud83d"})


@pytest.mark.parametrize("text", ['["\\ud800"]', '{"\\udc00": 1}', 'lora: {target_modules: ["a\\ud800"]}'])
def test_a_recipe_with_half_a_pair(text):
    with pytest.raises(InputError, match=r"r\.yaml: not valid YAML \(half of a surrogate pair"):
        parse_yaml(text, "r.yaml")


def test_a_recipe_that_was_written_as_json():
    """Its escapes are pairs of surrogates, each of which YAML takes for a character."""
    assert parse_yaml(json.dumps({"name": "😭", "😭": 1}), "r.yaml") == {"name": "😭", "😭": 1}
