"""docs/own-data.md: what it shows of the import is what the commands print and write."""

import re
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.roots import iter_root
from mentalglm_jax.text import tasks
from mentalglm_jax.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "own-data.md").read_text("utf-8")
BAD = "post,label\nI cannot sleep.,high\n,low\nIt rains.,\nI had soup.,hihg\nI like rain.,low\n"


@pytest.fixture(autouse=True)
def known_tasks():
    yield
    tasks.forget_added()


def shown(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_shows_what_the_commands_print(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "table.csv").write_text(BAD, encoding="utf-8")
    for block in shown("console"):
        command, printed = block.split("\n", 1)
        program, *arguments = command.removeprefix("$ ").split()
        assert program == "mentalglm"
        with pytest.raises(SystemExit):
            main(arguments)
        said = capsys.readouterr()
        assert [line.rstrip() for line in (said.out + said.err).splitlines()] == printed.splitlines(), command
    assert yaml.safe_load(shown("yaml")[0]) == yaml.safe_load((tmp_path / "mine" / "tasks.yaml").read_text("utf-8"))


def test_the_recipe_of_an_import_is_read_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["data", "import", str(ROOT / "docs" / "examples" / "posts.csv"), "--text", "text", "--label", "label",
              "--task", "week", "--out", "mine", "--model", "somewhere"])  # fmt: skip
    tasks.forget_added()
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml")
    assert recipe.model.path == "somewhere" and recipe.probe.task == "week" and str(recipe.run_dir) == "runs/mine"
    assert recipe.data.root is not None
    found = list(iter_root(recipe.data.root))
    assert len(found) == 60 and {record.prompt for record in found} == {
        tasks.get_task("week").prompt(record.post, record.question, record.language) for record in found
    }
    longest = max(len(record.prompt) + len(record.answer()) for record in found if record.language == "zh")
    assert recipe.stages[0].train.sequence_length >= longest
