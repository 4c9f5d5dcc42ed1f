"""Accelerators: what one chip of each kind holds and how fast it can be, from its vendor's documentation.

Figures are per chip, dense bfloat16, as documented (decimal units except memory). ``links`` is the bandwidth of all
links to neighbouring chips together, both directions. A plan counts a link's one direction: half of it.
The TPUs' figures were compared with the pages named in ``source`` on 2026-11-24; those of the GPUs were not. v4's
page says nothing of single links: 24 TB/s through the middle of its 16 x 16 x 16 torus, 2 x 16 x 16 links, are 47 GB/s
a link and direction, taken as 50 for each of six.
"""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import short

GIB = 2.0**30
_DOCS = "https://cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator: ``memory`` in bytes, ``flops`` per second, bandwidths in bytes per second. ``kinds``
    are parts of ``jax.Device.device_kind``; ``devices`` is how many JAX devices one chip is."""

    name: str
    kinds: tuple[str, ...]
    memory: float
    flops: float
    bandwidth: float
    links: float
    devices: int = 1
    source: str


# By the name libtpu gives a slice of them (v5e:2x4); `gcloud`'s accelerator types count chips (v5e-8) or cores (v5p-8).
TPUS = {
    chip.name: chip
    for chip in (
        Chip(name="v4", kinds=("TPU v4",), memory=32 * GIB, flops=275e12, bandwidth=1200e9, links=600e9,
             source=f"{_DOCS}v4"),
        Chip(name="v5e", kinds=("TPU v5 lite", "TPU v5e"), memory=16 * GIB, flops=197e12, bandwidth=819e9,
             links=400e9, source=f"{_DOCS}v5e"),
        Chip(name="v5p", kinds=("TPU v5p", "TPU v5"), memory=95 * GIB, flops=459e12, bandwidth=2765e9, links=1200e9,
             source=f"{_DOCS}v5p"),
        Chip(name="v6e", kinds=("TPU v6 lite", "TPU v6e"), memory=32 * GIB, flops=918e12, bandwidth=1638e9,
             links=800e9, source=f"{_DOCS}v6e"),
        Chip(name="tpu7x", kinds=("TPU7x", "TPU v7"), memory=192 * GIB, flops=2307e12, bandwidth=7380e9, links=1200e9,
             devices=2, source=f"{_DOCS}tpu7x"),
    )
}  # fmt: skip
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
GPUS = (
    Chip(name="H200", kinds=("H200",), memory=141e9, flops=989e12, bandwidth=4800e9, links=900e9,
         source=f"{_NVIDIA}h200"),
    Chip(name="H100", kinds=("H100",), memory=80e9, flops=989e12, bandwidth=3350e9, links=900e9,
         source=f"{_NVIDIA}h100"),
    Chip(name="A100", kinds=("A100",), memory=80e9, flops=312e12, bandwidth=2039e9, links=600e9,
         source=f"{_NVIDIA}a100"),
    Chip(name="H100 PCIe", kinds=("H100 PCIe",), memory=80e9, flops=756e12, bandwidth=2000e9, links=600e9,
         source=f"{_NVIDIA}h100"),
    Chip(name="B200", kinds=("B200",), memory=180e9, flops=2250e12, bandwidth=8000e9, links=1800e9,
         source=f"{_NVIDIA}dgx-b200"),
    Chip(name="L40S", kinds=("L40S",), memory=48e9, flops=362e12, bandwidth=864e9, links=64e9, source=f"{_NVIDIA}l40s"),
    Chip(name="L4", kinds=("L4",), memory=24e9, flops=121e12, bandwidth=300e9, links=64e9, source=f"{_NVIDIA}l4"),
)  # fmt: skip
_ALIASES = {"7x": "tpu7x", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e", "v5litepod": "v5e"}
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip a JAX device belongs to; None when it is not in the tables (a CPU)."""
    chips = sorted(((kind, chip) for chip in (*TPUS.values(), *GPUS) for kind in chip.kinds), key=lambda x: -len(x[0]))
    return next((chip for kind, chip in chips if kind in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, e.g. v5e:2x4."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As libtpu spells it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """JAX devices of the slice."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def hosts(self) -> tuple[int, int, int]:
        """How many chips of one host lie along each axis: one host for up to 8 flat or 4 cubed chips, else 2 x 2."""
        shape = (*self.shape, 1)[:3]
        return shape if math.prod(shape) <= (8 if len(self.shape) == 2 else 4) else (2, 2, 1)  # type: ignore[return-value]


def parse_topology(text: str) -> Topology:
    """Reads ``v5e:2x4`` or an accelerator type such as ``v5e-8``, ``v5litepod-8``, ``v5p-8`` (8 cores, 4 chips).

    Raises:
        InputError: an unknown chip or form.
    """
    found = re.fullmatch(r"([a-z0-9]+)(?::(\d{1,6}(?:x\d{1,6}){1,2})|-(\d{1,6}))", text.strip().lower(), re.ASCII)
    name = _ALIASES.get(found[1], found[1]) if found else ""
    if found is None or name not in TPUS:
        raise InputError(
            f"topology {short(text)} is not known; write CHIP:SHAPE, e.g. v5e:2x4, v5p:2x2x1, with one of the chips "
            f"{', '.join(TPUS)}, or an accelerator type, e.g. v5e-8, v5p-8"
        )
    flat = name in ("v5e", "v6e")
    if found[2] is None:
        chips = int(found[3]) if flat else int(found[3]) // 2
        shape = (_FLAT if flat else _CUBES).get(chips)
        if shape is None:
            sizes = ", ".join(f"{name}-{n if flat else 2 * n}" for n in (_FLAT if flat else _CUBES))
            example = "2x4" if flat else "2x2x1"
            raise InputError(f"topology {short(text)} is not one of {sizes}; other shapes are written {name}:{example}")
    else:
        shape = found[2]
    sizes = tuple(int(size) for size in shape.split("x"))
    if len(sizes) != (2 if flat else 3) or 0 in sizes:
        sides = "two sides, e.g. 2x4" if flat else "three sides, e.g. 2x2x1"
        raise InputError(f"topology {short(text)}: a {name} slice has {sides}")
    return Topology(TPUS[name], sizes)


def free_memory(device: Any) -> int | None:
    """Bytes that are free on a device of JAX's, on a CPU those of the machine (``MemAvailable``, also that of a
    container's limit); None where nobody says."""
    if "bytes_limit" in (stats := device.memory_stats() or {}):
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError):
        kib = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found += [int(kib[1]) * 1024] if kib else []
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", there is no limit
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(most - used)
    return min(found, default=None)


def tpu_here() -> bool:
    """Whether a chip of Google's is on this machine's PCI bus; needs no JAX."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == "0x1ae0" for path in vendors)


def quiet_off_tpu() -> None:
    """Where no TPU is, says so to libtpu, which is installed for plans: it would else ask the network for one and fill
    stderr at every start of JAX. To be called before JAX starts."""
    if not tpu_here():
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
