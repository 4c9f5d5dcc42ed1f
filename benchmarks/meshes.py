"""Does an adapter depend on the mesh it was trained on, or on the order of its devices? On eight devices of this CPU.

    python -P benchmarks/meshes.py RUNS.jsonl [--kinds plain dora] [--dtypes float32 bfloat16] [--meshes 12]
    python -P benchmarks/meshes.py RUNS.jsonl --table

A GLM of two layers with LoRA, rsLoRA or DoRA of rank 4, and a preference stage of LoRA (DPO), take the same steps on
one device, on twelve meshes and with their devices in three orders; every run is a line of RUNS.jsonl as soon as it is
there, and what is there is not run again. With B = 0 at the start, Adam's first update of B is its learning rate times
the sign of a gradient, however small that is, and rounding, which depends on the order of a sum, decides some of the
signs.

For each way to start:

* float32: the largest difference between the losses of any run and those of one device, over all steps.
* bfloat16: the share of signs of the first gradient that differ from one device's; how far the adapter is from one
  device's after two updates and after all (of the way it went); the spread of the loss at the end.

The compiled step is the trainer's own (``make_step``); learning rate and eps are arguments of its optimiser, so that
one program serves every way to start. LoRA and rsLoRA differ in a scale, which is an argument too. XLA_FLAGS is kept:
``--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false`` compiles in less than half the time.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mentalglm_jax.data.batches import Example, PackedBatches
from mentalglm_jax.data.pairs import Pair, encode_pairs
from mentalglm_jax.devices.distributed import on_host, spread
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, add_lora, linears
from mentalglm_jax.model.sharding import make_mesh, shard_model
from mentalglm_jax.train.preference import Objective
from mentalglm_jax.train.recipe import TrainConfig
from mentalglm_jax.train.reference import with_reference
from mentalglm_jax.train.step import make_step

KINDS: dict[str, dict[str, dict[str, Any]]] = {  # of programs, and the methods that each serves
    "plain": {"LoRA": {}, "rsLoRA": {"use_rslora": True}}, "dora": {"DoRA": {"use_dora": True}}, "pairs": {"DPO": {}},
}  # fmt: skip
MESHES = [
    (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1), (4, 2, 1), (2, 1, 4), (4, 1, 2), (1, 2, 4), (1, 4, 2),
    (2, 2, 1), (1, 4, 1),
]  # fmt: skip
ORDERS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "as they are": list,
    "reversed": lambda devices: list(reversed(devices)),
    "shuffled": lambda devices: [devices[i] for i in np.random.default_rng(0).permutation(len(devices))],
}
# How a run may start: steps of warm-up of fifty, Adam's eps, and whether A is zero and B random instead.
STARTS = {
    "as it is": (0, 1e-8, False),
    "warm-up over 10 %": (5, 1e-8, False),
    "eps 1e-4": (0, 1e-4, False),
    "A = 0, B random": (0, 1e-8, True),
}
VOCAB, ROWS, LENGTH, RATE = 96, 8, 32, 5e-3
ONE = "one device"


def model_of(changes: dict[str, Any], dtype: Any) -> Glm:
    """A base whose weights are large enough to matter, with a fresh adapter."""
    config = GlmConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                       num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0), param_dtype=dtype)
    add_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.0, **changes), nnx.Rngs(1))
    return model


def swapped(model: Glm) -> None:
    """A = 0 and B random, in place: an adapter that changes nothing either."""
    for number, (_, linear) in enumerate(linears(model)):
        adapter: Any = linear.adapter
        if adapter is not None:
            shape, rank = adapter.b.shape, adapter.b.shape[-2]
            draw = jax.random.uniform(jax.random.key(number), shape, jnp.float32, -(rank**-0.5), rank**-0.5)
            adapter.a.set_value(jnp.zeros_like(adapter.a[...]))
            adapter.b.set_value(draw)


def settings(steps: int) -> TrainConfig:
    """Of every run."""
    return TrainConfig(steps=steps, rows=ROWS, sequence_length=LENGTH, loss_chunk=8, learning_rate=RATE)


def batches(kind: str, dtype: str, steps: int) -> list[dict[str, Any]]:
    """Packed rows of random examples, or pairs with what the base says of them on one device; the same in every run."""
    rng, examples = np.random.default_rng(0), []
    for number in range(60):
        length = int(rng.integers(6, 21))
        tokens = rng.integers(4, VOCAB, length).astype(np.int32)
        if kind == "pairs":  # two answers to one prompt, in one row
            parts = (tuple(map(int, x)) for x in np.split(tokens[:15], [3, 3 + (min(length, 15) - 3) // 2]))
            examples += encode_pairs([Pair(f"{number}", *parts, number)], LENGTH)[0]
            continue
        index = np.arange(length // 2, length - 1, dtype=np.int32)
        examples.append(Example(tokens=tokens, target_index=index, target_ids=tokens[index + 1]))
    if kind == "pairs":
        with tempfile.TemporaryDirectory() as folder:
            examples = with_reference(model_of({}, jnp.dtype(dtype)), examples, settings(steps), Path(folder) / "kept",
                                      start="the base", seed=0, mesh=None, progress=None)  # fmt: skip
    packed = iter(PackedBatches(examples, rows=ROWS, sequence_length=LENGTH, targets_per_row=None, seed=0))
    return [{**next(packed)} for _ in range(steps)]


def runs(kind: str, dtype: str, steps: int, mesh: Mesh | None) -> Iterator[dict[str, Any]]:
    """Every method of ``kind`` and every way to start, by one program."""
    config = settings(steps)
    objective = Objective(kind="dpo", pairs=Path("pairs.jsonl")) if kind == "pairs" else None
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.inject_hyperparams(optax.adamw)(RATE, eps=config.eps, weight_decay=0.0),
    )
    step: Any = None
    rows = [spread(batch, ROWS, 1, mesh, None) if mesh is not None else {name: x[None] for name, x in batch.items()}
            for batch in batches(kind, dtype, steps)]  # fmt: skip
    for method, changes in KINDS[kind].items():
        for start, (warm, eps, other) in STARTS.items():
            model = model_of(changes, jnp.dtype(dtype))
            if other:
                swapped(model)
            if mesh is not None:
                shard_model(model, mesh)
            new, state, frozen = make_step(model, optimizer, config, "lora", mesh, objective)
            step = step or new
            train, moments, losses = state.trainable, state.optimizer, []
            found: dict[str, Any] = {"method": method, "start": start, "dtype": dtype, "values": [flat(train)]}
            for number, batch in enumerate(rows):
                rate = RATE * min(1.0, number / warm) if warm else RATE
                for name, value in (("learning_rate", rate), ("eps", eps)):
                    old = moments[1].hyperparams[name]
                    moments[1].hyperparams[name] = jax.device_put(np.asarray(value, old.dtype), old.sharding)
                train, moments, out = step(train, moments, frozen, batch, jax.random.key(0))
                losses.append(float(out["loss"]))
                if number == 0:
                    found["signs"] = np.sign(flat(optax.tree.get(moments, "mu"))).tolist()
                if number in (1, steps - 1):
                    found["values"].append(flat(train))
            yield found | {"losses": losses, "values": [x.tolist() for x in found["values"]]}


def flat(state: Any) -> np.ndarray:
    """All arrays of an adapter's state as one vector."""
    return np.concatenate([on_host(jnp.asarray(leaf)).ravel() for leaf in jax.tree.leaves(state)])


