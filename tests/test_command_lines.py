"""What both command lines have in common: help, examples, names of options, messages, version, completion, width."""

import importlib
import inspect
import re
import shlex
import typing
from collections import defaultdict
from pathlib import Path

import pytest
import typer
from rich.table import Table

from mentalglm_jax.cli import output
from probes import terminal
from tests.hostile.attack import ENTRIES, child, refused, run
from tests.hostile.commands import ALL, IDS

ROOT = Path(__file__).parents[1]
GROUPS = [["mentalglm"], ["mentalglm", "data"], ["mentalglm", "data", "review"], ["probes"]]


def leaf(entry, command):
    """Click's own object for a command."""
    found = typer.main.get_command(importlib.import_module(ENTRIES[entry]).app)
    for name in command.split():
        found = found.commands[name]
    return found


def helped(capsys, *command):
    outcome = run([*command, "--help"], capsys)
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.mark.parametrize(("entry", "command"), ALL, ids=IDS)
def test_help_ends_with_an_example_that_the_command_takes(capsys, entry, command):
    out = helped(capsys, entry, *command.split())
    examples = [line.strip() for line in out[out.index("Example") :].splitlines()[1:] if line.strip()]
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[: 1 + len(command.split())] == [entry, *command.split()], example
        leaf(entry, command).make_context(command, words[1 + len(command.split()) :]).close()


@pytest.mark.parametrize(("entry", "command"), ALL, ids=IDS)
def test_help_leaves_no_word_out(capsys, entry, command):
    """Markup of any kind would: `[data]` is a style to Rich, `<x>` a tag to Markdown."""
    shown = set(re.sub(r"-\n\s+", "-", helped(capsys, entry, *command.split())).split())
    for parameter in leaf(entry, command).params:
        assert set((parameter.help or "").split()) - shown == set(), parameter.name
        assert parameter.help or parameter.name == "help", f"{parameter.name} has no help"


def test_brackets_survive():
    app = typer.Typer(**output.TYPER)

    @app.command()
    def one() -> None:
        """Needs the [data] extra."""

    click = typer.main.get_command(app)
    context = click.make_context("one", [], resilient_parsing=True)
    assert "Needs the [data] extra." in click.get_help(context)


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_a_bare_command_shows_its_help(capsys, group):
    outcome = run(group, capsys)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert outcome.err.strip() == helped(capsys, *group).strip()
    assert "Commands" in outcome.err and "Example" in outcome.err


@pytest.mark.parametrize("entry", ENTRIES)
def test_version(capsys, entry):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    outcome = run([entry, "--version"], capsys)
    assert outcome.code == 0 and outcome.out.strip().endswith(f"mentalglm-jax {version[1]}") and not outcome.err


