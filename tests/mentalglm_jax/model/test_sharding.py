"""Training spread over eight (virtual) devices is training on one: the same losses, adapters and moments."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.devices.stopping import Interrupted
from mentalglm_jax.errors import InputError
from mentalglm_jax.model import sharding
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.sharding import batch_sharding, logical_axes, make_mesh, parameter_shardings, shard_model
from mentalglm_jax.train.loop import Surroundings, train
from tests.mentalglm_jax.tiny import on_eight_devices, parameters, rows, tiny_config, tiny_examples, tiny_model

STEPS = 4


def test_every_parameter_has_its_axes():
    quantized = [tiny_model(lora=False, quantize=method) for method in ("int8", "nf4")]
    for model in (tiny_model(dora=True), tiny_model(lora=False), *quantized):
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            axes = logical_axes(".".join(map(str, path)))
            assert len(axes) == leaf[...].ndim, path
            assert (axes[:1] == ("layers",)) == (path[0] == "layers")
    assert logical_axes("layers.mlp.down_proj.adapter.a") == ("layers", "mlp", "rank")
    assert logical_axes("layers.mlp.down_proj.adapter.b") == ("layers", "rank", "embed")
    assert logical_axes("layers.self_attn.q_proj.adapter.magnitude") == ("layers", "heads")
    assert logical_axes("lm_head.adapter.a") == ("embed", "rank")
    with pytest.raises(KeyError):
        logical_axes("layers.mlp.no_proj.kernel")


def test_every_logical_axis_has_a_rule():
    known = set(sharding.ShardingRules.__dataclass_fields__)
    assert {axis for axes in sharding.PARAMETER_AXES.values() for axis in axes if axis} <= known


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1), (1, -1, -1), (-1, -1, -1), (0, -1, 1), (-2, 1, 1), (1, 1, 3), (-1, -1, 1)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match="does not cover the 1 devices; one size may be -1"):
        make_mesh(*sizes)


def test_a_mesh_of_one():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert make_mesh(data=-1, fsdp=1).size == 1


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=0, atol=1e-5)
    assert found["values"].keys() == wanted["values"].keys()
    for name, value in wanted["values"].items():
        np.testing.assert_allclose(found["values"][name], value, rtol=0, atol=1e-5, err_msg=name)


def compare_saved(found: Path, wanted: Path, step: int = STEPS) -> None:
    """The last checkpoints of two runs: adapter, both moments, counts."""
    found_arrays, wanted_arrays = saved(found, step), saved(wanted, step)
    assert found_arrays.keys() == wanted_arrays.keys()
    kinds = {kind for kind in ("trainable", "mu", "nu", "count") if any(kind in name for name in wanted_arrays)}
    assert kinds == {"trainable", "mu", "nu", "count"}
    for name, value in wanted_arrays.items():
        np.testing.assert_allclose(found_arrays[name], value, rtol=0, atol=1e-5, err_msg=name)
        assert "count" in name or np.abs(value).max() > 0, name


def saved(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by path, on the host."""
    path = directory / "checkpoints" / str(step) / "state"
    reader: Any = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    hosted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return {jax.tree_util.keystr(keys): value
            for keys, value in jax.tree.leaves_with_path(reader.restore(path, restore_args=hosted))}  # fmt: skip


def one_device(directory: Path, quantize: str = "", **changes: Any) -> dict[str, Any]:
    model = trainee(quantize)
    train(model, tiny_examples(60), config(**changes), directory, trainable="lora", seed=1)
    return {"losses": [row["loss"] for row in rows(directory)], "values": parameters(model)}


def trainee(quantize: str = "") -> Glm:
    """The model that all runs of this file train; its base in 8 or 4 bits with ``quantize``."""
    return tiny_model(dropout=0.2, quantize=quantize or None)


def config(**changes: Any) -> Any:
    return tiny_config(**({"steps": STEPS, "rows": 8, "accumulate": 1, "save_every": 100} | changes))


def test_two_by_four_equals_one(tmp_path):
    found = on_eight_devices(__file__, str(tmp_path / "many"), "2", "4", "1")
    compare(found, one_device(tmp_path / "one"))
    compare_saved(tmp_path / "many", tmp_path / "one")
    assert found["kernel"] == str(PartitionSpec(None, "fsdp", "tensor"))
    assert found["moments"] == found["trained"]  # the optimiser's moments lie like the adapter
    assert "fsdp" in found["trained"]["layers.mlp.gate_up_proj.adapter.a"]
    assert "rows / accumulate = 4 rows cannot be spread evenly over data x fsdp = 8 devices" in found["refused"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sizes", "accumulate", "quantize"),
    [
        (("1", "8", "1"), 1, ""),
        (("1", "4", "2"), 1, ""),
        (("2", "4", "1"), 1, ""),
        (("1", "8", "1"), 2, ""),
        (("1", "4", "2"), 2, ""),
        (("1", "8", "1"), 1, "int8"),
        (("1", "4", "2"), 1, "nf4"),
    ],
)
def test_twenty_steps_on_other_meshes_equal_one_device(tmp_path, sizes, accumulate, quantize):
    arguments = (*sizes, str(accumulate), "0", "20", quantize)
    found = on_eight_devices(__file__, str(tmp_path / "many"), *arguments)
    compare(found, one_device(tmp_path / "one", quantize, accumulate=accumulate, rows=8 * accumulate, steps=20))
    compare_saved(tmp_path / "many", tmp_path / "one", 20)
    assert len(found["losses"]) == 20 and len(set(found["losses"])) == 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sharded_run_goes_on_on_one_device(tmp_path):
    """Saved by eight devices after step 2, continued by one; and the checkpoint read by eight again."""
    wanted = one_device(tmp_path / "one")
    found = on_eight_devices(__file__, str(tmp_path / "many"), "1", "8", "1", "1", "2")
    assert found["losses"] == [pytest.approx(loss, abs=1e-5) for loss in wanted["losses"][:2]]
    model = tiny_model(dropout=0.2)
    train(model, tiny_examples(60), config(), tmp_path / "many", trainable="lora", seed=1)
    compare({"losses": [row["loss"] for row in rows(tmp_path / "many")], "values": parameters(model)}, wanted)
    compare(on_eight_devices(__file__, str(tmp_path / "many"), "1", "8", "1"), wanted)


