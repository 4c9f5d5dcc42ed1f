"""``mentalglm``: every command is one library call.

Results go to stdout (``--json``: one JSON object and nothing else), progress and reasons to stderr. Exit codes: 0 done,
1 failed, 2 bad usage or bad input.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mentalglm_jax.cli.convert import convert
from mentalglm_jax.cli.data import data_app
from mentalglm_jax.cli.evaluate import evaluate
from mentalglm_jax.cli.generate import generate
from mentalglm_jax.cli.leaderboard import leaderboard
from mentalglm_jax.cli.options import AsJson, Overrides, TaskFile, naming
from mentalglm_jax.cli.output import SAFETY, cell, complain, forgiving, print_json, say, stderr
from mentalglm_jax.cli.progress import ConsoleReporter
from mentalglm_jax.cli.sweep import sweep
from mentalglm_jax.cli.tasks import tasks_app
from mentalglm_jax.devices.compiled import keep_from_start
from mentalglm_jax.devices.hardware import tpu_here
from mentalglm_jax.errors import MentalGLMError

if TYPE_CHECKING:
    from mentalglm_jax.planning.plan import Plan

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Explainable, checkable fine-tuning of GLM-4 in JAX.")  # fmt: skip
app.add_typer(data_app, name="data")
app.add_typer(tasks_app, name="tasks")
app.command()(generate)
app.command()(evaluate)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, e.g. configs/demo.yaml")]
Restart = Annotated[bool, typer.Option(help="Delete what another recipe left in the run directory")]
AllowChanged = Annotated[bool, typer.Option("--allow-changed", help="Go on although the recipe differs from the run's")]
Profile = Annotated[bool, typer.Option("--profile", help="Training stages write a trace of three steps to profile/")]


@app.command()
def run(recipe: RecipeFile, set_: Overrides = [], tasks: TaskFile = None, restart: Restart = False,  # noqa: B006
        allow_changed: AllowChanged = False, profile: Profile = False, json_: AsJson = False) -> None:  # fmt: skip
    """The whole path: data, training stages, export, evaluation, probes, report. The same command continues a run."""
    from mentalglm_jax.pipeline.job import run as run_pipeline
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, [*set_, *naming(tasks)])
    reporter = ConsoleReporter(stderr())
    try:
        summary = run_pipeline(loaded, reporter, restart=restart, allow_changed=allow_changed, profile=profile)
    finally:
        reporter.close()
    if json_:
        print_json(summary)
        return
    for line in summary_lines(summary):
        say(line)
    say(f"\n{SAFETY}\n", style="dim")
    say(f"summary  {loaded.run_dir / 'summary.json'}")
    if (loaded.run_dir / "report.html").exists():
        say(f"report   {loaded.run_dir / 'report.html'}")


def summary_lines(summary: dict[str, Any]) -> list[Table]:
    """The one table a run ends with: parity, scores beside their floors, probes."""
    split = summary.get("eval_split")  # a run finished by an earlier version does not say
    table = Table(title=f"Result on the {split} records" if split else "Result", title_justify="left", show_edge=False,
                  header_style="bold")  # fmt: skip
    for name, justify in (("what", "left"), ("value", "right"), ("beside", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("merged", "adapter"):
        if (found := summary["parity"].get(f"{name}_max_abs_logit_diff")) is not None:
            same, total = summary["parity"][f"{name}_greedy_identical"]
            table.add_row(f"{name} export vs transformers/PEFT: max |Δ logit|", f"{found:.1e}",
                          f"greedy answers identical: {same}/{total}")  # fmt: skip
    for task, entry in summary["eval"].items():
        for metric in ("weighted_f1", "micro_f1", "macro_f1"):
            floor = ", ".join(f"{name} {scores[metric]:.3f}" for name, scores in entry["floors"].items())
            low, high = entry["ci95"]
            more = f"95 % CI {low:.3f}–{high:.3f}, " if metric == "weighted_f1" else ""
            table.add_row(f"{task} {metric.replace('_', ' ')} (n = {entry['n']})", f"{entry[metric]:.3f}",
                          f"{more}floors: {floor}")  # fmt: skip
        table.add_row(f"{task} answers that could not be parsed", f"{entry['parse_failure_rate']:.1%}", "")
    probes = summary["probes"]
    for key, what in (("cue_auroc", "saliency finds the planted cue: AUROC"),
                      ("mass_ratio", "positive saliency inside the cited span: share")):  # fmt: skip
        for method, value in (probes.get(key) or {}).items():
            null = (probes.get("mass_ratio_null") or {}).get(method) if key == "mass_ratio" else 0.5
            beside = f"chance {null:.3f}" if isinstance(null, float) else ""
            table.add_row(f"{what} ({method})", "–" if value is None else f"{value:.3f}", beside)
    if (probes.get("completeness_delta") or {}).get("mean") is not None:  # the fast budget has no integrated gradients
        table.add_row(
            "integrated gradients: mean completeness delta", f"{probes['completeness_delta']['mean']:.2%}", ""
        )
    if probes.get("diagnosticity") is not None:
        table.add_row("faithful vs unfaithful control: diagnosticity", f"{probes['diagnosticity']:.3f}", "chance 0.5")
    table.add_row("seconds in all", f"{sum(summary['seconds'].values()):.0f}", "")
    return [table]


@app.command()
def train(recipe: RecipeFile, set_: Overrides = [], tasks: TaskFile = None, restart: Restart = False,  # noqa: B006
          allow_changed: AllowChanged = False, profile: Profile = False, json_: AsJson = False) -> None:  # fmt: skip
    """Only the training stages of a recipe; adapters end up in RUN_DIR/stages/NAME/adapter."""
    from mentalglm_jax.pipeline.job import run as run_pipeline
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, [*set_, *naming(tasks)])
    reporter = ConsoleReporter(stderr())
    try:
        result = run_pipeline(loaded, reporter, restart=restart, until="train", allow_changed=allow_changed,
                              profile=profile)  # fmt: skip
    finally:
        reporter.close()
    last = loaded.run_dir / "stages" / loaded.stages[-1].name / "adapter"
    print_json({"adapter": str(last), "stages": result}) if json_ else say(f"adapter  {last}")


@app.command()
def plan(
    recipe: RecipeFile,
    topology: Annotated[str, typer.Option(help="TPU slice, e.g. v5e:2x4, v5p:2x2x1 or v5e-8")],
    stage: Annotated[str | None, typer.Option(help="Training stage; default: the first")] = None,
    set_: Overrides = [],  # noqa: B006
    tasks: TaskFile = None,
    json_: AsJson = False,
) -> None:
    """Does a recipe fit a TPU slice, and how fast can it be: asks the TPU compiler, needs no TPU. Exit code 1: no."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU that is there may be busy with a run; planning needs none
    from mentalglm_jax.planning.plan import plan as make_plan
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, [*set_, *naming(tasks)])
    with stderr().status(cell(f"compiling for {topology} (minutes for a 9B model) ...")):
        found = make_plan(loaded, topology, stage=stage)
    if json_:
        print_json(found.to_dict())
    else:
        say(plan_table(found))
    if not found.fits:
        raise typer.Exit(1)


