"""Recipes of strangers for `mentalglm bench`, which makes what they ask for of random numbers: this machine's memory is
asked first."""

import json
import time

import jax
import pytest
from flax import nnx

from mentalglm_jax.bench import child, training
from mentalglm_jax.bench import target as target_module
from mentalglm_jax.bench.target import target_of
from mentalglm_jax.errors import InputError
from tests.mentalglm_jax.bench.test_bench import GEOMETRY, recipe

ASKED = {
    "a wide model": ({"hidden_size": 1 << 16, "intermediate_size": 1 << 18}, {}, "step"),
    "many layers": ({"num_hidden_layers": 4096, "hidden_size": 1 << 18}, {}, "generate"),
    "a vocabulary": ({"vocab_size": 1 << 24, "hidden_size": 1 << 14}, {}, "logits"),
    "many rows": ({}, {"rows": 65536, "sequence_length": 1 << 20}, "step"),
    "long rows": ({}, {"sequence_length": 1 << 24, "rows": 16}, "step"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("attack", ASKED)
def test_memory_that_is_not_there(tmp_path, attack):
    sizes, train, kind = ASKED[attack]
    asked = recipe(geometry=GEOMETRY | sizes).model_dump(mode="json")
    asked["stages"][0]["train"] |= train
    spec = {"kind": kind, "recipe": asked, "seconds": 1.0, "folder": str(tmp_path)}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"it takes [\d,.]+ GiB and this machine has [\d,.]+ free; measure a smaller"):
        child.main(str(tmp_path / "spec.json"), str(tmp_path / "out.json"))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("step", [True, False], ids=["a step", "weights alone"])
def test_no_more_room_is_asked_for_than_is_taken(monkeypatch, tmp_path, step):
    """At most four times what is taken: a bound of any size refuses what does not fit."""
    target, told = target_of(recipe()), []
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(target.model())))
    if step:
        training.measure(target, 0.0, tmp_path / "rows.npz", told.append)
        taken = told[-1]["compiled_bytes"]
    monkeypatch.setattr(target_module, "free_memory", lambda device: 4 * taken)
    target.check_room(step=step)
    monkeypatch.setattr(target_module, "free_memory", lambda device: taken // 4)
    with pytest.raises(InputError, match="it takes"):
        target.check_room(step=step)


def test_what_there_is_room_for():
    for step in (True, False):
        target_of(recipe()).check_room(step=step)
