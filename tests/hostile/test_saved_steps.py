"""Checkpoints of a run that somebody else began: Orbax reads nothing of them that has no bound."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import tensorstore

from mentalglm_jax.checkpoints import ocdbt
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.foreign import MAX_JSON_BYTES
from mentalglm_jax.train.checkpoint import Checkpoints
from mentalglm_jax.train.loop import _Tally
from mentalglm_jax.train.saved import check_form
from tests.hostile.attack import refused
from tests.hostile.foreign_files import called
from tests.hostile.test_orbax_files import bomb_manifest

IDENTITY = {"seed": 1}


def tree(value: float = 1.0) -> dict:
    return {"trainable": {"w": jnp.full((64, 64), value)}, "optimizer": (jnp.float32(value), ())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory, IDENTITY, best_by="loss")
    for step in (1, 2):
        checkpoints.save(step, tree(step), {"next": step}, {"loss": 1.0 / step})
    checkpoints.close()
    return directory


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restored(directory: Path):
    checkpoints = Checkpoints(directory, IDENTITY, best_by="loss")
    try:
        return checkpoints.restore(tree(0))
    finally:
        checkpoints.close()


def test_the_undamaged_ones_come_back(copy):
    step, state, data = restored(copy)
    assert (step, float(state["optimizer"][0]), data) == (2, 2.0, {"next": 2})
    assert not list(copy.glob("*.damaged"))


FILES = ["2/metrics/metrics", "2/identity/metadata", "2/data/metadata", "2/state/_METADATA", "2/state/_sharding",
         "2/state/manifest.ocdbt", "2/state/d/x", "2/_CHECKPOINT_METADATA"]  # fmt: skip


@pytest.mark.parametrize("kind", ["a pipe", "a link"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(copy, tmp_path, name, kind):
    path = copy / name
    path.unlink(missing_ok=True)
    (tmp_path / "mine").write_text("{}")
    os.mkfifo(path) if kind == "a pipe" else path.symlink_to(tmp_path / "mine")
    says = "is neither a file nor a directory" if kind == "a pipe" else "is a link"
    refused(called(lambda: restored(copy)), rf"checkpoints/{name}: {says}")


JSON = [*(one for one in FILES if "ocdbt" not in one and "/d/" not in one), "2/state/array_metadatas/process_0",
        "metadata/_ROOT_METADATA", "3/metrics/metrics"]  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_json_without_end(copy, name):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    with (copy / name).open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    refused(called(lambda: restored(copy)), rf"checkpoints/{name}: more than {MAX_JSON_BYTES} bytes")


METRICS = ["", "[1]", '{"loss": "low"}', '{"loss": NaN}', '{"acc": 1}', '{"loss": 1, "x": []}', "[" * 100_000]


@pytest.mark.parametrize("text", METRICS, ids=lambda text: text[:20] or "empty")
def test_metrics_that_are_none(copy, text):
    (copy / "2" / "metrics" / "metrics").write_text(text)
    refused(called(lambda: restored(copy)), r"2/metrics/metrics: ")


def from_the_one_before(copy: Path, caplog, says: str) -> None:
    step, _, data = restored(copy)
    assert (step, data) == (1, {"next": 1})
    assert (copy / "2.damaged").is_dir() and not (copy / "2").exists()
    (line,) = [record.getMessage() for record in caplog.records if "damaged checkpoint" in record.getMessage()]
    assert says in line and "\n" not in line


@pytest.mark.parametrize("name", ["identity", "data"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', "[]", '{"a": "\\ud800"}'],
                         ids=lambda text: text[:9])  # fmt: skip
def test_json_that_is_none(copy, caplog, name, text):
    (copy / "2" / name / "metadata").write_text(text)
    from_the_one_before(copy, caplog, f"{name}/metadata: ")


@pytest.mark.parametrize("where", ["", "ocdbt.process_0"])
def test_a_database_that_names_files_without_end(copy, tmp_path, caplog, where):
    """As of converted checkpoints: 24 kilobytes were 4 GB."""
    bomb_manifest(tmp_path / "database", copy / "2" / "state" / where, 10_000_000)
    from_the_one_before(copy, caplog, "state: not a readable Orbax checkpoint")


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "a/b", 3, None], ids=repr)
def test_a_name_that_leads_out(copy, caplog, name):
    file = copy / "2" / "state" / "_METADATA"
    described = json.loads(file.read_text())
    described["tree_metadata"][next(iter(described["tree_metadata"]))]["key_metadata"][0]["key"] = name
    file.write_text(json.dumps(described))
    from_the_one_before(copy, caplog, "state/_METADATA: tree_metadata does not name")


@pytest.mark.parametrize("chunks", [[1 << 16, 1 << 16], [64, 1 << 30]], ids=repr)
def test_a_chunk_that_is_larger_than_its_array(copy, caplog, chunks):
    """A chunk is decoded whole: this one would be 16 GiB."""
    place = copy / "2" / "state"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{place}/"}).result()
    described = json.loads(store["trainable.w/.zarray"])
    store["trainable.w/.zarray"] = json.dumps(described | {"chunks": chunks}).encode()
    from_the_one_before(copy, caplog, "parameter trainable.w has shape [64, 64] in chunks of")


def test_a_process_that_cannot_be_started_damages_nothing(copy, monkeypatch):
    def refuse(*_, **__):
        raise RunError("no process can be started to read it")

    monkeypatch.setattr("mentalglm_jax.checkpoints.orbax_files.check_databases", refuse)
    refused(called(lambda: restored(copy)), "no process can be started", code=1)
    assert not list(copy.glob("*.damaged")) and ocdbt.check_databases is not refuse


STATES = [None, [], {}, {"next": -1}, {"next": 1.5}, {"next": True}, {"next": "1"}, {"next": 2**60}, {"next": None},
          {"next": 1, "more": 1}, {"next": {"next": 1}}]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=repr)
def test_a_place_in_the_data_that_is_none(state):
    check_form({"next": 3}, {"next": 0}, "f")
    with pytest.raises(InputError, match="f: does not say where in the data it was"):
        check_form(state, {"next": 0}, "f")


TALLIES = [{"skipped": -1}, {"stale": "x"}, {"best": float("nan")}, {"best_step": 0.5}, {"metrics": []},
           {"metrics": {"loss": 1.0}}, {"metrics": {"loss": "x", "accuracy": 1}}, {"reference": [1]},
           {"bad_in_a_row": 2**60}]  # fmt: skip


@pytest.mark.parametrize("tally", TALLIES, ids=repr)
def test_counts_that_are_none(tally):
    with pytest.raises(InputError, match="f: tally"):
        _Tally.read(tally, "f")