def plan_table(found: "Plan") -> Table:
    """A plan as one table."""
    shape, least, gib = found.shape, found.bound, 2**30
    memory = found.compiled or found.estimated
    source = "compiled" if found.compiled else "estimated; the compiler refused"
    table = Table(title=cell(f"{found.model}, stage {found.stage!r} on {found.topology}"), title_justify="left",
                  show_edge=False, header_style="bold")  # fmt: skip
    table.add_column("per device")
    table.add_column("", justify="right")
    for name, value in (("weights", memory.weights), ("adapter and optimiser", memory.adapters + memory.optimizer),
                        (f"activations ({source})", memory.activations), ("total", found.total),
                        ("memory", found.device_memory)):  # fmt: skip
        table.add_row(name, f"{value / gib:.2f} GiB")
    table.add_row("fits", "yes" if found.fits else "no")
    if found.advice:
        table.add_row("turn", cell(found.advice))
    sizes = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    table.add_row("mesh", sizes, end_section=True)
    table.add_row("one step", f"{least.tokens:,} tokens: {shape.rows * shape.data * shape.fsdp} rows of {shape.length}"
                  f" x {shape.accumulate}")  # fmt: skip
    table.add_row("model FLOPs (4N, half of causal attention)", f"{least.model_flops:.3e}")
    table.add_row("executed FLOPs (with recomputation, adapter)", f"{least.executed_flops:.3e}")
    for name in ("compute", "bandwidth", "links"):
        table.add_row(f"at least, {name}", f"{getattr(least, name):.3f} s")
    table.add_row("at most", f"{least.tokens_per_second:,.0f} tokens/s (by {least.limit})")
    return table


app.command()(leaderboard)
app.command()(sweep)


app.command()(convert)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory")],
    to: Annotated[str, typer.Option(help="peft | vllm | vllm-split | llama.cpp | chatglm | merged")],
    out: Annotated[Path | None, typer.Option(help="Directory to write; default RUN/export-FORMAT")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage whose adapter to export; default: the last")] = None,
    push: Annotated[
        str | None, typer.Option(help="Also upload to this Hub repository, USER/NAME; it is made private")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a public repository")] = False,
    base_name: Annotated[str | None, typer.Option(help="Hub id the adapter names as its base, ORG/NAME")] = None,
) -> None:
    """Exports the adapter a run trained, alone or merged into its base."""
    from mentalglm_jax.pipeline.export import export_run

    out = out or run_dir / f"export-{to}"
    written = export_run(run_dir, to, out, stage=stage, push=push, public=public, base_name=base_name)
    say(f"{written}: written")


@app.command()
def doctor(json_: AsJson = False) -> None:
    """What hardware and versions are seen, and what will be used."""
    from mentalglm_jax.devices.doctor import diagnose

    found = diagnose()
    if json_:
        print_json(found)
        return
    for key, value in found.items():
        say(f"{key:<14} {value}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: turns every error this package raises into one line and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if not {"--help", "--no-compile-cache"} & set(arguments):
        keep_from_start(os.environ)
    arguments = [argument for argument in arguments if argument not in ("--debug", "--no-compile-cache")]
    for stream in (sys.stdout, sys.stderr):
        forgiving(stream)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not tpu_here():  # libtpu, if it is installed for plans, would else fill stderr at every start of JAX
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *rest, **named: complain(f"warning: {message}")
    try:
        code = app(args=arguments, standalone_mode=False)  # of typer.Exit; None where a command just ends
        if code == 130:  # what newer versions of Typer make of Ctrl-C
            raise KeyboardInterrupt
    except MentalGLMError as error:
        if debug:
            raise
        complain(f"mentalglm: {error}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        complain("mentalglm: interrupted; what was finished is kept, the same command continues")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        usage = getattr(error, "exit_code", None)
        message = getattr(error, "format_message", None)
        text = message() if message is not None else f"{type(error).__name__}: {error}"
        hint = "" if usage == 2 else " (--debug shows where)"
        if text or usage != 2:  # without one the help was printed, for want of a command
            line = re.sub(r"^No such option: (-\S*[\w-])", r"No such option '\1'", text.partition("\n")[0])
            complain(f"mentalglm: {line}{hint}")
        sys.exit(2 if usage == 2 else 1)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
