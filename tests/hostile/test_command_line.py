"""What a user, or a stranger's instructions, may type; and names from outside on the terminal."""

import json
import logging
import os
import stat

import pytest

from mentalglm_jax.cli.output import LogLines
from tests.hostile.attack import child, refused, run
from tests.hostile.foreign_files import JSON_ATTACKS

DAMAGED = r"run\.json: is damaged.*; delete .*/run or choose another run_dir"

BOMB = "{a: &a [x,x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
) + "}"  # fmt: skip
LAUGHS = BOMB[1:-1].replace("], ", "]\n")
YAML = {
    "brackets that do not close": ("[1, [2", "not valid YAML"),
    "200,000 brackets": ("[" * 200_000, "levels"),
    "nested dashes": ("- " * 3000 + "1", "levels"),
    "aliases that multiply": (BOMB, "aliases make more than 100000 values"),
    "an alias that holds itself": ("&a [*a]", "an alias that holds itself"),
    "a Python object": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a date that is none": ("2001-99-99", "month must be in"),
    "5,000 digits": ("9" * 5000, "5000 digits"),
    "10^40": ("1" + "0" * 40, "41 digits"),
    "a key twice": ("{a: 1, a: 2}", "'a' stands more than once"),
    "a key of a list": ("{[1]: 2}", "unhashable key"),
    "a tag that is wrong": ("!!timestamp x", "not valid YAML"),
    "control characters": ("\x07", "special characters are not allowed"),
    "300,000 characters": ("x" * 300_000, "too many"),
    "a merge of text": ("{<<: 1}", "expected a mapping"),
}  # fmt: skip
RECIPE = """run_dir: {run}
data: {{source: jsonl, root: {run}}}
model: {{path: {run}}}
stages: [{{name: one, train: {{steps: 1}}}}]
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run=tmp_path / "run"))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("command", [("train",), ("data", "build")], ids=["train", "build"])
@pytest.mark.parametrize("attack", YAML)
def test_set(recipe, tmp_path, capsys, attack, command):
    value, says = YAML[attack]
    if command[0] == "data":
        recipe.write_text("{}")
    refused(run(["mentalglm", *command, recipe, "--set", f"seed={value}"], capsys), rf"--set seed=?.*({says})")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [("train",), ("data", "build")], ids=["train", "build"])
@pytest.mark.parametrize("attack", YAML)
def test_recipe(tmp_path, capsys, attack, command):
    value, says = YAML[attack]
    (tmp_path / "recipe.yaml").write_text(f"seed: {value}\n")
    refused(run(["mentalglm", *command, tmp_path / "recipe.yaml"], capsys), rf"recipe\.yaml.*({says}|not valid|large)")


@pytest.mark.parametrize("command", [("train",), ("data", "build")], ids=["train", "build"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "not UTF-8"])
def test_recipe_that_is_none(tmp_path, capsys, kind, command):
    file = tmp_path / "recipe.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "directory":
        file.mkdir()
    else:
        file.write_bytes(b"a: \xff")
    refused(run(["mentalglm", *command, file], capsys), r"recipe\.yaml.*cannot be read")


@pytest.mark.parametrize(
    ("key", "says"),
    [("lora.alpha=.nan", "finite"), ("lora.alpha=.inf", "finite"), ("lora.alpha=1e39", "alpha|float32|number"),
     ("lora.rank=1000000000", "rank must be at least 1"), ("lora.target_modules='(a'", "regular expression"),
     ("lora.target_modules='(?=a)b'", "bounded time"), ("lora.alpha_pattern={'a(?i)b': 2}", "regular expression"),
     ("lora.rank_pattern={'(': 2}", "regular expression"), ("seed=-1", "seed"), ("stages.one.name=../x", "pattern")],
)  # fmt: skip
def test_value(recipe, capsys, key, says):
    refused(run(["mentalglm", "train", recipe, "--set", key], capsys), says)


@pytest.mark.parametrize("attack", JSON_ATTACKS)
def test_damaged_run(recipe, tmp_path, capsys, attack):
    raw = JSON_ATTACKS[attack][0]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    refused(run(["mentalglm", "train", recipe], capsys), DAMAGED)
    refused(run(["mentalglm", "export", tmp_path / "run", "--to", "peft"], capsys), "not a run directory")


@pytest.mark.parametrize(
    "state",
    ["{}", '{"recipe": {}}', '{"recipe": 3, "stages": {}}', '{"recipe": {}, "stages": [1]}',
     '{"recipe": {}, "stages": {"data": 3}}'],
)  # fmt: skip
def test_run_of_another_shape(recipe, tmp_path, capsys, state):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(state)
    refused(
        run(["mentalglm", "train", recipe], capsys),
        rf"{DAMAGED}|another recipe",
    )


def test_run_that_is_a_pipe(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "run.json")
    refused(run(["mentalglm", "train", recipe], capsys), DAMAGED)
    assert stat.S_ISFIFO((tmp_path / "run" / "run.json").stat().st_mode)


NAMES = ["\x1b[31mred", "a\nmentalglm: all is well", "[bold]x[/bold]", "[/]", "a\rb", "\x9b31m", "\u202egnp.exe",
         "\ud83d", "x\x00", "x\x08\x7f"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name) for name in NAMES])
@pytest.mark.parametrize("command", [("convert", "{}", "out"), ("train", "{}"), ("evaluate", "{}.jsonl"),
                                     ("leaderboard", "{}"), ("data", "inspect", "{}.jsonl"), ("export", "{}", "--to",
                                     "peft")], ids=lambda c: c[0] if c[0] != "data" else "inspect")  # fmt: skip
def test_name_is_inert(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    arguments = [part.replace("{}", name) for part in command]
    assert refused(run(["mentalglm", *arguments], capsys), ".").isprintable()


def test_a_result_with_a_name_like_markup(tmp_path, capsys):
    target = tmp_path / "[bold]x[red]"
    scores = {"n": 1, "weighted_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.5, "ci95": [0, 1]}
    entry = scores | {"floors": {}, "label_reading": None}
    target.mkdir()
    (target / "evaluation.json").write_text(json.dumps({"suicide_risk": entry}))
    outcome = run(["mentalglm", "leaderboard", target], capsys)
    assert outcome.code == 0, outcome.err
    assert "bold" in outcome.out and "\x1b" not in outcome.out


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                         {"PYTHONIOENCODING": "ascii"}], ids=["LC_ALL=C", "ASCII"])  # fmt: skip
def test_a_terminal_that_knows_ascii_only(tmp_path, environment):
    outcome = child(["mentalglm", "convert", "模型", "out"], tmp_path, environment=environment)
    refused(outcome, r"no such directory")
    outcome = child(["mentalglm", "data", "inspect", "帖子.jsonl"], tmp_path, environment=environment)
    refused(outcome, r"no such file")


BEYOND = {
    "10^18 steps": "stages.0.train.steps=999999999999999999", "10^9 rows": "stages.0.train.rows=1000000000",
    "10^300 epochs": "stages.0.train.epochs=1e300", "10^8 tokens a row": "stages.0.train.sequence_length=100000000",
    "a stage elsewhere": "stages.0.name=../../x", "no stages": "stages=[]", "a rank of 10^9": "lora.rank=1000000000",
    "NaN": "lora.alpha=.nan", "infinity": "stages.0.train.learning_rate=.inf",
    "programs that came with the recipe": "compile_cache=cache", "programs from an address": "compile_cache=gs://a/b",
}  # fmt: skip


@pytest.mark.parametrize("attack", BEYOND)
def test_a_value_that_would_never_end_or_lead_elsewhere(recipe, tmp_path, capsys, attack):
    key = BEYOND[attack].partition("=")[0].partition(".")[0]
    refused(run(["mentalglm", "train", recipe, "--set", BEYOND[attack]], capsys), rf"recipe\.yaml: {key}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("said", ["\x1b]0;owned\x07", "a\rmentalglm: all is well", "\x9b2J", "\u202egnp"], ids=repr)
def test_a_line_of_the_log_is_text(capsys, said):
    """A damaged checkpoint is told by the log, in the words of whoever damaged it."""
    before = logging.lastResort
    try:
        assert run(["mentalglm", "--version"], capsys).code == 0
        assert isinstance(logging.lastResort, LogLines)
        logging.lastResort.handle(logging.LogRecord("x", logging.WARNING, "f", 1, "%s: damaged", (said,), None))
        line = capsys.readouterr().err
    finally:
        logging.lastResort = before
    assert line.endswith(": damaged\n") and line.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "topology", ["v5e-" + "9" * 5000, "v5e:2x" + "9" * 5000, "x" * 5000, "v5p:9999999x1x1", "v5e-\u0668"]
)
def test_a_topology_of_any_length(recipe, capsys, topology):
    refused(
        run(["mentalglm", "plan", recipe, "--topology", topology], capsys), r"topology '\S+ is not known; write CHIP"
    )
