"""Where activations lie on the mesh that a step runs on. Without a mesh in force nothing here does anything.

The model's code names no devices: the step puts its mesh in force (``on_mesh``) while it is traced, and the few places
whose choice XLA cannot be left with ask for it here: the residual stream, which the backward pass keeps, the
vocabulary projection, and attention kernels, which the partitioner cannot look into.
"""

import contextlib
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows are spread over both


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Puts ``mesh`` in force for the code traced inside; None leaves things as they are."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def mesh_in_force() -> AbstractMesh | None:
    """The mesh of ``on_mesh``, if it has our axes and more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(MESH_AXES) <= set(mesh.axis_names) and mesh.size > 1 else None


def spread_hidden(h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Rows over data and fsdp, positions over tensor (sequence parallelism, Korthikanti et al. 2022, arXiv 2205.05198).

    So a layer input that the backward pass keeps is stored once, not once per tensor-parallel device.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return h
    positions = "tensor" if h.shape[1] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(h, PartitionSpec(BATCH_AXES, positions, None))


def spread_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Rows over data and fsdp, the rest of each row whole."""
    return x if mesh_in_force() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather_projection(frozen: Any) -> Any:
    """A tree of frozen parameters whose vocabulary projection ``[D, V]``, if there, is gathered over fsdp.

    So it is gathered once for all chunks of the loss. Left to itself, XLA gathers it anew for every chunk and, in the
    backward pass, gathers the gradients of all rows' logits on every device instead, which takes more memory the more
    devices there are.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return frozen

    def placed(path: Any, x: Array) -> Array:
        if [getattr(part, "key", None) for part in path[:2]] != ["lm_head", "kernel"]:
            return x
        vocabulary = "tensor" if x.shape[1] % mesh.shape["tensor"] == 0 else None
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, vocabulary))

    return jax.tree.map_with_path(placed, frozen)
