"""`mentalglm tasks`: what it prints can be used as it is, and the page about tasks is right."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.text import tasks
from tests.mentalglm_jax.own_tasks import MOOD, definitions

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["tasks", *map(str, arguments)])
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def file(tmp_path):
    tasks.write_tasks(tmp_path / "tasks.yaml", definitions())
    return tmp_path / "tasks.yaml"


def test_list_names_every_task_and_those_of_a_file(call, file):
    code, out, _ = call("list", "--json")
    assert code == 0 and [one["task"] for one in json.loads(out)["tasks"]] == list(tasks.BUILT_IN)
    code, out, _ = call("list", "--tasks", file)
    assert code == 0 and all(name in out for name in (*tasks.BUILT_IN, *(task.name for task in definitions())))


@pytest.mark.parametrize("name", ["suicide_risk", "cognitive_pathway", "imhi_irf", "distorted", "tension"])
def test_what_show_prints_is_a_task_file_with_one_prompt_and_answer_per_language(call, file, tmp_path, name):
    code, out, _ = call("show", name, "--tasks", file)
    assert code == 0
    (tmp_path / "shown.yaml").write_text(out, encoding="utf-8")
    task = tasks.get_task(name)
    assert tasks.read_tasks(tmp_path / "shown.yaml") == (task,)
    for language in task.languages:
        (prompt,) = re.findall(rf"# {language}, prompt: (.*)", out)
        (answer,) = re.findall(rf"# {language}, answer: (.*)", out)
        assert prompt == task.prompt("…", task.question(language), language)
        assert tasks.parse(task, language, answer).status == "ok"
    code, out, _ = call("show", name, "--json")
    shown = json.loads(out)
    assert tasks.tasks_of({name: shown["definition"]}, "shown") == (task,) and set(shown["examples"]) == {
        *task.languages
    }


def test_check(call, file, tmp_path):
    code, out, _ = call("check", file)
    assert code == 0 and "weather: single, 3 labels, en, zh" in out
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"tasks": {"suicide_risk": MOOD}}))
    code, out, err = call("check", tmp_path / "bad.yaml")
    assert (code, out) == (2, "") and "bad.yaml: task 'suicide_risk' comes with this package" in err
    code, _, err = call("show", "weathr", "--tasks", file)
    assert code == 2 and "did you mean 'weather'" in err
    tasks.forget_added()
    code, _, err = call("show", "weather")
    assert code == 2 and "a task of your own is made known by --tasks FILE" in err


def test_the_example_of_the_page_is_a_task_and_every_key_is_explained(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "tasks.yaml").write_text(example, encoding="utf-8")
    (task,) = tasks.read_tasks(tmp_path)
    (asked,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    prompt, answer = asked.strip().split("\n")
    assert prompt == task.prompt("It poured all day.", task.question("en"), "en")
    assert tasks.parse(task, "en", answer).labels == ("rain",)
    from mentalglm_jax.text.task_files import _LABEL_KEYS, _TASK_KEYS

    for key in (*_TASK_KEYS, *_LABEL_KEYS):
        assert f"\n| `{key}` |" in text, key
