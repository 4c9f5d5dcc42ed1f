"""Saving, restoring, and every way a checkpoint can be unusable: each is one line, none loses what is still good."""

import logging
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from mentalglm_jax.checkpoints.orbax_files import reason
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.model.lora import LoraParam
from mentalglm_jax.train.checkpoint import Checkpoints, _quiet_stragglers, arrays, differences, few, fill
from tests.mentalglm_jax.tiny import parameters, same, tiny_model

IDENTITY = {"seed": 1, "train": {"rows": 4, "learning_rate": 0.1}}


def tree(value: float = 1.0) -> dict:
    """Large enough that Orbax gives the arrays files of their own."""
    return {"trainable": {"w": jnp.full((64, 64), value), "n": jnp.int32(value)}, "optimizer": (jnp.float32(value), ())}


def saved(directory: Path, *steps: int) -> Path:
    checkpoints = Checkpoints(directory, IDENTITY)
    for step in steps:
        checkpoints.save(step, tree(step), {"next": step})
    checkpoints.close()
    return directory


def restore(directory: Path, identity: dict | None = None):
    checkpoints = Checkpoints(directory, IDENTITY if identity is None else identity)
    try:
        return checkpoints.restore(tree(0))
    finally:
        checkpoints.close()


def truncate(step: Path) -> None:
    """Every file with array data loses its second half."""
    files = [path for path in step.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def drop_data(step: Path) -> None:
    shutil.rmtree(step / "data")


def garble_data(step: Path) -> None:
    for path in (step / "data").rglob("*"):
        if path.is_file():
            path.write_bytes(b'{"next":')


def empty_files(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


# Orbax closes its event loop under the reads still on their way; what arrives after `restore` has returned is Python's.
damaged = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
DAMAGES = [truncate, drop_state, drop_data, garble_data, empty_files]


def test_what_was_saved_comes_back(tmp_path):
    directory = saved(tmp_path / "a" / "checkpoints", 10, 20, 30)
    assert sorted(path.name for path in directory.iterdir()) == ["20", "30"]  # two are kept
    found = restore(directory)
    assert found is not None
    step, state, data = found
    assert (step, data) == (30, {"next": 30})
    assert jax.tree.structure(state) == jax.tree.structure(tree())
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(tree(30)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert restore(tmp_path / "new") is None


def test_an_adapter_survives_the_round_trip(tmp_path):
    model = tiny_model(dora=True)
    state = nnx.state(model, LoraParam)
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, arrays(state), {})
    checkpoints.close()
    fresh = tiny_model(dora=True)
    changed = jax.tree.map(lambda x: x + 1, nnx.state(fresh, LoraParam))
    checkpoints = Checkpoints(tmp_path, {})
    found = checkpoints.restore(arrays(changed))
    checkpoints.close()
    assert found is not None
    nnx.update(fresh, fill(changed, found[1]))
    assert same(parameters(fresh), parameters(model))


def test_a_save_does_not_see_what_happens_to_the_arrays_afterwards(tmp_path):
    """The training step takes (donates) the arrays while the checkpoint is still being written."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    value = step(jnp.zeros((512, 512)))
    checkpoints = Checkpoints(tmp_path, {})
    for number in range(1, 6):
        checkpoints.save(number, {"w": value}, {})
        value = step(value)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, {})
    found = checkpoints.restore({"w": value})
    checkpoints.close()
    assert found is not None and found[0] == 5
    np.testing.assert_array_equal(found[1]["w"], 5)


@damaged
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_and_training_can_save_again(tmp_path, damage, caplog):
    directory = saved(tmp_path, 10, 20)
    damage(directory / "20")
    checkpoints = Checkpoints(directory, IDENTITY)
    with caplog.at_level(logging.WARNING, logger="mentalglm_jax"):
        found = checkpoints.restore(tree(0))
    assert found is not None and found[0] == 10 and found[2] == {"next": 10}
    np.testing.assert_array_equal(found[1]["trainable"]["w"], 10)
    [record] = [record for record in caplog.records if record.name.startswith("mentalglm_jax")]
    line = record.getMessage()
    assert f"{directory}/20: damaged checkpoint (" in line and "20.damaged; going on from step 10" in line
    assert "\n" not in line and len(line) < 400
    # Steps up to and including the damaged one must be written again, not taken for saved.
    for step in (15, 20):
        checkpoints.save(step, tree(step), {"next": step})
    checkpoints.close()
    found = restore(directory)
    assert found is not None and found[0] == 20
    np.testing.assert_array_equal(found[1]["trainable"]["w"], 20)


@damaged
@pytest.mark.parametrize("damage", DAMAGES)
def test_all_damaged_is_one_line(tmp_path, damage):
    directory = saved(tmp_path, 10, 20)
    for step in (10, 20):
        damage(directory / str(step))
    with pytest.raises(
        RunError, match=r"none of the checkpoints 10, 20 can be read \(20: .*delete that directory"
    ) as error:
        restore(directory)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]  # left for a look


def test_only_the_noise_of_a_failed_read_is_silenced(monkeypatch):
    """CPython reports through the hook what it cannot raise; Orbax' closed event loop is the one thing left out."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with _quiet_stragglers():
        for text in ("Event loop is closed", "something else"):
            sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(unraisable.exc_value) for unraisable in seen] == ["something else"]
    assert sys.unraisablehook == seen.append


def test_a_save_that_was_cut_off_is_not_a_checkpoint(tmp_path):
    directory = saved(tmp_path, 10)
    shutil.copytree(directory / "10", directory / "20.orbax-checkpoint-tmp")
    found = restore(directory)
    assert found is not None and found[0] == 10


def test_another_recipe_is_refused_by_the_names_of_its_keys(tmp_path):
    directory = saved(tmp_path, 10)
    with pytest.raises(InputError) as error:
        restore(directory, {"seed": 2, "train": {"rows": 4, "learning_rate": 0.2}, "lora": {"rank": 8}})
    for part in ("lora: None -> {'rank': 8}", "seed: 1 -> 2", "train.learning_rate: 0.1 -> 0.2", "another run_dir"):
        assert part in str(error.value)
    assert "rows" not in str(error.value) and error.value.exit_code == 2
    assert restore(directory) is not None  # and it is still there


def test_another_recipe_can_be_allowed_where_the_arrays_fit(tmp_path, caplog):
    directory = saved(tmp_path, 10)
    checkpoints = Checkpoints(directory, {"seed": 2, "train": IDENTITY["train"]}, allow_changed=True)
    with caplog.at_level(logging.WARNING, logger="mentalglm_jax"):
        found = checkpoints.restore(tree(0))
    checkpoints.close()
    assert found is not None and found[0] == 10
    assert "seed: 1 -> 2; going on with the new values" in caplog.text
    checkpoints = Checkpoints(directory, {**IDENTITY, "parameters": {"w": [64, 65]}}, allow_changed=True)
    with pytest.raises(InputError, match=r"parameters: None -> .*Its arrays do not fit"):
        checkpoints.restore(tree(0))
    checkpoints.close()


def test_the_best_is_kept_beside_the_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY, best_by="loss")
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, float("nan")), (6, None)):
        checkpoints.save(step, tree(step), {}, None if loss is None else {"loss": loss, "accuracy": 0.1 * step})
    best = checkpoints.restore_best(tree(0))
    assert best is not None and best[0] == 2
    np.testing.assert_array_equal(best[1]["trainable"]["w"], 2)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    # The same after coming back, and a better one takes its place.
    checkpoints = Checkpoints(tmp_path, IDENTITY, best_by="loss")
    best = checkpoints.restore_best(tree(0))
    assert best is not None and best[0] == 2
    checkpoints.save(7, tree(7), {}, {"loss": 0.5, "accuracy": 0.7})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]


