"""Two real processes on the loopback interface, four devices each, are one run; a start that cannot work says why."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.devices import distributed
from mentalglm_jax.devices.stopping import Interrupted
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import LoraConfig, LoraParam, add_lora
from mentalglm_jax.model.sharding import make_mesh
from mentalglm_jax.train.loop import Surroundings, train
from tests.mentalglm_jax.pod import Pod
from tests.mentalglm_jax.tiny import parameters, rows, tiny_config, tiny_examples, tiny_model

EXAMPLES: list[Any] = [{**item, "post": (0, 3)} for item in tiny_examples(60)]
HELD_OUT = tiny_examples(11, seed=9)


@pytest.fixture
def environment(monkeypatch):
    def set_variables(**values: str) -> None:
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not set, but JAX_PROCESS_ID is"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID '2' is not one of JAX_NUM_PROCESSES '2'",
        ),
        ({}, "the processes of this run cannot find each other"),  # this one has devices already
    ],
)
def test_a_start_that_cannot_work_says_why(environment, values, reason):
    jax.devices()
    environment(**values)
    with pytest.raises(InputError) as error:
        distributed.start()
    assert f"mesh.distributed: {reason}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "stated", "bound"),
    [
        ("127.0.0.1:1234", {}, "127.0.0.1:1234"),
        ("localhost:1234", {}, "localhost:1234"),
        ("10.0.0.2:1234", {}, None),
        ("127.0.0.1:1234", {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:1234"}, None),
    ],
)
def test_a_run_on_one_machine_listens_to_nobody_else(environment, monkeypatch, address, stated, bound):
    """JAX's own default is every address of the host. None leaves it, or what the environment says."""
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **named: called.append(named))
    environment(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0", **stated)
    distributed.start()
    assert called == [{"coordinator_bind_address": bound}]


def test_one_process_needs_nobody():
    assert distributed.is_primary() and distributed.any_process(True) and not distributed.any_process(False)
    assert distributed.local_rows(make_mesh(), 8, 2) is None
    tree = {"a": np.ones(3)}
    assert distributed.gathered(tree) is tree
    distributed.barrier("nobody else is here")


def test_rows_of_one_process_are_spread_as_micro_batches():
    batch = {"tokens": np.arange(12).reshape(6, 2)}
    for held in (None, [0, 1, 2, 3, 4, 5]):
        [(name, found)] = distributed.spread(batch, 6, 3, make_mesh(), held).items()
        assert name == "tokens"
        np.testing.assert_array_equal(found, np.arange(12).reshape(3, 2, 2))


def settings(**changes: Any) -> Any:
    return tiny_config(**({"steps": 20, "rows": 8, "accumulate": 1, "mask_posts": 0.5, "eval_every": 10} | changes))


def adapted(directory: Path, **options: Any) -> Glm:
    model = load(directory, rope_theta=1e4, **options)
    add_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.2), nnx.Rngs(1))
    return model


class Pair(Pod):
    """Two processes of ``main`` below that know each other."""

    def __init__(self, base: Path, directory: Path, *arguments: object):
        super().__init__(__file__, base, directory, *arguments)

    def kill_at(self, step: int) -> None:
        """Kills both when the first one says that it has done ``step``."""
        seen = any(line == f"{step}\n" for line in self.processes[0].stdout)
        assert seen, [one.err[-3000:] for one in self.kill()]
        self.kill()

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(output.splitlines()[-1]) for output in self.done()]


