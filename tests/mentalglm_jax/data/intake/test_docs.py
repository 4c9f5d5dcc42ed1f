"""docs/own-data.md: what it shows of the import is what the commands print and write."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from flax import nnx

from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.cli.main import main
from mentalglm_jax.data.intake.output import write_import
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.roots import iter_root
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.planning.plan import mesh_sizes
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.recipe import load_recipe
from tests.fences import blocks

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
    train = recipe.stages[0].train
    assert train.sequence_length >= longest
    # The plan that the command prints asks for eight devices, and what is trained is what is planned.
    assert mesh_sizes(recipe) == (1, -1, 1) and recipe.mesh is not None and train.rows // train.accumulate % 8 == 0


@pytest.mark.parametrize(("posts", "width", "epochs"), [(46, None, 10), (46, 2048, 10), (46, 256, 50), (46, 576, 20),
                                                       (20_000, None, 3)])  # fmt: skip
def test_the_recipe_of_a_small_table_reads_it_more_often(tmp_path, posts, width, epochs):
    model = tmp_path / "model"
    if width is not None:
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"hidden_size": width}), "utf-8")
    question = tasks.get_task("suicide_risk").question("en")
    records = [Record(f"r{n}", "suicide_risk", "en", f"I have slept badly since May, {n} nights.", question, "low")
               for n in range(posts)]  # fmt: skip
    write_import(tmp_path / "mine", records, tasks.get_task("suicide_risk"),
                 {"splits": {}, "languages": {"en": posts}, "task": "suicide_risk", "explanations": 0, "rows": posts,
                  "source": {"name": "x"}, "notes": []}, model=str(model), seed=0)  # fmt: skip
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml")
    train = recipe.stages[0].train
    assert train.epochs == epochs
    assert (recipe.model.dtype, train.learning_rate) == {
        256: ("float32", 4e-3), 576: ("float32", 1e-3)}.get(width, ("bfloat16", 1e-4))  # fmt: skip


def in_readme() -> list[str]:
    (block,) = [one for one in blocks(ROOT / "README.md") if "mentalglm data import" in one.text]
    return block.commands()


def test_the_import_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    line, then = in_readme()
    with pytest.raises(SystemExit, match="0"):
        main(shlex.split(line)[1:])
    tasks.forget_added()
    recipe = load_recipe(tmp_path / shlex.split(then)[2])
    assert recipe.model.path == "runs/demo/base" and recipe.probe.task == "week"


def write_tiny(directory: Path) -> None:
    tokenizer = GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
                       pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_ids)  # fmt: skip
    save_pretrained(Glm(config, rngs=nnx.Rngs(0)), directory, tokenizer=tokenizer)


@pytest.mark.timeout(1500)
@pytest.mark.slow  # trains; a tiny model of random weights stands in for the demo's base, and one epoch for fifty
def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    write_tiny(tmp_path / "runs" / "demo" / "base")
    (tmp_path / "new.txt").write_text("The deadlines pile up.\n今天和朋友去爬山。\n", encoding="utf-8")
    pieces = shown("sh")
    assert len(pieces) == 2
    for line in [*"".join(pieces).splitlines(), *in_readme()]:
        program, *arguments = shlex.split(line.replace("train.epochs=50", "train.epochs=1"))
        if arguments[0] == "run":  # after one epoch no answer states a label, and there would be nothing to probe
            arguments += ["--set", "train.epochs=1", "--set", "probe.posts=0", "--set", "model.dtype=float32"]
        assert program == "mentalglm"
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert not end.value.code, (line, capsys.readouterr().err)
        tasks.forget_added()
    assert len((tmp_path / "answers.csv").read_text("utf-8-sig").splitlines()) == 3
    assert (tmp_path / "week-adapter" / "tasks.yaml").is_file() and (tmp_path / "scores" / "evaluation.html").is_file()
