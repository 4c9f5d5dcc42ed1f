"""The device itself: what it is, how fast it multiplies matrices and how fast it reads memory."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mentalglm_jax.devices.doctor import diagnose
from mentalglm_jax.devices.hardware import chip_of

ROUNDS = 10


def measure(tell: Callable[[dict[str, Any]], None]) -> None:
    """``matmul_flops`` per second, of one device, in bfloat16 (float32 on a CPU); ``bandwidth`` in bytes per second of
    an addition over an array that no cache holds, read and written. Documented peaks stand beside them."""
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    found: dict[str, Any] = {"machine": diagnose(), "documented": chip and {
        "name": chip.name, "flops": chip.flops / chip.devices, "bandwidth": chip.bandwidth / chip.devices,
    }}  # fmt: skip
    tell(found)
    small = device.platform == "cpu"
    size, dtype = (2048, jnp.float32) if small else (8192, jnp.bfloat16)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    found["matmul_flops"] = 2 * size**3 / _best(jax.jit(jnp.matmul), a, b)
    tell(found)
    count = 1 << (26 if small else 29)
    x = jnp.ones(count, jnp.float32)
    found["bandwidth"] = 2 * x.nbytes / _best(jax.jit(lambda x: x + 1), x)
    tell(found)


def _best(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Seconds of the fastest of some calls, each waited for; the first, which compiles, does not count."""
    function(*arguments).block_until_ready()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        function(*arguments).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)
