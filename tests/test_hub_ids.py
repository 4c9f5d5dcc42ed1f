"""A model and an adapter by their Hub ids, in both packages: the real client, and a server that writes down what it is
asked."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mentalglm_jax as mg
from mentalglm_jax.errors import InputError
from probes.errors import ProbeInputError
from probes.models.load import load_model
from tests.hostile.attack import refused, run
from tests.hostile.probes_files import clean, place  # noqa: F401
from tests.hub import hub, point_at

IDS = [[5, 80, 9, 33, 12]]
UNWANTED = {"evil.py", "pytorch_model.bin", "big.gguf", "optimizer.pt"}


@pytest.fixture
def server(place, monkeypatch, tmp_path):  # noqa: F811
    """Base and adapter on the Hub, with files that nobody needs."""
    with hub() as state:
        for name in ("model", "adapter"):
            state.serve(f"org/{name}", place / name)
            state.files[f"org/{name}"] |= dict.fromkeys(UNWANTED, b"x")
        state.files["org/adapter"]["model.safetensors"] = b"another model, too"
        point_at(state, monkeypatch, tmp_path / "cache")
        yield state


def logits(model, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = np.asarray(mg.load(model, adapter=adapter)(jnp.array(IDS)))
        theirs, _ = load_model(model, adapter, merge=False)
    with torch.no_grad():
        return ours, theirs(input_ids=torch.tensor(IDS)).logits.numpy()


def test_an_id_is_what_the_directory_is(place, server, monkeypatch):  # noqa: F811
    here, there = logits(place / "model", place / "adapter"), logits("org/model", "org/adapter")
    for local, named in zip(here, there, strict=True):
        np.testing.assert_array_equal(local, named)
    fetched = {path.rpartition("/")[2] for how, path, _ in server.requests if how == "GET" and "/resolve/" in path}
    assert {"model.safetensors", "config.json", "adapter_model.safetensors", "adapter_config.json"} <= fetched
    assert not UNWANTED & fetched
    assert not [path for _, path, _ in server.requests if path.startswith("/org/adapter") and "/model.saf" in path]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # then from the cache
    asked = len(server.requests)
    assert all(np.isfinite(values).all() for values in logits("org/model", "org/adapter"))
    assert len(server.requests) == asked


REASONS = {"unknown": "no such adapter directory here, and the Hub has no such repository, or shows it to others only",
           "offline": "no such adapter directory here, and it is not in the Hub's cache either, and HF_HUB_OFFLINE",
           "away": "no such adapter directory here, and it is not in the Hub's cache either, and the Hub cannot",
           "form": "no such adapter directory, nor is it a Hub id"}  # fmt: skip


@pytest.mark.parametrize("why", REASONS)
@pytest.mark.parametrize("package", ["mentalglm", "probes"])
def test_an_adapter_that_is_nowhere(place, server, monkeypatch, tmp_path, capsys, package, why):  # noqa: F811
    if why == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif why == "away":
        server.url = "http://127.0.0.1:9"
        point_at(server, monkeypatch, tmp_path / "other")
    name = "org/a/b" if why == "form" else "org/absent"
    with pytest.raises((InputError, ProbeInputError), match=REASONS[why]) as error:
        mg.load(place / "model", adapter=name) if package == "mentalglm" else load_model(place / "model", name)
    assert "\n" not in str(error.value)
    record = {"id": "a", "task": "suicide_risk", "language": "en", "post": "Rain.", "question": "Q?", "label": "low"}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    files = ["--in", tmp_path / "in.jsonl", "--out", tmp_path / "out"]
    if package == "mentalglm":
        refused(run(["mentalglm", "generate", place / "model", "--adapter", name, *files], capsys), REASONS[why])
