"""A tiny model, adapter, rows and a finished run for the attacks on ``probes``; a test takes a copy and damages it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.attack import Outcome, run
from tests.probes.tiny import POSTS, boilerplate, make_model, make_row, make_tokenizer, save_adapter


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``adapter`` and ``rows.jsonl`` as honest programs write them."""
    path = tmp_path_factory.mktemp("clean")
    tokenizer = make_tokenizer([f"{post} {boilerplate(language)}" for language, post, _ in POSTS], 360)
    make_model(tokenizer).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    save_adapter(path / "model", path / "adapter")
    rows = [make_row(tokenizer, index, *post) for index, post in enumerate(POSTS[:2])]
    (path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def place(clean: Path, tmp_path: Path) -> Path:
    """A copy of ``clean`` to be damaged."""
    shutil.copytree(clean, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def probe(place: Path, capsys: pytest.CaptureFixture[str], *more: object, adapter: bool = False) -> Outcome:
    """``probes run`` over the copy."""
    given = ["--adapter", place / "adapter"] if adapter else []
    files = [place / "model", "--in", place / "rows.jsonl", "--out", place / "out"]
    return run(["probes", "run", *files, "--device", "cpu", "--budget", "fast", *given, *more], capsys)
