"""`probes demo` writes where nothing of anybody's is, and reads its models from the package wherever it is called."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from probes.demo import MODELS
from tests.hostile.attack import refused, run
from tests.hostile.world import contents, read_only


def demo(capsys, *arguments):
    return run(["probes", "demo", *arguments], capsys)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_file_in_the_way(capsys):
    Path("mine").write_text("mine")
    refused(demo(capsys, "--out", "mine"), "mine: a file is in the way; give a directory")
    assert Path("mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "cache", "manifest.json", "réport.html"])
def test_a_directory_with_something_else_in_it(capsys, name):
    Path("mine").mkdir()
    Path("mine", name).write_text("mine")
    refused(demo(capsys, "--out", "mine"), rf"mine/{name}: is not the demonstration's; give another --out")
    assert contents(Path("mine")) == {name: b"mine"}


def test_a_name_that_no_terminal_can_show(capsys):
    Path("mine").mkdir()
    Path("mine", "a\x1b[2Jb\n").write_text("mine")
    refused(demo(capsys, "--out", "mine"), r"mine/a\\u001b\[2Jb\\u000a: is not the demonstration's")


def test_a_report_of_somebody_else(capsys):
    Path("mine").mkdir()
    Path("mine", "report.html").write_text("mine")
    refused(demo(capsys, "--out", "mine"), r"mine/report.html: would be replaced, but mine is not a demonstration's")
    assert contents(Path("mine")) == {"report.html": b"mine"}


@pytest.mark.parametrize("name", [*MODELS, "report.html"])
def test_a_link_in_the_place_of_what_is_written(capsys, name):
    Path("elsewhere").mkdir()
    Path("mine").mkdir()
    Path("mine", name).symlink_to(Path("elsewhere").resolve())
    refused(demo(capsys, "--out", "mine"), rf"mine/{name}: is not the demonstration's; give another --out")
    assert contents(Path("elsewhere")) == {}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("file", ["summary.json", "report.html"])
def test_a_directory_of_the_same_name(capsys, name, file):
    Path("mine", name).mkdir(parents=True)
    Path("mine", name, file).write_text("mine")
    refused(demo(capsys, "--out", "mine"), rf"mine/{name}/{file}: would be replaced, but mine/{name} is not a run's")
    assert contents(Path("mine")) == {f"{name}/{file}": b"mine"}


def test_a_pipe_and_a_link_to_nowhere(capsys):
    os.mkfifo("pipe")
    refused(demo(capsys, "--out", "pipe"), "pipe: a file is in the way; give a directory")
    Path("broken").symlink_to("nowhere")
    refused(demo(capsys, "--out", "broken"), "broken: a file is in the way; give a directory")


def test_a_directory_that_nothing_can_be_made_in(capsys, tmp_path):
    Path("closed").mkdir()
    with read_only(tmp_path / "closed"):
        outcome = demo(capsys, "--out", "closed/first")
    outcome = replace(
        outcome, err="".join(line for line in outcome.err.splitlines(True) if "probing posts" not in line)
    )
    refused(outcome, "cannot (write|make|lock)|Permission denied", code=1)
    assert contents(Path("closed")) == {}


def test_a_package_without_its_models(capsys, monkeypatch, tmp_path):
    """Installed by hand, without the data; a directory of the same name here is not taken in their place."""
    for one in MODELS:
        Path(one).mkdir()
        Path(one, "generations.jsonl").write_text("{}")
    monkeypatch.setattr("probes.demo.PAIR", tmp_path / "installed")
    refused(demo(capsys, "--out", "mine"), "installed/faithful/generations.jsonl: cannot read")
    assert not Path("mine").exists()
