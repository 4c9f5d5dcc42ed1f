"""Which device holds which part: logical axis names to mesh axes, in one place.

Mesh axes:  data    copies of the model, each with its own rows
            fsdp    rows too, and every parameter is cut along one axis (ZeRO-3)
            tensor  heads, feed-forward and vocabulary are cut
Parameters name their logical axes in ``glm.PARAMETER_AXES``; the step is compiled by XLA from the arrays' shardings.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import PARAMETER_AXES, Glm
from mentalglm_jax.model.layout import BATCH_AXES, MESH_AXES


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis (or axes, or None for replicated) of each logical axis."""

    batch: tuple[str, ...] = BATCH_AXES
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = None
    mlp: str | None = "tensor"
    rank: str | None = None
    norm: str | None = None
    layers: str | None = None


def split_cpu(devices: int) -> None:
    """Makes the CPU that many JAX devices. Without effect once JAX has been used, and on accelerators."""
    with contextlib.suppress(RuntimeError):  # "should be updated before backends are initialized"
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes (or ``devices``); one size may be -1 and takes what is left.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.devices() if devices is None else devices
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not cover the {len(devices)} devices; "
            "one size may be -1 and takes what is left"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Logical axis names of the parameter at ``path`` (dotted); adapters follow the kernel they adapt, a quantised
    kernel (its blocks of inputs, for 4 bits) the one it stands for.

    Raises:
        KeyError: no such parameter.
    """
    if path in PARAMETER_AXES:
        return PARAMETER_AXES[path]
    module, _, name = path.rpartition(".kernel." if ".kernel." in path else ".adapter.")
    if module == "embed_tokens":
        return PARAMETER_AXES["embed_tokens.embedding"]
    *stack, inputs, outputs = PARAMETER_AXES[f"{module}.kernel"]
    return {
        "values": (*stack, inputs, outputs), "codes": (*stack, inputs, None, outputs),
        "scales": (*stack, inputs, outputs), "channel_scales": (*stack, outputs),
        "a": (*stack, inputs, "rank"), "b": (*stack, "rank", outputs), "scale": tuple(stack),
        "active": tuple(stack), "weight": (inputs, outputs),
        "magnitude": (*stack, outputs),
    }[name]  # fmt: skip


def parameter_shardings(
    model: nnx.Module | nnx.State, mesh: Mesh | AbstractMesh, rules: ShardingRules = ShardingRules()
) -> dict[str, NamedSharding]:
    """Sharding of every array of ``model`` by dotted path. An axis the mesh does not divide evenly is replicated."""
    shardings = {}
    for keys, leaf in nnx.to_flat_state(nnx.state(model) if isinstance(model, nnx.Module) else model):
        path = ".".join(map(str, keys))
        spec = []
        for size, axis in zip(leaf.shape, logical_axes(path), strict=True):
            mesh_axis = None if axis is None else getattr(rules, axis)
            spec.append(mesh_axis if mesh_axis is not None and size % mesh.shape[mesh_axis] == 0 else None)
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings


def shard_model(model: nnx.Module, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> None:
    """Moves the parameters of ``model`` to their devices, in place."""
    state = nnx.state(model)
    shardings = parameter_shardings(state, mesh, rules)
    for keys, leaf in nnx.to_flat_state(state):
        leaf.set_value(_put(leaf[...], shardings[".".join(map(str, keys))]))
    nnx.update(model, state)


def mesh_of(model: Glm) -> Mesh | None:
    """The mesh that the parameters of ``model`` lie on; None where that is one device."""
    sharding = getattr(model.embed_tokens.embedding[...], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == MESH_AXES and mesh.size > 1 else None


def _put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # every process has the same values (a fresh adapter): each keeps its own parts
    return jax.make_array_from_callback(x.shape, sharding, lambda index: host[index])


def batch_sharding(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> NamedSharding:
    """Sharding of a training batch ``[A, B, ...]``: micro-batches whole, rows over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(None, rules.batch))