MESSAGES = [
    (["mentalglm", "--no-such"], "no such option: --no-such (mentalglm --help says more)"),
    (["mentalglm", "run", "a", "--no-such"], "no such option: --no-such (mentalglm run --help says more)"),
    (["mentalglm", "generate", "model"], "missing option --in (mentalglm generate --help says more)"),
    (["mentalglm", "run"], "missing argument recipe (mentalglm run --help says more)"),
    (["mentalglm", "fly"], "no such command 'fly' (mentalglm --help says more)"),
    (["mentalglm", "data", "fly"], "no such command 'fly' (mentalglm data --help says more)"),
    (["mentalglm", "data", "review", "export", "x", "--out", "y", "--limit", "0"],
     r"invalid value for --limit: .+ \(mentalglm data review export --help says more\)"),
    (["mentalglm", "generate", "m", "--in", "a", "--out", "b", "--batch-size", "x"],
     r"invalid value for --batch-size: .+ \(mentalglm generate --help says more\)"),
    (["mentalglm", "run", "a", "b"], r"got unexpected extra argument\(?s?\)? \(b\) \(mentalglm run --help says more\)"),
    (["mentalglm", "run", "a", "--set"], "option --set requires an argument"),
    (["probes", "--no-such"], "no such option: --no-such (probes --help says more)"),
    (["probes", "run", "m", "--out", "x"], "missing option --in (probes run --help says more)"),
    (["probes", "fly"], "no such command 'fly' (probes --help says more)"),
    (["probes", "run", "m", "--in", "a", "--out", "b", "--limit", "x"],
     r"invalid value for --limit: .+ \(probes run --help says more\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "says"), MESSAGES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_one_style_of_message(capsys, command, says):
    """One line; our names bare, what was typed in quotes; where to read more."""
    line = refused(run(command, capsys), ".")
    said = line.removeprefix(f"{command[0]}: ")
    assert said == says or re.fullmatch(says, said), said


def test_the_same_option_is_the_same_everywhere():
    """Of one name and one kind of value, and of one line of help where several commands take it for the same thing."""
    kinds, helps = defaultdict(set), defaultdict(set)
    for entry, command in ALL:
        hints = typing.get_type_hints(inspect.unwrap(leaf(entry, command).callback))
        for parameter in leaf(entry, command).params:
            for name in (one for one in parameter.opts if one.startswith("--") and one != "--help"):
                hint = hints[parameter.name]
                kinds[name].add(next(one for one in typing.get_args(hint) if one is not type(None))
                                if type(None) in typing.get_args(hint) else hint)  # fmt: skip
                helps[name].add(parameter.help)
    two = {name for name, found in kinds.items() if len(found) > 1}
    assert two <= {"--against"}, two  # other answers to compare with; of `bench` the name of another program
    for name in ("--adapter", "--json", "--replace-surrogates"):
        assert len(helps[name]) == 1, helps[name]
    # Of a recipe any value; of a command without a recipe the devices.
    assert len(helps["--set"]) == 2 and all("--set" in help_ and "(repeatable)" in help_ for help_ in helps["--set"])
    assert "Hub id" in next(iter(helps["--adapter"]))


@pytest.mark.parametrize("entry", ENTRIES)
def test_completion_is_installed_by_one_command(tmp_path, entry):
    environment = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    installed = child([entry, "--install-completion", "bash"], tmp_path, environment=environment)
    assert installed.code == 0 and f"{entry}.sh" in (tmp_path / ".bashrc").read_text(), installed.err
    asked = {f"_{entry.upper()}_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    for words, expected in ((f"{entry} ver", {"verify"} if entry == "probes" else set()), (f"{entry} r", {"run"})):
        found = child([entry], tmp_path, environment={**environment, **asked, "COMP_WORDS": words})
        assert found.code == 0 and expected <= set(found.out.split()), found
    assert not found.err


def test_tables_are_as_wide_as_the_terminal(capsys, monkeypatch):
    table = Table("one", "two")
    table.add_row("a" * 60, "b" * 60)
    for columns, lines in (("60", 6), ("200", 1)):
        monkeypatch.setenv("COLUMNS", columns)
        output.say(table)
        terminal.console().print(table)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= int(columns)
        assert (out.count("a" * 60) == 2) == (lines == 1)
    monkeypatch.delenv("COLUMNS")  # a file or a pipe: nothing is folded to 80 columns
    output.say(table)
    terminal.console().print(table)
    assert capsys.readouterr().out.count("a" * 60) == 2


def test_times_that_are_told_agree():
    """What help, recipes and docs say a command takes."""
    named = ("README.md", "configs/demo.yaml", "probes/known_cli.py", "docs/probes.md")
    texts = {name: (ROOT / name).read_text("utf-8") for name in named}
    demo = {
        name: re.findall(r"(\d+(?: to \d+)?) minutes on 2 cores", texts[name])
        for name in ("README.md", "configs/demo.yaml")
    }
    assert all(demo.values()) and len({time for found in demo.values() for time in found}) == 1, demo
    help_ = re.search(r"models: (\d+) CPU minutes, not (\d+)", texts["probes/known_cli.py"])
    docs = re.search(r"about (\d+) CPU minutes, `--quick` (\d+)", texts["docs/probes.md"])
    assert help_ is not None and docs is not None and help_.groups() == docs.groups()[::-1]


def test_the_command_that_installs_names_a_clone():
    """The name stands on no index: whoever takes it there would be installed."""
    for path in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "notebooks").glob("*.md"),
                 *(ROOT / "mentalglm_jax").rglob("*.py"), *(ROOT / "probes").rglob("*.py")]:  # fmt: skip
        assert not re.search(r"pip install ['\"]?mentalglm", path.read_text("utf-8")), path
