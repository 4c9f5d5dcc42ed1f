"""A directory that is replaced: whatever goes wrong, the old one or the new one is there, whole."""

import ctypes
import os
from pathlib import Path

import pytest

from mentalglm_jax import files
from mentalglm_jax.errors import RunError
from mentalglm_jax.files import replace_dir

CALLS = ["one call", "two renames"]


@pytest.fixture(params=CALLS)
def call(request, monkeypatch):
    """The system's exchange, and what is done on a file system without it."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    elif not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("renameat2 is of Linux")
    return request.param


def anything(_: Path) -> None:
    """A directory that may hold what it likes."""


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_the_new_takes_the_place_of_the_old(tmp_path, call):
    path = folder(tmp_path / "out", "old")
    with replace_dir(path, anything) as temporary:
        (temporary / "file").write_text("new")
        assert (path / "file").read_text() == "old"
    assert (path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
    with replace_dir(tmp_path / "first", anything) as temporary:
        (temporary / "file").write_text("first")
    assert (tmp_path / "first" / "file").read_text() == "first" and sorted(os.listdir(tmp_path)) == ["first", "out"]


def test_a_failure_inside_leaves_the_old(tmp_path, call):
    path = folder(tmp_path / "out", "old")
    with pytest.raises(RunError, match=r"cannot write .*what was there is unchanged"), replace_dir(path, anything):
        raise OSError(28, "No space left on device")
    assert (path / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_between_two_renames_takes_the_first_back(tmp_path, monkeypatch, error):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = folder(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    expected = RunError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), replace_dir(path, anything) as temporary:
        (temporary / "file").write_text("new")
    assert (path / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_there_is_no_moment_without_the_directory(tmp_path, monkeypatch):
    """Where the system exchanges in one call, no rename takes the old directory away."""
    path = folder(tmp_path / "out", "old")
    if not files._exchange(folder(tmp_path / "a", "a"), folder(tmp_path / "b", "b")):
        pytest.skip("this file system does not exchange")
    assert (tmp_path / "a" / "file").read_text() == "b"
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail(f"{self} was renamed"))
    with replace_dir(path, anything) as temporary:
        (temporary / "file").write_text("new")
    assert (path / "file").read_text() == "new"