def places(count: int) -> Iterator[tuple[str, str, Mesh | None]]:
    """One device, then the first ``count`` meshes, each with its devices in every order: sizes, order, mesh."""
    yield ONE, "", None
    for order in ORDERS:
        for sizes in MESHES[:count]:
            devices = ORDERS[order](jax.devices()[: int(np.prod(sizes))])
            yield "x".join(map(str, sizes)), order, make_mesh(*sizes, devices=devices)


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that are there."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def apart(found: dict[str, Any], wanted: dict[str, Any], number: int) -> float:
    """How far two adapters are from each other, of the way one went from the start."""
    ours, theirs, start = (np.asarray(x) for x in (found["values"][number], wanted["values"][number],
                                                   wanted["values"][0]))  # fmt: skip
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start))


def flips(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Share of the first gradient's elements (those that are not 0) whose sign is another."""
    ours, theirs = np.asarray(found["signs"]), np.asarray(wanted["signs"])
    return float((ours != theirs)[theirs != 0].mean())


def table(all_runs: list[dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in all_runs:
        groups.setdefault((run["dtype"], run["method"], run["start"]), []).append(run)
    exact = ["| float32 | runs | loss, first and last | most from one device | between orders of devices | first signs "
             "that differ |", "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    rounded = ["| bfloat16 | runs | first signs that differ, mean (most) | adapter apart after two updates | after all "
               "| loss at the end | its spread |", "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for (dtype, method, start), members in groups.items():
        wanted = next(run for run in members if run["mesh"] == ONE)
        others = [run for run in members if run["mesh"] != ONE]
        signs = [flips(run, wanted) for run in others]
        if dtype == "float32":
            plain = {run["mesh"]: run for run in others if run["order"] == "as they are"}
            errors = [difference(run, wanted) for run in others]
            orders = max(difference(run, plain[run["mesh"]]) for run in others)
            exact.append(f"| {method}, {start} | {len(others)} | {wanted['losses'][0]:.3f}, {wanted['losses'][-1]:.3f} "
                         f"| {max(errors):.1e} | {orders:.1e} | {max(signs):.2%} |")  # fmt: skip
            continue
        ends = [float(np.mean(run["losses"][-5:])) for run in members]
        two, after = (max(apart(run, wanted, number) for run in others) for number in (1, 2))
        rounded.append(f"| {method}, {start} | {len(others)} | {np.mean(signs):.2%} ({max(signs):.2%}) | {two:.1%} "
                       f"| {after:.1%} | {np.mean(ends):.4f} | {max(ends) - min(ends):.4f} |")  # fmt: skip
    return "\n".join([*exact, "", *rounded])


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest one between the losses of two runs."""
    return float(np.abs(np.subtract(found["losses"], wanted["losses"])).max())


def main() -> None:
    """Runs what is missing, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--meshes", type=int, default=len(MESHES), help="the first so many")
    parser.add_argument("--table", action="store_true", help="of the runs that are there")
    given = parser.parse_args()
    there = read(given.runs)
    if given.table:
        print(table(there))
        return
    done = {(run["kind"], run["dtype"], run["mesh"], run["order"]) for run in there}
    for sizes, order, mesh in places(given.meshes):
        for kind in given.kinds:
            for dtype in given.dtypes:
                if (kind, dtype, sizes, order) not in done:
                    found = [run | {"kind": kind, "mesh": sizes, "order": order}
                             for run in runs(kind, dtype, given.steps, mesh)]  # fmt: skip
                    with given.runs.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(run) + "\n" for run in found)
                    sys.stderr.write(f"{kind} {dtype} {sizes} {order}\n")


if __name__ == "__main__":
    main()
