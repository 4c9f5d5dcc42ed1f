"""Task files and definitions from strangers: one line with file and task, in bounded time; nothing is obeyed."""

import json
import os
import time

import pytest
import yaml

from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks
from mentalglm_jax.text.task_files import read_tasks
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import RECORD
from tests.mentalglm_jax.own_tasks import DISTORTED, MOOD
from tests.timing import grows_at_most

ROW = RECORD | {"task": "mood", "label": "calm", "question": "How?", "parsed_label": "calm", "parsed_explanation": "x",
                "parse_status": "ok", "output_text": "x"}  # fmt: skip


def with_labels(labels, **more):
    return {"tasks": {"mood": MOOD | {"labels": labels} | more}}


MANY = {f"k{number}": {"name": {"en": f"{'x' * 190} {number}"}} for number in range(500)}
ATTACKS = {
    "ten levels of aliases": ("a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
                              "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
                              "tasks: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "aliases make more than"),
    "an alias of itself": ("tasks: &a {mood: *a}\n", "alias|undefined"),
    "brackets": ("tasks: " + "[" * 10_000, "levels"),
    "dashes": ("tasks:\n  " + "- " * 3_000 + "x", "levels|valid"),
    "a megabyte": ("tasks: " + "x" * (1 << 20), "too large"),
    "a Python object": ("tasks: !!python/object/apply:os.system [echo]\n", "could not determine a constructor"),
    "no text": (b"tasks: \xff\xfe", "UTF-8"),
    "a task named like a path": (yaml.safe_dump({"tasks": {"../../etc": MOOD}}), "the task name"),
    "a task with a colour": ('tasks: {"\\e[31mred": {}}', "the task name"),
    "501 labels": (yaml.safe_dump(with_labels({f"k{n}": {} for n in range(501)})), "2 to 500 keys"),
    "a label of control characters": ('tasks: {mood: {kind: single, question: {en: "?"}, sentence: {en: "{}"}, labels: '
                                      '{a: {name: {en: "\\x1b]0;x\\x07"}}, b: {}}}}', "control character"),
    "a label that turns what follows": (
        yaml.safe_dump(with_labels({"a": {"name": {"en": "\u202ehgih"}}, "b": {}})), r"U\+202E, which nobody sees"),
    "a label with a space of no width": (
        yaml.safe_dump(with_labels({"high": {}, "hi\u200bgh": {}})), "what nobody sees"),
    "a question with a direction mark": (
        yaml.safe_dump(with_labels(MOOD["labels"], question={"en": "is it\u2066 so?"})), r"U\+2066, which nobody sees"),
    "two labels apart by a joiner": (
        yaml.safe_dump(with_labels({"high": {}, "hi\u200dgh": {}})), "are one sentence"),
    "two labels apart by a variation selector": (
        yaml.safe_dump(with_labels({"high": {}, "high\ufe0f": {}})), "are one sentence"),
    "two labels apart by a blank letter": (
        yaml.safe_dump(with_labels({"high": {}, "h\u3164igh": {}})), "are one sentence"),
    "two labels apart by their width": (
        yaml.safe_dump(with_labels({"high": {}, "\uff48\uff49\uff47\uff48": {}})), "are one sentence"),
    "two labels of one look": (
        yaml.safe_dump(with_labels({"high": {}, "h\u0456gh": {}})), "'high' and 'h\u0456gh' look the same"),
    "two names of one look": (
        yaml.safe_dump(with_labels({"a": {"name": {"en": "\u039fut"}}, "b": {"name": {"en": "Out"}}})), "or look like"),
    "a task that looks like one of ours": (
        yaml.safe_dump({"tasks": {"suicide_r\u0456sk": MOOD}}), "looks like 'suicide_risk', which is another name"),
    "half a pair": ('tasks: {mood: {kind: single, question: {en: "\\ud83d"}, labels: {a: {}, b: {}}}}', "surrogate"),
    "infinity": ("tasks: .inf", "must be a mapping"),
    "a date": ("tasks: {mood: {kind: single, question: {en: x}, labels: {2020-01-01: {}, b: {}}}}", "quotes"),
    "attributes": (yaml.safe_dump(with_labels(MOOD["labels"], sentence={"en": "{0.__class__}"})), "hold {}"),
    "places twice": (yaml.safe_dump(with_labels(MOOD["labels"], prompt={"en": "{post}{post}"})), "hold {post} once"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_task_file(tmp_path, capsys, attack):
    text, says = ATTACKS[attack]
    (tmp_path / "tasks.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run(["mentalglm", "tasks", "check", tmp_path / "tasks.yaml"], capsys), rf"tasks\.yaml.*({says})")


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "directory"])
def test_what_lies_beside_answers_is_no_way_out(tmp_path, capsys, kind):
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "generations.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "secret.yaml").write_text("password: hunter2")
    beside = folder / "tasks.yaml"
    if kind == "pipe":
        os.mkfifo(beside)
    elif kind == "directory":
        beside.mkdir()
    else:
        beside.symlink_to("/dev/zero" if kind == "device" else tmp_path / "secret.yaml")
    said = refused(run(["mentalglm", "evaluate", folder], capsys), r"tasks\.yaml")
    assert "hunter2" not in said and "password" not in said


DEFINITIONS = {
    "text": ("x", "must be a mapping"), "a list": ([1], "must be a mapping"), "a number": (3, "must be a mapping"),
    "nothing in it": ({}, "kind is missing"), "an unknown key": (MOOD | {"\x1b[31m": 1}, "unknown key"),
    "a list for a language": (MOOD | {"question": {"en": {"x": "y"}}}, "question.en must be text"),
    "a name of another": (MOOD | {"labels": {"calm": {}, "Calm.": {}}}, "are one sentence"),
}  # fmt: skip


@pytest.mark.parametrize("attack", DEFINITIONS)
def test_definition_in_a_row(tmp_path, capsys, attack):
    definition, says = DEFINITIONS[attack]
    (tmp_path / "generations.jsonl").write_text(json.dumps(ROW | {"task_definition": definition}))
    refused(run(["mentalglm", "evaluate", tmp_path / "generations.jsonl"], capsys), rf"generations\.jsonl:1: .*{says}")


@pytest.mark.parametrize("name", ["suicide_risk", ["mood"], None])
def test_a_row_cannot_say_what_a_known_task_is(tmp_path, capsys, name):
    row = ROW | {"task": name, "task_definition": MOOD}
    (tmp_path / "generations.jsonl").write_text(json.dumps(row))
    says = "comes with this package" if name == "suicide_risk" else "task: expected text"
    refused(run(["mentalglm", "evaluate", tmp_path / "generations.jsonl"], capsys), rf"generations\.jsonl:1: .*{says}")
    assert tasks.get_task("suicide_risk").keys == ("high", "low")


def test_two_rows_that_disagree(tmp_path, capsys):
    rows = [ROW | {"id": str(n), "task_definition": MOOD | {"question": {"en": f"{n}?"}}} for n in range(2)]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(run(["mentalglm", "evaluate", tmp_path / "generations.jsonl"], capsys),
            r"generations\.jsonl:2: task 'mood' is known with another definition")  # fmt: skip


def test_the_largest_label_set_is_checked_and_read_in_bounded_time(tmp_path, capsys):
    raw = DISTORTED | {"labels": MANY, "question": {"en": "?"}, "sentence": {"en": "a " * 100 + "{} b"}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"mood": raw}}, sort_keys=False))
    began = time.process_time()
    outcome = run(["mentalglm", "tasks", "check", tmp_path / "tasks.yaml"], capsys)
    assert (outcome.code, time.process_time() - began < 60) == (0, True), outcome