def main(directory: str, data: str, fsdp: str, tensor: str, accumulate: str = "1", stop_at: str = "0",
         steps: str = str(STEPS), quantize: str = "") -> None:  # fmt: skip
    """Trains on a mesh; prints losses, parameters and where they lie as JSON."""
    mesh = make_mesh(int(data), int(fsdp), int(tensor))
    model = trainee(quantize)
    rows_per_step = 8 * int(accumulate)
    settings = config(accumulate=int(accumulate), rows=rows_per_step, steps=int(steps))

    def progress(done: int, total: int, text: str) -> None:
        if done == int(stop_at):
            os.kill(os.getpid(), 15)

    try:
        train(
            model,
            tiny_examples(60),
            settings,
            Path(directory),
            trainable="lora",
            seed=1,
            around=Surroundings(mesh=mesh, progress=progress),
        )
    except Interrupted:
        assert int(stop_at)
    found: dict[str, Any] = {
        "losses": [row["loss"] for row in rows(Path(directory))],
        "values": {name: value.tolist() for name, value in parameters(model).items()},
        "kernel": None if quantize else str(model.layers.mlp.gate_up_proj.kernel[...].sharding.spec),
        **placements(mesh),
    }
    try:
        train(model, tiny_examples(60), config(rows=4), Path(directory), trainable="lora", seed=1,
              around=Surroundings(mesh=mesh))  # fmt: skip
    except InputError as error:
        found["refused"] = str(error)
    check_loading(Path(directory) / "saved", mesh)
    sys.stdout.write(json.dumps(found))


def placements(mesh: Mesh) -> dict[str, Any]:
    from mentalglm_jax.train.step import make_optimizer, make_step

    model = tiny_model()
    shard_model(model, mesh)
    _, state, _ = make_step(model, make_optimizer(config(), 1), config(), "lora", mesh)
    moments = [
        part.mu for part in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    ]
    return {
        key: {".".join(map(str, path)): str(leaf[...].sharding.spec) for path, leaf in nnx.to_flat_state(tree)}
        for key, tree in (("trained", state.trainable), ("moments", moments[0]))
    }


def check_loading(directory: Path, mesh: Mesh) -> None:
    """``load(mesh=...)`` puts every parameter where ``shard_model`` would, with the values of the file."""
    model = tiny_model(lora=False)
    save_pretrained(model, directory)
    loaded = load(directory, mesh=mesh, rope_theta=10000)
    shard_model(model, mesh)
    wanted = parameter_shardings(model, mesh)
    for (path, found), (_, leaf) in zip(
        nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(nnx.state(model)), strict=True
    ):
        name = ".".join(map(str, path))
        for array in (found[...], leaf[...]):
            assert array.sharding.is_equivalent_to(wanted[name], array.ndim), name
        np.testing.assert_array_equal(found[...], leaf[...])
    assert batch_sharding(mesh).spec == PartitionSpec(None, ("data", "fsdp"))
    check_loading_quantized(directory.with_name("wide"), mesh)


def check_loading_quantized(directory: Path, mesh: Mesh) -> None:
    """Four blocks of inputs over the mesh: shards end where blocks end, the values are those of one device."""
    shape = GlmConfig(vocab_size=32, hidden_size=256, intermediate_size=64, num_hidden_layers=1, head_dim=64,
                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    save_pretrained(Glm(shape, rngs=nnx.Rngs(0)), directory)
    loaded = load(directory, mesh=mesh, quantize="nf4", rope_theta=1e4)
    wanted = parameter_shardings(loaded, mesh)
    assert "fsdp" in wanted["layers.self_attn.q_proj.kernel.codes"].spec or mesh.shape["fsdp"] > 4
    for (path, found), (_, leaf) in zip(
        nnx.to_flat_state(nnx.state(loaded)),
        nnx.to_flat_state(nnx.state(load(directory, quantize="nf4", rope_theta=1e4))), strict=True
    ):  # fmt: skip
        name = ".".join(map(str, path))
        assert found[...].sharding.is_equivalent_to(wanted[name], found[...].ndim), name
        np.testing.assert_array_equal(found[...], leaf[...], err_msg=name)


if __name__ == "__main__":
    main(*sys.argv[1:])


@pytest.mark.parametrize(("before", "count"), [("pass", 3), ("jax.devices()", 1)], ids=["fresh", "JAX already used"])
def test_a_cpu_is_split_only_before_it_is_used(before, count):
    code = f"import jax; from mentalglm_jax.model import sharding; {before}; sharding.split_cpu(3)"
    code += "; print(jax.device_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(count)
