"""What `mentalglm bench` imports beyond the packages of an accelerator image, with the size of their wheels.

    python -P benchmarks/wheels.py             prints what benchmarks/wheels.txt should say; exit code 1 if it differs
    python -P benchmarks/wheels.py --write     writes it

For a machine with no network: a copy of the tree and these wheels are enough where the image has ``IMAGE`` (Python
3.12, jax 0.11 with CUDA 13, torch 2.11, transformers 5.17). There:

    pip install --no-index --find-links WHEELS --no-deps -r benchmarks/wheels.txt
    PYTHONPATH=TREE python -m mentalglm_jax bench --against peft

Every part of the benchmark runs on a tiny model in a process of its own, which then tells what it has imported. Sizes
are those of the wheels that pip takes for Python 3.12 on Linux x86-64 (asked of the index by --write).
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIST = ROOT / "benchmarks" / "wheels.txt"
IMAGE = ("jax", "jaxlib", "torch", "transformers", "peft", "flax", "optax", "orbax-checkpoint", "safetensors")
MOST = 40_000_000  # bytes of all wheels together
LARGE = {"pyarrow"}  # not brought along: 48 MB, for the tables that part `probes` writes at its end
RECIPE: dict[str, Any] = {
    "run_dir": "bench", "data": {"source": "synthetic"}, "lora": {"rank": 4, "alpha": 8},
    "model": {"geometry": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}},
    "pretrain": {"train": {"steps": 1}},
    "stages": [{"name": "a", "languages": ["en"], "train": {"steps": 1, "rows": 2, "sequence_length": 128}}],
}  # fmt: skip
# Runs one part, then writes the names of all modules that were imported, without ours.
_TOLD = """
import json, sys
{what}
json.dump(sorted({{name.partition(".")[0] for name in sys.modules}}), open({out!r}, "w"))
"""
_COMMAND = """
from mentalglm_jax.cli.main import main
from mentalglm_jax.train.recipe import load_recipe
load_recipe({recipe!r})
try:
    main(["bench", "--help"])
except SystemExit:
    pass
from mentalglm_jax.bench.run import bench
from mentalglm_jax.cli.bench import bench_table
"""


def imported() -> set[str]:
    """Distributions that the parts of the benchmark import, by their canonical names."""
    owners = importlib.metadata.packages_distributions()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")  # JSON is YAML
        modules = told(folder, _COMMAND.format(recipe=str(recipe)))
        for kind in ("device", "step", "generate", "logits"):
            modules |= part(folder, "mentalglm_jax.bench.child",
                            {"kind": kind, "recipe": RECIPE, "seconds": 0.0, "folder": scratch})  # fmt: skip
        about = json.loads((folder / "target.json").read_text("utf-8"))
        for kind, files in (("peft", {"rows": str(folder / "rows.npz")}), ("logits", {"directory": scratch}),
                            ("probes", {})):  # fmt: skip
            modules |= part(folder, "probes.bench", {**about, **files, "kind": kind, "seconds": 0.0})
    return {canonicalize_name(owner) for module in modules for owner in owners.get(module, ())}


def part(folder: Path, module: str, spec: dict[str, Any]) -> set[str]:
    """Modules that one part imports."""
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return told(folder, f"from {module} import main\nmain({str(folder / 'spec.json')!r}, {str(folder / 'out.json')!r})")


def told(folder: Path, what: str) -> set[str]:
    """Top-level modules that are there after ``what``."""
    out = folder / "modules.json"
    done = subprocess.run([sys.executable, "-P", "-c", _TOLD.format(what=what, out=str(out))], cwd=ROOT, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"wheels: a part of the benchmark failed: {done.stderr.strip().splitlines()[-1]}")
    return set(json.loads(out.read_text("utf-8")))


def needed_by(names: Iterable[str]) -> set[str]:
    """``names`` and all that they need, as far as it is installed here."""
    found: set[str] = set()
    todo = [*names]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            parsed = [Requirement(one) for one in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def ours() -> list[str]:
    """What both packages ask for. Others that are imported (IPython, libtpu) were found here and are not missed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["probes"]]
    return [Requirement(one).name for one in asked]


def wanted() -> list[str]:
    """``NAME==VERSION`` of every package that must be brought along."""
    names = (imported() & needed_by(ours())) - needed_by(IMAGE) - LARGE
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(names)]


def stated() -> list[str]:
    """What the list says."""
    lines = (line.partition("#")[0].strip() for line in LIST.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def sizes(pins: list[str]) -> dict[str, int]:
    """Bytes of the wheel of every pin."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-P", "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                        "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform",
                        "manylinux2014_x86_64", "--dest", scratch, *pins], check=True)  # fmt: skip
        found = {canonicalize_name(re.split(r"-\d", wheel.name)[0]): wheel.stat().st_size
                 for wheel in Path(scratch).iterdir()}  # fmt: skip
    return {pin: found[canonicalize_name(pin.partition("==")[0])] for pin in pins}


def main() -> None:
    """Prints, compares or writes the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    pins = wanted()
    if given.write:
        found = sizes(pins)
        total = sum(found.values())
        if total > MOST:
            sys.exit(f"wheels: {total / 1e6:.1f} MB, more than {MOST / 1e6:.0f}; import less, or later")
        head = (
            "# What `mentalglm bench` needs beyond an accelerator image; made and explained by benchmarks/wheels.py.\n"
        )
        lines = [f"{pin:<28}# {size / 1e6:.2f} MB\n" for pin, size in found.items()]
        LIST.write_text(f"{head}# {total / 1e6:.1f} MB in all.\n{''.join(lines)}", encoding="utf-8")
        return
    print("\n".join(pins))
    if pins != stated():
        sys.exit("wheels: benchmarks/wheels.txt says otherwise; --write makes it anew")


if __name__ == "__main__":
    main()
