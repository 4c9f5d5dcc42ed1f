"""``mentalglm``: every command is one library call.

Results go to stdout (``--json``: one JSON object and nothing else), progress and reasons to stderr. Exit codes: 0 done,
1 failed, 2 bad usage or bad input.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mentalglm_jax.cli.convert import convert
from mentalglm_jax.cli.data import data_app
from mentalglm_jax.cli.leaderboard import leaderboard
from mentalglm_jax.cli.options import AsJson, Overrides, ReplaceSurrogates, SetNames
from mentalglm_jax.cli.output import cell, complain, forgiving, print_json, say
from mentalglm_jax.cli.progress import ConsoleReporter
from mentalglm_jax.cli.sweep import sweep
from mentalglm_jax.devices.compiled import keep_from_start
from mentalglm_jax.devices.hardware import tpu_here
from mentalglm_jax.errors import MentalGLMError

if TYPE_CHECKING:
    from mentalglm_jax.pipeline.run_dir import Run
    from mentalglm_jax.planning.plan import Plan

SAFETY = (
    "This is a research instrument, not a diagnosis. If you or someone you know is in a crisis, "
    "please talk to a person: a doctor, a crisis line, someone you trust."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Explainable, checkable fine-tuning of GLM-4 in JAX.")  # fmt: skip
app.add_typer(data_app, name="data")

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, e.g. configs/demo.yaml")]
Restart = Annotated[bool, typer.Option(help="Delete what another recipe left in the run directory")]
AllowChanged = Annotated[bool, typer.Option("--allow-changed", help="Go on although the recipe differs from the run's")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most; default: 640, or what the "
                                                              "model's context leaves")]  # fmt: skip
Profile = Annotated[bool, typer.Option("--profile", help="Training stages write a trace of three steps to profile/")]


def _stderr() -> Console:
    return Console(stderr=True)


@app.command()
def run(recipe: RecipeFile, set_: Overrides = [], restart: Restart = False, allow_changed: AllowChanged = False,  # noqa: B006
        profile: Profile = False, json_: AsJson = False) -> None:  # fmt: skip
    """The whole path: data, training stages, export, evaluation, probes, report. The same command continues a run."""
    from mentalglm_jax.pipeline.job import run as run_pipeline
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, set_)
    reporter = ConsoleReporter(_stderr())
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
def train(recipe: RecipeFile, set_: Overrides = [], restart: Restart = False, allow_changed: AllowChanged = False,  # noqa: B006
          profile: Profile = False, json_: AsJson = False) -> None:  # fmt: skip
    """Only the training stages of a recipe; adapters end up in RUN_DIR/stages/NAME/adapter."""
    from mentalglm_jax.pipeline.job import run as run_pipeline
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, set_)
    reporter = ConsoleReporter(_stderr())
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
    json_: AsJson = False,
) -> None:
    """Does a recipe fit a TPU slice, and how fast can it be: asks the TPU compiler, needs no TPU. Exit code 1: no."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU that is there may be busy with a run; planning needs none
    from mentalglm_jax.planning.plan import plan as make_plan
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, set_)
    with _stderr().status(cell(f"compiling for {topology} (minutes for a 9B model) ...")):
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


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Model directory or Hub id")],
    in_: Annotated[Path, typer.Option("--in", help="Records to answer (JSONL)")],
    out: Annotated[Path, typer.Option("--out", help="generations.jsonl to write")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter directory")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer directory; default: the model's")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str, typer.Option()] = "float32",
    replace_surrogates: ReplaceSurrogates = False,
    json_: AsJson = False,
) -> None:
    """Answers posts: label and explanation, one row each, parsed. Continues where an interrupted call stopped."""
    from mentalglm_jax.checkpoints.directories import load
    from mentalglm_jax.checkpoints.hf_files import locate
    from mentalglm_jax.data.records import read_records
    from mentalglm_jax.data.surrogates import replacing_surrogates
    from mentalglm_jax.inference.generate import count_unread, generate_records
    from mentalglm_jax.model.lora import has_lora, merge_lora
    from mentalglm_jax.text.tokenizer import GlmTokenizer

    with replacing_surrogates(replace_surrogates):
        records = read_records(in_, allow_extra=True)
    loaded = load(model, adapter=adapter, dtype=dtype)
    reporter = ConsoleReporter(_stderr())
    try:
        rows = generate_records(
            merge_lora(loaded) if has_lora(loaded) else loaded, GlmTokenizer.load(tokenizer or locate(model)), records,
            out_path=out, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size,
            progress=reporter.stage("generate"),
        )  # fmt: skip
    finally:
        reporter.close()
    found = count_unread(rows)
    if json_:
        print_json({"out": str(out), **found})
    else:
        say(f"{out}: {found['rows']} answers, {found['no_label']} without a readable label, {found['cut_off']} cut off "
            f"by the token limit\n{SAFETY}")  # fmt: skip


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model directory or Hub id, a run directory, or finished answers: a "
                                              "generations.jsonl or a directory with one")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter directory")] = None,
    task: Annotated[str | None, typer.Option(help="Only this task")] = None,
    data: Annotated[Path | None, typer.Option(help="What is to be answered: what data.root of a recipe names, or a "
                                                   "labelled table (columns post, label); of finished answers, those "
                                                   "that are missing then count as wrong")] = None,
    sets: SetNames = [],  # noqa: B006
    split: Annotated[str | None, typer.Option(help="Of --data: dev (of upstream files 20 % of the training part; the "
                                                   "default where there are several), test or train; of a run its "
                                                   "own records")] = None,
    language: Annotated[str | None, typer.Option(help="Of a labelled table: en or zh; default: that of each "
                                                      "post")] = None,
    train_data: Annotated[Path | None, typer.Option("--train", help="Training records (as --data), for floors")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with these finished answers to the same posts")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for answers and report (HTML, JSON, CSV, card)")] = None,
    encoder: Annotated[Path | None, typer.Option(help="BERT or BART directory: adds BERTScore or BARTScore of the "
                                                      "explanations")] = None,
    ratings: Annotated[Path | None, typer.Option(help="Folder of `mentalglm data review import`: adds what people said "
                                                      "about these explanations")] = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str, typer.Option()] = "float32",
    replace_surrogates: ReplaceSurrogates = False,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Scores labels and explanations, read from the text and as label log-probabilities, with confidence intervals;
    given --train, beside baselines; given --against, compared with another run. A run that was trained answers its own
    evaluation records, as its recipe says."""
    import tempfile

    from mentalglm_jax.data.surrogates import replacing_surrogates
    from mentalglm_jax.errors import InputError, RunError
    from mentalglm_jax.evaluate.assess import assess
    from mentalglm_jax.evaluate.inputs import finished, read_answers, read_data, shown_name
    from mentalglm_jax.evaluate.report import write_report
    from mentalglm_jax.evaluate.tables import format_comparison, format_table
    from mentalglm_jax.files import working_in

    job = _run_of(Path(model))
    answered = finished(Path(model)) and (job is None or "generate" in job.result)
    own = job is not None and data is None and (split is not None or not answered)  # it answers records of its own
    if adapter is not None and (answered or job is not None):
        raise InputError(
            f"{model}: holds {'finished answers' if answered else 'its adapter'}; --adapter goes with a model"
        )
    if job is not None and (own or not answered):
        job.check_trained()
    if job is not None and own and split is not None:
        answered, data = False, job.records_file(split)
    elif job is not None and own:
        if max_new_tokens is not None:
            raise InputError(f"{model}: answers as its recipe says (generate.max_new_tokens); --max-new-tokens "
                             "goes with --split or --data")  # fmt: skip
        answered = _answer_own(job.dir)
    if not answered and data is None:
        raise InputError(f"{model}: is a model; say what it is to answer with --data PATH")
    with replacing_surrogates(replace_surrogates):  # all that is read, before a model works for hours
        answers = read_answers(model).of_task(task) if answered else None
        records = None if data is None else read_data(data, task, split, language, sets)
        if train_data is None and job is not None and job.records_file("train").is_file():
            train_data = job.records_file("train")
        train = [] if train_data is None else read_data(train_data, task, "train", language, sets)
        others = None if against is None else read_answers(against).of_task(task)
    with contextlib.ExitStack() as alone:  # nobody else works in --out meanwhile
        if answers is None:
            assert records is not None
            if out is not None:
                alone.enter_context(working_in(out))
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    speaker = _speaker(model, adapter, dtype) if job is None else (job.load_final(), job.tokenizer())
                    answers = _answer(*speaker, records, out or Path(scratch), max_new_tokens, batch_size)
                except KeyboardInterrupt:
                    if out is not None:
                        raise
                    raise RunError(
                        "interrupted; nothing is kept: with --out DIR the same command would continue"
                    ) from None
        result, compared = assess(answers, records, train=train, against=others, encoder=encoder, ratings=ratings)
        if out is not None:
            if answered:
                alone.enter_context(working_in(out))
            write_report(out, result, title=shown_name(model), compared=compared,
                         against="" if against is None else shown_name(str(against)))  # fmt: skip
    if json_:
        print_json({"tasks": result, "comparison": compared} if compared is not None else result)
        return
    say(format_table(result))
    if compared is not None:
        say(format_comparison(compared))
    if out is not None:
        say(f"report   {out / 'evaluation.html'}")
    say(f"\n{SAFETY}", style="dim")


def _run_of(directory: Path) -> "Run | None":
    """The run in ``directory``; None where there is none, or nothing but its answers can be read."""
    from mentalglm_jax.errors import InputError
    from mentalglm_jax.evaluate.inputs import finished
    from mentalglm_jax.pipeline.run_dir import Run

    if not (directory / "run.json").is_file():
        return None
    try:
        return Run.opened(directory)
    except InputError:
        if finished(directory):
            return None
        raise


def _answer_own(run_dir: Path) -> bool:
    """The answers of a trained run to its evaluation records, with progress; True once they are finished."""
    from mentalglm_jax.pipeline.job import evaluate_run

    reporter = ConsoleReporter(_stderr())
    try:
        evaluate_run(run_dir, reporter)
    finally:
        reporter.close()
    return True


def _speaker(model: str, adapter: Path | None, dtype: str) -> tuple[Any, Any]:
    """The model that answers, and its tokenizer."""
    from mentalglm_jax.checkpoints.directories import load
    from mentalglm_jax.checkpoints.hf_files import locate
    from mentalglm_jax.text.tokenizer import GlmTokenizer

    return load(model, adapter=adapter, dtype=dtype), GlmTokenizer.load(locate(model))


def _answer(
    loaded: Any, tokenizer: Any, records: Sequence[Any], out: Path, max_new_tokens: int | None, batch_size: int
) -> Any:
    """Both readings of ``records`` by a model, with progress."""
    from mentalglm_jax.evaluate.inputs import answer_records
    from mentalglm_jax.model.lora import has_lora, merge_lora

    reporter = ConsoleReporter(_stderr())
    try:
        return answer_records(
            merge_lora(loaded) if has_lora(loaded) else loaded, tokenizer, records, out,
            max_new_tokens=max_new_tokens, batch_size=batch_size, progress=reporter.stage,
        )  # fmt: skip
    finally:
        reporter.close()


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
