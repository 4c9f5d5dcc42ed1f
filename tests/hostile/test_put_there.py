"""Somebody puts a file into a directory while a command is at work that will replace it whole: it is not lost.

The target is judged before the work, right before the exchange, and, as the old directory, after it."""

import functools
import os
from pathlib import Path

import pytest

from mentalglm_jax import files
from mentalglm_jax.errors import InputError, MentalGLMError
from mentalglm_jax.files import check_owned, replace_dir
from tests.hostile.attack import refused, run
from tests.hostile.teacher_world import KEY, World, accepted
from tests.hostile.world import WRITES, contents
from tests.mentalglm_jax.endpoint import behaving

ours = functools.partial(check_owned, owned={"ours.txt", "sub/ours.txt"}.__contains__)
HOLDS = r"would be replaced but holds other files \({}\); choose another place"


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


@pytest.fixture
def meanwhile(monkeypatch):
    """``meanwhile(path)``: that file appears once the work on its directory has begun."""

    def arrange(path: Path) -> None:
        beside = files._beside

        def begun(target: Path) -> Path:
            if target == path.parent or target.resolve() == path.parent.resolve():
                put(path)
            return beside(target)

        monkeypatch.setattr(files, "_beside", begun)

    return arrange


@pytest.mark.parametrize("name", ["mine.txt", "sub/mine.txt", "ours.txt/mine.txt", ".ours.txt", "link"])
def test_what_was_there_before_is_told_before_the_work(tmp_path, name):
    if name == "link":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sub").symlink_to(tmp_path)
    else:
        put(tmp_path / "out" / name)
    before = contents(tmp_path)
    says = HOLDS.format("sub" if name == "link" else name)
    with pytest.raises(InputError, match=says), replace_dir(tmp_path / "out", ours):
        pytest.fail("the work began")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", ["ours.txt", ".ours.txt.0123456789abcdef.unfinished", "empty"])
def test_what_we_wrote_may_be_replaced(tmp_path, left):
    (tmp_path / "out" / "empty").mkdir(parents=True)
    put(tmp_path / "out" / left) if left != "empty" else None
    with replace_dir(tmp_path / "out", ours) as temporary:
        (temporary / "ours.txt").write_text("new")
    assert contents(tmp_path) == {"out/ours.txt": b"new"}


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("moment", ["during the work", "right before", "right after"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["one call", "two renames"])
def test_a_file_put_there_meanwhile_stays(tmp_path, monkeypatch, there, moment, exchanges):
    """ "Right after": into the old directory, which whoever stands in it still sees as the target."""
    out = tmp_path / "out"
    if there:
        put(out / "ours.txt")
    exchange, rename, calls = files._exchange, Path.rename, []

    def exchanged(one: Path, other: Path) -> bool:
        calls.append(one)
        if moment == "right before" and len(calls) == 1:
            put(other / "mine.txt")
        done = exchanges and exchange(one, other)
        if moment == "right after" and len(calls) == 1 and done:
            put(one / "mine.txt")
        return done

    def renamed(self: Path, target: Path) -> Path:
        if moment == "right before" and target == out and not self.name.endswith(".old") and not out.exists():
            put(target / "mine.txt")
        calls.append(self)
        result = rename(self, target)
        if moment == "right after" and target.name.endswith(".old"):
            put(target / "mine.txt")
        return result

    monkeypatch.setattr(files, "_exchange", exchanged)
    monkeypatch.setattr(Path, "rename", renamed)
    if moment == "right after" and not there:
        with replace_dir(out, ours) as temporary:  # there is no old directory in which somebody could stand
            (temporary / "ours.txt").write_text("new")
        assert contents(tmp_path) == {"out/ours.txt": b"new"}
        return

    def work() -> None:
        with replace_dir(out, ours) as temporary:
            (temporary / "ours.txt").write_text("new")
            if moment == "during the work":
                put(out / "mine.txt")

    with pytest.raises(MentalGLMError) as refusal:
        work()
    assert moment != "during the work" or not calls  # killed in between, the old directory would be a left-over
    assert str(refusal.value).startswith(f"{out}: ") and ".unfinished" not in str(refusal.value)
    assert contents(tmp_path) == {"out/mine.txt": b"mine"} | ({"out/ours.txt": b"mine"} if there else {})


def test_a_link_is_not_replaced_by_a_directory(tmp_path):
    put(tmp_path / "elsewhere" / "ours.txt")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="out: is a link and would be replaced"), replace_dir(tmp_path / "out", ours):
        pytest.fail("the work began")
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "elsewhere") == {"ours.txt": b"mine"}


TARGETS = {
    "mentalglm convert": ["converted"], "mentalglm export": ["exported"],
    "mentalglm train": ["run/data/faithful", "run/tokenizer"],
}  # fmt: skip


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize(("command", "target"), [(name, one) for name, found in TARGETS.items() for one in found])
def test_every_command_that_replaces_a_directory(world, capsys, meanwhile, command, target, there):
    if there and command != "mentalglm train":
        assert run([*command.split(), *WRITES[command][0]], capsys).code == 0
    meanwhile(world / target / "mine.txt")
    before = contents(world / target)
    outcome = run([*command.split(), *WRITES[command][0]], capsys)
    lines = [line for line in outcome.err.splitlines(keepends=True) if not line.endswith(" ...\n")]
    refused(type(outcome)(outcome.code, "", "".join(lines), 0.0), rf"{target}: " + HOLDS.format("mine.txt"))
    assert contents(world / target) == before | {"mine.txt": b"mine"}
    assert not list(world.rglob("*.unfinished"))


def test_a_file_kept_by_restart_is_not_deleted_by_the_stage_that_follows(world, capsys):
    """``--restart`` leaves what a run does not write, also in folders that the run then replaces."""
    put(world / "run" / "data" / "faithful" / "mine.txt")
    put(world / "run" / "run.json")
    (world / "run" / "run.json").write_text('{"recipe": {}, "stages": {}}')
    outcome = run(["mentalglm", "train", "recipe.yaml", "--restart"], capsys)
    assert outcome.code == 2 and "run/data/faithful: would be replaced but holds other files (mine.txt)" in outcome.err
    assert (world / "run" / "data" / "faithful" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_data_build(tmp_path, capsys, monkeypatch, there):
    monkeypatch.setenv("HOSTILE_KEY", KEY)
    world = World(tmp_path, capsys)
    mine = tmp_path / "out" / "data" / "mine.txt"
    with behaving() as server:
        if there:
            accepted(world.build(server.url))
        before = contents(tmp_path / "out")
        beside = files._beside
        monkeypatch.setattr(files, "_beside", lambda path: (put(mine) if path.name == "out" else None, beside(path))[1])
        says = r"out/data/mine\.txt: was put there since it was written|out: not empty and not written by this command"
        refused(world.build(server.url), says)
    assert contents(tmp_path / "out") == before | {"data/mine.txt": b"mine"}
    assert world.paid() == 3 and not list(tmp_path.rglob("*.unfinished"))


def test_modes_survive_a_refused_exchange(tmp_path):
    put(tmp_path / "out" / "ours.txt")
    os.chmod(tmp_path / "out", 0o711)
    with pytest.raises(InputError), replace_dir(tmp_path / "out", ours):
        put(tmp_path / "out" / "mine.txt")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o711
