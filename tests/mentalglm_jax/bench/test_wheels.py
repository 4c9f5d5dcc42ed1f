"""``benchmarks/wheels.txt`` is what the benchmark imports beyond an accelerator image, and small."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_list_is_what_is_imported():
    command = [sys.executable, "-P", "benchmarks/wheels.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"


def test_the_list_is_of_pinned_packages_and_small():
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "benchmarks" / "wheels.py")
    assert spec is not None and spec.loader is not None
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)
    text = wheels.LIST.read_text("utf-8")
    sizes = [float(size) for size in re.findall(r"==\S+ *# ([\d.]+) MB", text)]
    assert len(sizes) == len(wheels.stated()) > 5 and 0 < sum(sizes) * 1e6 < wheels.MOST
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    assert {pin.partition("==")[0] for pin in wheels.stated()} <= pinned
    assert not {"torch", "jax", "transformers"} & {pin.partition("==")[0] for pin in wheels.stated()}