@pytest.mark.parametrize("word", ["(a+)+$", "[x", "a|b", "\\", "Reasoning*", "?"])
def test_a_marker_is_text_and_no_pattern(word):
    raw = MOOD | {"markers": {"en": {"explanation": word, "label": "Answer"}}}
    (task,) = tasks.tasks_of({"mood": raw}, "f.yaml")
    said = tasks.answer(task, ["calm"], "aaaa " * 2000, "en", "explanation_first")
    assert tasks.parse(task, "en", said).labels == ("calm",)


def test_a_key_that_stands_twice_among_thousands(tmp_path, capsys):
    """Found in one pass: to count each key takes the square of their number, minutes for 30,000."""

    def work(count: int) -> None:
        keys = "".join(f"k{number}:\n" for number in range(count))
        (tmp_path / "tasks.yaml").write_text(f"{keys}k{count - 1}:\n")
        outcome = run(["mentalglm", "tasks", "check", tmp_path / "tasks.yaml"], capsys)
        refused(outcome, f"the key 'k{count - 1}' stands more than once")

    grows_at_most(work, 3000, 12_000, 8)


@pytest.mark.parametrize("name", ["x" * 3000, "a\0b", "y/" * 3000], ids=["long", "a zero byte", "deep"])
def test_a_name_that_no_file_can_have(name):
    """A run.json or a recipe that somebody else made may say that its tasks are there."""
    with pytest.raises(InputError):
        read_tasks(name)
