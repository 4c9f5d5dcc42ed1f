"""Where checkpoints are read from and written to: the Hub's cache, folders in the way, interrupted saves."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import transformers

from mentalglm_jax.checkpoints import directories as checkpoints
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.errors import InputError, RunError


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the small native checkpoint that a test may damage."""
    return Path(shutil.copytree(saved / "glm", tmp_path / "copy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize='int3' is not one of int8, int4, nf4"),
        ({"dtype": "float16"}, "overflows"),
        ({"dtype": "int8"}, "use float32 or bfloat16"),
        ({"dtype": "brain"}, "use float32 or bfloat16"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
    ],
)
def test_an_option_we_do_not_have_is_refused(saved, options, message):
    with pytest.raises(InputError, match=message):
        load(saved / "glm", **options)


# ---- places ----


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no/such/directory", "no such directory"),
        (
            "nobody/nothing",
            "nobody/nothing: no such directory here, and it is not in the Hub's cache either, and HF_HUB_OFFLINE",
        ),
        ("../x", "no such directory"),
        ("", "missing|no such"),
    ],
)
def test_a_place_that_is_not_there(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(place)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_directory(saved, tmp_path):
    with pytest.raises(InputError, match="give the directory"):
        load(saved / "glm" / "config.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        save_pretrained(load(saved / "glm"), tmp_path / "file")


def test_saving_replaces_a_checkpoint_but_nothing_else(saved, copy, tmp_path):
    model = load(saved / "glm")
    save_pretrained(model, tmp_path / "out", max_shard_bytes=20_000)
    save_pretrained(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other files .thesis\.tex."):
        save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_what_was_there(saved, tmp_path, monkeypatch, error):
    model = load(saved / "glm")
    save_pretrained(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    calls = []

    def take(stack, layer, original=checkpoints._take):
        calls.append(layer)
        if len(calls) == 9:
            raise error
        return original(stack, layer)

    monkeypatch.setattr(checkpoints, "_take", take)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save_pretrained(model, tmp_path / "out")
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_tokenizer_files_are_copied_or_refused(saved, tmp_path):
    model = load(saved / "glm")
    with pytest.raises(InputError, match="no tokenizer files"):
        save_pretrained(model, tmp_path / "out", tokenizer=saved)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    # Without a limit of their own, tokenizers are written with this one; it is the only integer beyond 64 bits.
    config = {"model_max_length": transformers.tokenization_utils_base.VERY_LARGE_INTEGER}
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    save_pretrained(model, tmp_path / "out", tokenizer=tmp_path / "tok")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == config
