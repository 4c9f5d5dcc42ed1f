"""What several files of attacks share. `tests/conftest.py` counts them: every test item of this folder is one."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every command that writes has something to write; to be copied."""
    from tests.hostile.world import make_world

    directory = tmp_path_factory.mktemp("template")
    make_world(directory)
    return directory


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``template``, and the working directory."""
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"