def test_the_best_by_accuracy_is_the_highest(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=1, best_by="accuracy")
    checkpoints.save(1, tree(1), {}, {"loss": 1.0})  # as an earlier version wrote it
    for step, accuracy in ((2, 0.5), (3, 0.9), (4, 0.7)):
        checkpoints.save(step, tree(step), {}, {"loss": float(step), "accuracy": accuracy})
    best = checkpoints.restore_best(tree(0))
    checkpoints.close()
    assert best is not None and best[0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_identity_is_compared_as_it_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"targets": ("q_proj", "v_proj"), "rate": 1e-4})
    checkpoints.save(1, tree(), {})
    checkpoints.close()
    assert restore(tmp_path, {"targets": ("q_proj", "v_proj"), "rate": 1e-4}) is not None


def test_differences():
    assert differences({"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 1, "c": [1, 2]}}) == []
    found = differences({"a": {"b": 1, "c": [1]}, "z": 0}, {"a": {"b": 2, "c": [2]}, "y": 0})
    assert found == ["a.b: 1 -> 2", "a.c: [1] -> [2]", "y: None -> 0", "z: 0 -> None"]


def test_differences_of_lists_go_by_name_and_long_values_are_short():
    stages = [{"name": "a", "train": {"steps": 1}}, {"name": "b", "train": {"steps": 2}}]
    longer = [{"name": "a", "train": {"steps": 1}}, {"name": "b", "train": {"steps": 3}}, {"name": "c"}]
    assert differences({"s": stages}, {"s": longer}) == ["s.b.train.steps: 2 -> 3", "s.c: None -> {'name': 'c'}"]
    assert differences({"s": stages}, {"s": stages[::-1]}) == ["s: order a, b -> b, a"]
    assert differences({"s": "x" * 100}, {"s": [1]}) == [f"s: '{'x' * 78}… -> [1]"]
    assert differences({"s": [stages[0], stages[0]]}, {"s": []}) != []  # names that tell nothing apart
    lines = [f"k{i}: 0 -> 1" for i in range(6)]
    assert few(lines) == "k0: 0 -> 1; k1: 0 -> 1; k2: 0 -> 1; k3: 0 -> 1; and 2 more"
    assert few(lines[:4]) == "; ".join(lines[:4])


def test_an_unusable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(RunError, match="file/checkpoints: cannot keep checkpoints there") as error:
        Checkpoints(tmp_path / "file" / "checkpoints", IDENTITY)
    assert "\n" not in str(error.value)


def test_a_failing_save_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "here", IDENTITY)
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "here").write_text("in the way")

    def save() -> None:
        checkpoints.save(1, tree(), {})
        checkpoints.wait()

    with pytest.raises(RunError, match=r"here(/1)?: (cannot save|the checkpoint could not be written)") as error:
        save()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_the_system_said_is_found_in_what_tensorstore_says(tmp_path):
    """A driver adds a whole specification, before the system's number or after it: that changes between processes."""
    (tmp_path / "file").write_text("in the way")
    files = {"driver": "file", "path": f"{tmp_path}/file/"}
    array = {"driver": "zarr", "kvstore": files, "metadata": {"shape": [4], "dtype": "<f4"}}
    with pytest.raises(ValueError, match="Not a directory") as plain:
        ts.KvStore.open(files).result().write("key", b"value").result()
    with pytest.raises(ValueError, match="Not a directory") as wrapped:
        ts.open(array, create=True).result()
    assert "tensorstore_spec" in str(wrapped.value)
    assert reason(plain.value) == reason(wrapped.value) == "Not a directory"
    for order in ("[spec='x: y'] [os_error_code='20']", "[os_error_code='20'] [spec='x: y']"):
        assert reason(ValueError(f"FAILED_PRECONDITION: Error: Not a directory {order}")) == "Not a directory"


def test_a_save_that_failed_is_not_taken_for_the_next(tmp_path, monkeypatch):
    """Saving is asynchronous: the failure of step 2 is seen when the save of step 3 starts."""
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    noise = {"trainable": {"w": jax.random.normal(jax.random.key(0), (64, 64))}}  # 16 KiB that do not compress
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # it would be cut short without a word
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        checkpoints.save(2, noise, {})
        with pytest.raises(RunError, match=rf"^{tmp_path}/2: the checkpoint could not be written \(File too large\)$"):
            checkpoints.save(3, noise, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_earlier_step_is_not_dropped_in_silence(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(10, tree(), {})
    checkpoints.save(10, tree(), {})  # the same again: nothing to do
    with pytest.raises(RunError, match="5: not saved, a later checkpoint is there"):
        checkpoints.save(5, tree(), {})
    checkpoints.close()
