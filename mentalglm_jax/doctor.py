"""What this machine has and what the package will use of it."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

from mentalglm_jax.attention import chosen_backend

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "safetensors", "tokenizers", "torch",
             "transformers", "peft", "captum")  # fmt: skip


def diagnose() -> dict[str, Any]:
    """Hardware, versions and choices as plain values; initialises JAX's default backend.

    Without a working backend, ``devices`` says why, and the rest is still there.
    """
    return {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        **_hardware(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _hardware() -> dict[str, Any]:
    try:
        devices = jax.devices()
    except RuntimeError as error:  # the platform JAX_PLATFORMS asks for is not there
        return {"devices": f"none: {str(error).splitlines()[0]}"}
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return {
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "device memory": f"{memory / 2**30:.1f} GiB" if memory else "not reported",
        "processes": jax.process_count(),
        "attention": f"{chosen_backend('auto', 'bfloat16')} (bfloat16), {chosen_backend('auto', 'float32')} (float32)",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
