"""Several processes as one run: start-up, agreement, and what only one of them may do.

Every process runs the same program. Arrays are global; a process holds the parts of its own devices. Files are written
by the primary process; the run directory must be one that all processes see.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.sharding import batch_sharding, make_mesh, split_cpu

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins this process to the others of the run; before anything else touches a device.

    On Cloud TPU, Slurm and Kubernetes JAX finds the others by itself. Elsewhere three environment variables name them:
    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``.

    Raises:
        InputError: only some of the variables are set, or the others cannot be found or reached.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in _VARIABLES if os.environ.get(name)]
    try:
        if not given:
            jax.distributed.initialize()
            return
        if missing := sorted({*_VARIABLES} - {*given}):
            raise InputError(f"mesh.distributed: {', '.join(missing)} is not set, but {', '.join(given)} is")
        address, count, number = (os.environ[name] for name in _VARIABLES)
        if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
            raise InputError(f"mesh.distributed: JAX_PROCESS_ID {number!r} is not one of JAX_NUM_PROCESSES {count!r}")
        # JAX listens on every address of the host, for whoever asks; a run on one machine concerns nobody outside it.
        host = address.rpartition(":")[0]
        bind = address if host in _LOOPBACK and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ else None
        jax.distributed.initialize(address, int(count), int(number), coordinator_bind_address=bind)
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"mesh.distributed: the processes of this run cannot find each other ({reason}); "
            f"set {', '.join(_VARIABLES)}, or mesh.distributed=false for one process"
        ) from error


def is_primary() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gathered(tree: Any) -> Any:
    """``tree`` with its arrays whole on every process (host arrays); as it is in a run of one process."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def on_host(x: Any) -> np.ndarray:
    """An array whole on this host, also where it is spread over several: then every process must ask."""
    return np.asarray(jax.device_get(x) if getattr(x, "is_fully_addressable", True) else gathered(x))


def open_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, cpu_devices: int | None = None, distributed: bool = False
) -> Mesh:
    """The mesh that the keys of a recipe's ``mesh`` section ask for.

    Raises:
        InputError: as ``start`` and ``make_mesh``.
    """
    join(cpu_devices, distributed)
    return make_mesh(data, fsdp, tensor)


def join(cpu_devices: int | None, distributed: bool) -> None:
    """What of such a section must happen before anything touches a device. Raises: InputError as ``start``."""
    if cpu_devices is not None:
        split_cpu(cpu_devices)
    if distributed:
        start()


def placed(tree: Any, mesh: Mesh | None, *axes: Any) -> Any:
    """Host arrays, the same on every process, on ``mesh``: their first axes cut by the mesh axes ``axes``, each device
    with its part; without ``axes`` whole everywhere. As they are where there is no mesh."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__), tree)


def local_rows(mesh: Mesh | None, rows: int, accumulate: int) -> list[int] | None:
    """Which of a batch's ``rows`` this process's devices read, in order; None is all of them (one process)."""
    if mesh is None or jax.process_count() == 1:
        return None
    numbers = np.arange(rows).reshape(accumulate, -1)
    parts = batch_sharding(mesh).addressable_devices_indices_map(numbers.shape)
    return sorted({int(number) for index in parts.values() for number in numbers[index].reshape(-1)})


def spread(
    batch: Mapping[str, np.ndarray], rows: int, accumulate: int, mesh: Mesh, held: Sequence[int] | None
) -> dict[str, jax.Array]:
    """A batch as global micro-batches ``[A, B / A, ...]`` on ``mesh``.

    Args:
        batch: arrays of all B rows or, with ``held``, of those of this process.
        rows: B.
        accumulate: A.
        mesh: the run's devices.
        held: what ``local_rows`` said.
    """
    sharding, numbers = batch_sharding(mesh), np.arange(rows).reshape(accumulate, -1)
    if held is None:
        return {name: jax.device_put(x.reshape(*numbers.shape, *x.shape[1:]), sharding) for name, x in batch.items()}
    line_of = np.full(rows, -1)
    line_of[list(held)] = np.arange(len(held))

    def whole(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return x[line_of[numbers[index[:2]]]][(slice(None), slice(None), *index[2:])]

        return jax.make_array_from_callback((*numbers.shape, *x.shape[1:]), sharding, part)

    return {name: whole(x) for name, x in batch.items()}
