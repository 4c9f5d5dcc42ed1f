"""``mentalglm bench``."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mentalglm_jax.cli.options import AsJson, Overrides, finite
from mentalglm_jax.cli.output import cell, print_json, say

GIB = 2.0**30
Rows = list[tuple[str, str, str]]
RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe whose first stage is measured; default: LoRA on "
                                                        "GLM-4-9b, on a CPU on a small model")]  # fmt: skip
Part = Annotated[list[str], typer.Option(help="device, step, generate, logits, peft or probes (repeatable); default: "
                                              "all but peft")]  # fmt: skip
Against = Annotated[str | None, typer.Option(help="peft: its step on the same rows beside ours")]
Minutes = Annotated[float, typer.Option(callback=finite, min=0.1, max=600, help="For everything together")]
Out = Annotated[Path, typer.Option("--out", help="Report to write (JSON), anew after every part")]


def bench(recipe: RecipeFile = None, set_: Overrides = [], part: Part = [], against: Against = None,  # noqa: B006
          minutes: Minutes = 8.0, out: Out = Path("bench.json"), json_: AsJson = False) -> None:  # fmt: skip
    """Measures a training step, decoding and logits here, on random weights: no download, no data, a time limit."""
    from mentalglm_jax.bench.run import PARTS
    from mentalglm_jax.bench.run import bench as measure
    from mentalglm_jax.errors import InputError
    from mentalglm_jax.train.recipe import load_recipe

    if against not in (None, "peft"):
        raise InputError(f"--against {against!r} is not known; peft is")
    if recipe is None and set_:
        raise InputError("--set changes a recipe; name one")
    chosen = part or [name for name in PARTS if name != "peft"]
    if against and "peft" not in chosen:
        chosen = [*chosen, "peft"]
    loaded = None if recipe is None else load_recipe(recipe, set_).model_dump(mode="json")
    console = Console(stderr=True)
    report = measure(loaded, parts=chosen, minutes=minutes, out=out, say=lambda line: say(line, console))
    if json_:
        print_json(report)
        return
    say(bench_table(report))
    say(f"report   {out}")


def bench_table(report: dict[str, Any]) -> Table:
    """A report as one table; what was not measured has no row, and a part that did not end says so."""
    table = Table(title=f"Measured {report['date']}", title_justify="left", show_edge=False, header_style="bold")
    for name, justify in (("what", "left"), ("value", "right"), ("beside", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    found = {name: entry["found"] or {} for name, entry in report["parts"].items()}
    for row in (*_device(found), *_step(found), *_memory(found), *_peft(found), *_decoding(found), *_others(found)):
        table.add_row(*map(cell, row))
    for name, entry in report["parts"].items():
        if entry["state"] != "done":
            state, _, why = entry["state"].partition(": ")
            table.add_row(*map(cell, (name, state, why[:80])))
    return table


def _short(value: float, unit: str) -> str:
    """Three figures and a decimal prefix: 9.4 GB/s."""
    power = min(max(int(math.log10(max(value, 1.0)) // 3), 0), 5)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"


def _device(found: dict[str, Any]) -> Rows:
    device, rows = found.get("device", {}), []
    if machine := device.get("machine"):
        rows.append(("devices", str(machine["devices"]), f"jax {machine['jax']}"))
    named = (("matmul_flops", "flops", "matrix product", "FLOP/s"), ("bandwidth", "bandwidth", "memory", "B/s"))
    for name, key, what, unit in named:
        if value := device.get(name):
            known = (device.get("documented") or {}).get(key)
            beside = f"documented {_short(known, unit)}" if known else ""
            rows.append((f"{what}, one device", _short(value, unit), beside))
    return rows


def _step(found: dict[str, Any]) -> Rows:
    step, rows = found.get("step", {}), []
    if "compile_seconds" in step:
        what = f"{_short(step['parameters'], 'parameters')}, {step['quantize'] or step['dtype']}, remat {step['remat']}"
        rows.append(("compilation of the step", f"{step['compile_seconds']:.1f} s", what))
    if "tokens_per_second" not in step:
        return rows
    shape = f"{step['rows']} rows of {step['sequence_length']}, {step['steps']} steps of {step['step_seconds']:.3f} s"
    rows += [("training", f"{step['tokens_per_second']:,.0f} tokens/s", shape),
             ("training, answers", f"{step['answer_tokens_per_second']:,.0f} tokens/s", "")]  # fmt: skip
    peak = found.get("device", {}).get("matmul_flops")
    for name, what in (("model_flops", "4N convention"), ("executed_flops", "as executed")):
        each = step[name] / math.prod(step["mesh"].values())
        share = f"{each / peak:.0%} of the measured matrix product" if peak else ""
        rows.append((f"training, {what}", _short(step[name], "FLOP/s"), share))
    return rows


def _memory(found: dict[str, Any]) -> Rows:
    step = found.get("step", {})
    seen = [(name, step[key]) for key, name in (("compiled_bytes", "as compiled"), ("peak_bytes", "highest"))
            if step.get(key)]  # fmt: skip
    planned = f"planned {step['planned_bytes'] / GIB:.2f} GiB" if "planned_bytes" in step else ""
    return [(f"memory of the step, {name}", f"{size / GIB:.2f} GiB", planned) for name, size in seen]


def _peft(found: dict[str, Any]) -> Rows:
    ours, theirs = found.get("step", {}), found.get("peft", {})
    if "tokens_per_second" not in theirs:
        return []
    ratio = ours.get("tokens_per_second", 0) / theirs["tokens_per_second"]
    memory = f", {theirs['peak_bytes'] / GIB:.2f} GiB" if theirs.get("peak_bytes") else ""
    return [("PEFT on the same rows", f"{theirs['tokens_per_second']:,.0f} tokens/s", f"ours: {ratio:.2f} x{memory}")]


def _decoding(found: dict[str, Any]) -> Rows:
    peak, rows = found.get("device", {}).get("bandwidth"), []
    for batch, entry in found.get("generate", {}).get("batches", {}).items():
        share = f", {entry['weights_per_second'] / peak:.0%} of the memory" if peak else ""
        rows.append((f"decoding, batch {batch}", f"{entry['tokens_per_second']:,.0f} tokens/s",
                     f"weights at {_short(entry['weights_per_second'], 'B/s')}{share}"))  # fmt: skip
    return rows


def _others(found: dict[str, Any]) -> Rows:
    rows, logits, probes = [], found.get("logits", {}), found.get("probes", {})
    if "largest_difference" in logits:
        apart = logits["from_float32"]
        rows.append((f"logits, {logits['dtype']}, transformers on {logits['device']}",
                     f"{logits['largest_difference']:.1e}",
                     f"of {logits['largest_logit']:.1f}; to float32 {apart['jax']:.1e}, theirs "
                     f"{apart['transformers']:.1e}"))  # fmt: skip
    for budget, entry in probes.get("budgets", {}).items():
        memory = f"{entry['peak_bytes'] / GIB:.1f} GiB" if entry["peak_bytes"] else ""
        rows.append(
            (f"probing {probes['prompt_tokens']} tokens, {budget}", f"{entry['seconds_per_post']:.1f} s", memory)
        )
    return rows
