"""What `mentalglm doctor` reports, with and without a working backend."""

import importlib.metadata
import json
from typing import Any

import jax

from mentalglm_jax.devices.doctor import diagnose


def test_what_this_machine_has():
    found = diagnose()
    assert found["backend"] == "cpu" and found["devices"].startswith(f"{jax.device_count()} x ")
    assert found["attention"] == "xla (bfloat16), xla (float32)" and found["dtype"] == "float32"
    assert found["device peak"] == "not known"
    assert found["jax"] == importlib.metadata.version("jax")
    assert json.loads(json.dumps(found)) == found


class Chip:
    device_kind = "TPU v5 lite"

    def memory_stats(self):
        return {"bytes_limit": int(15.75 * 2**30)}


def test_what_a_tpu_host_has(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Chip()] * 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = diagnose()
    assert found["devices"] == "4 x TPU v5 lite" and found["device memory"] == "15.8 GiB"
    assert found["device peak"] == "197 TFLOP/s in bfloat16, 819 GB/s"
    assert found["attention"] == "splash (bfloat16), xla (float32)" and found["dtype"] == "bfloat16"


def test_versions_are_told_even_without_a_backend(monkeypatch):
    def unavailable() -> Any:
        raise RuntimeError("Unable to initialize backend 'tpu': not found\nmore lines")

    monkeypatch.setattr(jax, "devices", unavailable)
    found = diagnose()
    assert found["devices"] == "none: Unable to initialize backend 'tpu': not found"
    assert found["flax"] == importlib.metadata.version("flax")


def test_a_package_that_is_not_there(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert diagnose()["torch"] == "not installed"
