"""Compiles every TPU recipe for its slice and rewrites the table of docs/plan.md.

    make plan                                    all of them, one after the other: half an hour or so on 2 cores
    make plan ARGS="tpu-v5e-8 tpu-v6e-1"         only these rows; the others keep their figures and their date

Needs the [tpu] extra (the compiler), not a TPU. Each recipe runs in a process of its own, as `mentalglm plan --json`.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "plan.md"
SLICES = {
    "tpu-v5e-1-int8": "v5e:1x1",
    "tpu-v5e-1-int4": "v5e:1x1",
    "tpu-v5e-8": "v5e:2x4",
    "tpu-v6e-1": "v6e:1x1",
    "tpu-v6e-8": "v6e:2x4",
    "tpu-v5p-8": "v5p:2x2x1",
    "tpu-v5e-16-32k": "v5e:4x4",
}
HEADER = (
    "| recipe | slice | rows × length at a time | weights | adapter, optimiser | activations | total of | fits "
    "| at most tokens/s | by | compiled |",
    "|---|---|---|--:|--:|--:|--:|---|--:|---|---|",
)
START, END = "<!-- make plan: from here -->", "<!-- make plan: to here -->"


def main(names: list[str]) -> None:
    """Refreshes the rows of ``names`` (all without any)."""
    if unknown := set(names) - set(SLICES):
        sys.exit(f"plan_table: no recipe {', '.join(sorted(unknown))}; there are {', '.join(SLICES)}")
    text = DOCUMENT.read_text("utf-8")
    before, rest = text.split(START)
    old, after = rest.split(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| tpu-")}
    for name in names or SLICES:
        rows[name] = row(name, SLICES[name])
        sys.stderr.write(rows[name] + "\n")
        table = "\n".join([*HEADER, *(rows[name] for name in SLICES if name in rows)])
        DOCUMENT.write_text(f"{before}{START}\n{table}\n{END}{after}", "utf-8")


def row(name: str, topology: str) -> str:
    """One recipe, compiled."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "mentalglm_jax",
        "plan",
        f"configs/{name}.yaml",
        "--topology",
        topology,
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    memory, shape, least = found["compiled"] or found["estimated"], found["shape"], found["bound"]
    at_once = shape["rows"] * shape["data"] * shape["fsdp"]

    def gib(value: float) -> str:
        return f"{value / 2**30:.2f}"

    cells = (
        name, topology, f"{at_once} × {shape['length']:,}", gib(memory["weights"]),
        gib(memory["adapters"] + memory["optimizer"]), gib(memory["activations"]),
        f"{gib(found['total'])} of {gib(found['device_memory'])}", "yes" if found["fits"] else "**no**",
        f"{least['tokens_per_second']:,.0f}", least["limit"],
        f"{datetime.date.today().isoformat()}, {found['compile_seconds']:.0f} s",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
