"""Who may read what a command writes: posts are their owner's only, the umask is never overruled, a replaced file keeps
its mode, and no page or card that others will read holds a path of this machine."""

import os
import shutil
import stat

import pytest

from mentalglm_jax import files as core
from probes import files as probing
from tests.hostile.attack import run

# What holds posts or answers about them, of all that the commands below write.
POSTS = {"generations.jsonl", "label_scores.jsonl", "sample.jsonl", "review.html", "review.csv", "reviewed.jsonl",
         "accepted.jsonl", "agreement.json", "train.jsonl", "reference_logits.npz"}  # fmt: skip
COMMANDS = {
    "scrub": ["data", "inspect", "records.jsonl", "--no-near", "--out", "scrubbed"],
    "review export": ["data", "review", "export", "records.jsonl", "--out", "review"],
    "review import": ["data", "review", "import", "rated", "ratings.json"],
    "evaluate": ["evaluate", "finished/generations.jsonl", "--out", "evaluated", "--against", "finished"],
    "leaderboard": ["leaderboard", "finished", "--out", "boards/board.md"],
    "export": ["export", "trained", "--to", "peft", "--out", "exported"],
    "convert": ["convert", "model", "converted", "--to", "chatglm"],
}
OPEN = {0o022: 0o644, 0o077: 0o600, 0o027: 0o640}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=OPEN, ids=lambda mask: f"umask {mask:03o}")
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("command", COMMANDS)
def test_modes_of_what_a_command_writes(world, umask, capsys, command):
    there = {path: path.stat().st_ino for path in world.rglob("*")}
    assert run(["mentalglm", *COMMANDS[command]], capsys).code == 0
    written = [path for path in world.rglob("*") if there.get(path) != path.stat().st_ino]
    assert written
    for path in written:
        if path.is_dir():
            private = path.name in ("scrubbed", "review", "rated", "evaluated")
            assert mode(path) == (0o700 if private else 0o777 & ~umask), path
        else:
            assert mode(path) == (0o600 if path.name in POSTS else OPEN[umask]), path
    assert {path.name for path in written} & POSTS or command in ("evaluate", "leaderboard", "export", "convert")


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o444])
@pytest.mark.parametrize("package", [core, probing], ids=["mentalglm", "probes"])
@pytest.mark.parametrize("private", [False, True])
def test_a_replaced_file_keeps_its_mode(tmp_path, umask, package, kept, private):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(kept)
    package.write_bytes(path, b"new", private)
    assert (path.read_bytes(), mode(path)) == (b"new", kept)


@pytest.mark.parametrize("package", [core, probing], ids=["mentalglm", "probes"])
@pytest.mark.parametrize("private", [False, True])
def test_a_new_file_is_what_the_umask_allows_or_its_owners(tmp_path, umask, package, private):
    path = tmp_path / "new" / "folder" / "file"
    package.write_bytes(path, b"new", private)
    assert mode(path) == (0o600 if private else OPEN[umask])
    assert mode(path.parent) == (0o700 if private else 0o777 & ~umask)
    assert mode(path.parent.parent) == 0o777 & ~umask


@pytest.mark.parametrize("kept", [0o700, 0o750, 0o711])
def test_a_replaced_directory_keeps_its_mode_and_those_of_its_files(tmp_path, umask, kept):
    out = tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    for name, its in (("a", 0o600), ("inside/b", 0o640)):
        (out / name).write_text("old")
        (out / name).chmod(its)
    (out / "inside").chmod(0o700)
    out.chmod(kept)
    with core.replace_dir(out, lambda _: None) as temporary:
        (temporary / "inside").mkdir()
        for name in ("a", "inside/b", "inside/new"):
            core.write_text(temporary / name, "new")
    found = [mode(out / name) for name in (".", "a", "inside", "inside/b", "inside/new")]
    assert found == [kept, 0o600, 0o700, 0o640, OPEN[umask]]


def test_a_half_written_private_file_is_never_open(tmp_path, monkeypatch):
    """Not for a moment: the mode is there before the first byte."""
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (seen.append(mode(one)), replace(one, other)))
    opened = os.open
    monkeypatch.setattr(os, "open", lambda *given: (seen.append(given[2]), opened(*given))[1])
    core.write_bytes(tmp_path / "posts", b"new", private=True)
    assert seen == [0o600, 0o600]


def test_a_killed_generation_leaves_a_private_file(world, capsys):
    """``.partial`` holds posts, too."""
    from mentalglm_jax.inference.generate import append_rows, open_partial

    open_partial(world / "answers.jsonl.partial", {"model": "m"}, 4)
    append_rows(world / "answers.jsonl.partial", [{"id": "a", "prompt_ids": [1], "output_ids": [2]}])
    assert mode(world / "answers.jsonl.partial") == 0o600


@pytest.mark.parametrize("how", ["relative", "absolute", "parent", "file"])
def test_pages_and_cards_hold_no_path(world, capsys, monkeypatch, how):
    secret = world / "clinic-of-dr-who" / "patients"
    secret.mkdir(parents=True)
    shutil.copytree(world / "finished", secret / "answers")
    monkeypatch.chdir(secret)
    given = {"relative": "answers", "absolute": secret / "answers", "parent": "../patients/answers",
             "file": secret / "answers" / "generations.jsonl"}[how]  # fmt: skip
    command = ["mentalglm", "evaluate", given, "--out", "out", "--against", secret / "answers"]
    assert run(command, capsys).code == 0
    text = "".join(path.read_text("utf-8") for path in (secret / "out").iterdir())
    assert "answers" in text
    assert not [part for part in ("clinic-of-dr-who", "patients", str(world)) if part in text]