def check(found: dict[str, np.ndarray], losses: list[float], wanted: dict[str, np.ndarray], reference: list[float]):
    np.testing.assert_allclose(losses, reference, rtol=0, atol=1e-5)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_are_killed_and_one_goes_on(tmp_path, accumulate):
    save_pretrained(tiny_model(lora=False), tmp_path / "base")
    changes: dict[str, Any] = {"accumulate": accumulate, "rows": 8 * accumulate}
    model = adapted(tmp_path / "base")
    train(model, EXAMPLES, settings(**changes), tmp_path / "one", trainable="lora", seed=1,
          evaluation=HELD_OUT)  # fmt: skip
    wanted, reference = parameters(model, LoraParam), [row["loss"] for row in rows(tmp_path / "one")]

    # Killed in the middle; one process with one device goes on.
    Pair(tmp_path / "base", tmp_path / "killed", accumulate).kill_at(11)
    model = adapted(tmp_path / "base")
    taken: list[int] = []
    around = Surroundings(progress=lambda done, total, text: taken.append(done))
    train(model, EXAMPLES, settings(**changes), tmp_path / "killed", trainable="lora", seed=1,
          evaluation=HELD_OUT, around=around)  # fmt: skip
    # From a step that was saved (every 4th and the one that was evaluated), nothing done twice.
    assert taken in (list(range(5, 21)), list(range(9, 21)), list(range(11, 21)))
    check(parameters(model, LoraParam), [row["loss"] for row in rows(tmp_path / "killed")], wanted, reference)

    # A signal to one of them stops both at the same step; then both go on to the end.
    pair = Pair(tmp_path / "base", tmp_path / "both", accumulate, 6)
    assert [result["interrupted"] for result in pair.results()] == [True, True]
    assert [row["loss"] for row in rows(tmp_path / "both")] == pytest.approx(reference[:6], abs=1e-5)
    results = Pair(tmp_path / "base", tmp_path / "both", accumulate).results()
    for number, result in enumerate(results):
        values = {name: np.array(value) for name, value in result["values"].items()}
        check(values, [row["loss"] for row in rows(tmp_path / "both")], wanted, reference)
        half = range(4 * number, 4 * number + 4)
        assert result["held"] == [8 * micro + row for micro in range(accumulate) for row in half]
        assert result["share"] == 0.5  # of a kernel's elements lie here
        assert result["best"] == results[0]["best"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_read_a_dora_adapter(tmp_path):
    """Its magnitudes start as norms of the base, which is spread over both; a layer without an adapter keeps them."""
    save_pretrained(tiny_model(lora=False), tmp_path / "base")
    model = load(tmp_path / "base", rope_theta=1e4)
    config = LoraConfig(rank=4, alpha=8.0, use_dora=True, layers_to_transform=(0,))
    add_lora(model, config, nnx.Rngs(1))
    save_adapter(model, tmp_path / "adapter")
    for result in Pair(tmp_path / "base", tmp_path / "adapter", 0).results():
        for name, value in parameters(model, LoraParam).items():
            np.testing.assert_allclose(np.array(result["values"][name]), value, rtol=1e-6, err_msg=name)


def main(base: str, directory: str, accumulate: str, stop_at: str = "0") -> None:
    """One of two processes: trains on all eight devices, prints its steps and at the end what it has.

    With ``accumulate`` 0 it only reads the adapter in ``directory``.
    """
    distributed.start()
    if accumulate == "0":
        model = load(base, rope_theta=1e4, mesh=make_mesh(1, 8, 1), adapter=directory)
        flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, LoraParam))}
        values = {name: np.asarray(x).tolist() for name, x in distributed.gathered(flat).items()}
        sys.stdout.write(json.dumps({"values": values}) + "\n")
        return
    mesh = make_mesh(1, 8, 1)
    model = adapted(Path(base), mesh=mesh)
    kernel = model.layers.mlp.gate_up_proj.kernel[...]
    share = sum(shard.data.size for shard in kernel.addressable_shards) / kernel.size
    config = settings(accumulate=int(accumulate), rows=8 * int(accumulate))

    def progress(done: int, total: int, text: str) -> None:
        sys.stdout.write(f"{done}\n")
        sys.stdout.flush()
        if done == int(stop_at) and not distributed.is_primary():
            os.kill(os.getpid(), signal.SIGTERM)

    interrupted, best = False, None
    try:
        around = Surroundings(progress=progress, mesh=mesh)
        best = train(model, EXAMPLES, config, Path(directory), trainable="lora", seed=1,
                     evaluation=HELD_OUT, around=around).best  # fmt: skip
    except Interrupted:
        interrupted = True
    values = {} if interrupted else {name: value.tolist() for name, value in parameters(model, LoraParam).items()}
    found = {"values": values, "interrupted": interrupted, "best": best, "share": share,
             "held": distributed.local_rows(mesh, config.rows, config.accumulate)}  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
