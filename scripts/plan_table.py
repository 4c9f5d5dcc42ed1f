"""Compiles every TPU recipe for its slice and rewrites the tables of docs/plan.md.

    make plan                                    all of them, one after the other: an hour or so on 2 cores
    make plan ARGS="tpu-v5e-8 tpu-v6e-1"         only these rows; the others keep their figures and their date
    make plan ARGS="tpu-v5e-8-pairs"             the recipe's steps on pairs of answers (docs/repair.md)
    make plan ARGS="--answers tpu-v5e-8"         only these rows of the second table, of what answers

Needs the [tpu] extra (the compiler), not a TPU. Each recipe runs in a process of its own, as `mentalglm plan --json`.
"""

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

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
    "tpu-v5e-1-int8-pairs": "v5e:1x1",
    "tpu-v5e-8-pairs": "v5e:2x4",
}
PAIRS = "-pairs"  # a row of this ending: the recipe's rows and length in a preference stage
HEADER = (
    "| recipe | slice | rows × length at a time | weights | adapter, optimiser | activations | total of | fits "
    "| at most tokens/s | by | compiled |",
    "|---|---|---|--:|--:|--:|--:|---|--:|---|---|",
)
START, END = "<!-- make plan: from here -->", "<!-- make plan: to here -->"
ANSWERING = ("tpu-v5e-1-int8", "tpu-v5e-8", "tpu-v6e-1")
ANSWERS_HEADER = (
    "| recipe | slice | prompts × length, new tokens | weights | cache | prompts | tokens | label scores | of | fits "
    "| at most tokens/s | compiled |",
    "|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|",
)
ANSWERS_START, ANSWERS_END = "<!-- answers: from here -->", "<!-- answers: to here -->"


def main(names: list[str]) -> None:
    """Refreshes the rows of ``names`` (all without any)."""
    answers = "--answers" in names
    names = [name for name in names if name != "--answers"]
    if unknown := set(names) - set(ANSWERING if answers else SLICES):
        there = ", ".join(ANSWERING if answers else SLICES)
        sys.exit(f"plan_table: no recipe {', '.join(sorted(unknown))}; there are {there}")
    if not answers:
        refresh(names or [*SLICES], [*SLICES], row, HEADER, START, END)
    if answers or not names:
        refresh(names or [*ANSWERING], [*ANSWERING], answers_row, ANSWERS_HEADER, ANSWERS_START, ANSWERS_END)


def refresh(
    names: list[str], order: list[str], made: Callable[[str, str], str], header: tuple[str, ...], start: str, end: str
) -> None:
    """Makes the rows of ``names`` anew, one after the other, in the table between ``start`` and ``end``."""
    for name in names:
        line = made(name, SLICES[name])
        sys.stderr.write(line + "\n")
        before, rest = DOCUMENT.read_text("utf-8").split(start)
        old, after = rest.split(end)
        rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| tpu-")}
        rows[name] = line
        table = "\n".join([*header, *(rows[name] for name in order if name in rows)])
        DOCUMENT.write_text(f"{before}{start}\n{table}\n{end}{after}", "utf-8")


def planned(name: str, topology: str, *options: str) -> dict[str, Any]:
    """What `mentalglm plan` says of a recipe."""
    recipe = Path("configs") / f"{name.removesuffix(PAIRS)}.yaml"
    if name.endswith(PAIRS):
        options = (*options, "--set", f"stages={json.dumps([preference_stage(ROOT / recipe)])}")
    command = [sys.executable, "-P", "-m", "mentalglm_jax", "plan", str(recipe), "--topology", topology, *options,
               "--json"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def preference_stage(recipe: Path) -> dict[str, Any]:
    """A stage on pairs with the rows of the recipe's first stage; there is no file, so as many pairs as can be."""
    first = yaml.safe_load(recipe.read_text("utf-8"))["stages"][0]
    objective = {"kind": "dpo", "pairs": "runs/no-such-file.jsonl", "beta": 0.1, "sft_weight": 0.2}
    return {"name": "repair", "objective": objective, "train": first["train"]}


def gib(value: float | None) -> str:
    """Bytes in GiB; of a program that the compiler refused nothing is known."""
    return "–" if value is None else f"{value / 2**30:.2f}"


def compiled(found: dict[str, Any]) -> str:
    """When, and how long it took."""
    return f"{datetime.date.today().isoformat()}, {found['compile_seconds']:.0f} s"


def row(name: str, topology: str) -> str:
    """One recipe's training step, compiled."""
    found = planned(name, topology)
    memory, shape, least = found["compiled"] or found["estimated"], found["shape"], found["bound"]
    at_once = shape["rows"] * shape["data"] * shape["fsdp"]
    return line_of(
        name, topology, f"{at_once} × {shape['length']:,}", gib(memory["weights"]),
        gib(memory["adapters"] + memory["optimizer"]), gib(memory["activations"]),
        f"{gib(found['total'])} of {gib(found['device_memory'])}", "yes" if found["fits"] else "**no**",
        f"{least['tokens_per_second']:,.0f}", least["limit"], compiled(found)
    )  # fmt: skip


def answers_row(name: str, topology: str) -> str:
    """One recipe's answers, compiled."""
    found = planned(name, topology, "--generate")
    programs = found["programs"]
    return line_of(
        name, topology, f"{found['batch']} × {found['prompt_tokens']:,}, {found['new_tokens']}", gib(found["weights"]),
        gib(found["cache"]), gib(programs["prompts"]), gib(programs["tokens"]), gib(programs["label scores"]),
        gib(found["device_memory"]), "yes" if found["fits"] else "**no**", f"{found['tokens_per_second']:,.0f}",
        compiled(found)
    )  # fmt: skip


def line_of(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
