"""What this machine has and what the package will use of it."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

from mentalglm_jax.devices.compiled import described
from mentalglm_jax.devices.hardware import chip_of
from mentalglm_jax.model.attention import chosen_backend

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "safetensors", "tokenizers",
             "torch", "transformers", "peft", "captum")  # fmt: skip


def diagnose() -> dict[str, Any]:
    """Hardware, versions and choices as plain values; initialises JAX's default backend.

    Without a working backend, ``devices`` says why, and the rest is still there.
    """
    return {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        **_hardware(),
        "programs kept": described(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _hardware() -> dict[str, Any]:
    try:
        devices = jax.devices()
    except RuntimeError as error:  # the platform JAX_PLATFORMS asks for is not there
        return {"devices": f"none: {str(error).splitlines()[0]}"}
    kind = devices[0].device_kind
    memory, chip = (devices[0].memory_stats() or {}).get("bytes_limit"), chip_of(kind)
    peak = "not known"
    if chip is not None:
        flops, bandwidth = chip.flops / chip.devices / 1e12, chip.bandwidth / chip.devices / 1e9
        peak = f"{flops:,.0f} TFLOP/s in bfloat16, {bandwidth:,.0f} GB/s"
    return {
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {kind}",
        "device memory": f"{memory / 2**30:.1f} GiB" if memory else "not reported",
        "device peak": peak,
        "processes": jax.process_count(),
        "attention": f"{chosen_backend('auto', 'bfloat16')} (bfloat16), {chosen_backend('auto', 'float32')} (float32)",
        "dtype": "bfloat16" if chip else "float32",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
