"""``mentalglm``: every command is one library call.

Results go to stdout (``--json``: one JSON object and nothing else), progress and reasons to stderr. Exit codes: 0 done,
1 failed, 2 bad usage or bad input, 75 stopped by SIGTERM.
"""

import errno
import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mentalglm_jax import __version__
from mentalglm_jax.cli.bench import bench
from mentalglm_jax.cli.chat import chat
from mentalglm_jax.cli.convert import convert
from mentalglm_jax.cli.data import data_app
from mentalglm_jax.cli.evaluate import evaluate
from mentalglm_jax.cli.generate import generate
from mentalglm_jax.cli.leaderboard import leaderboard
from mentalglm_jax.cli.options import AsJson, OnMesh, Overrides, TaskFile, join_others, naming, place
from mentalglm_jax.cli.output import (
    SAFETY,
    TYPER,
    LogLines,
    cell,
    complain,
    examples,
    forgiving,
    print_json,
    say,
    stderr,
    usage,
)
from mentalglm_jax.cli.overwriting import guarded
from mentalglm_jax.cli.progress import ConsoleReporter
from mentalglm_jax.cli.serve import serve
from mentalglm_jax.cli.sweep import sweep
from mentalglm_jax.cli.tables import answer_plan_table, plan_table, summary_table
from mentalglm_jax.cli.tasks import tasks_app
from mentalglm_jax.devices.compiled import keep_from_start
from mentalglm_jax.devices.stopping import Terminated, sigterm_ends
from mentalglm_jax.errors import InputError, MentalGLMError
from mentalglm_jax.foreign import first_line

app = typer.Typer(**TYPER, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")
app.add_typer(tasks_app, name="tasks")
app.command(
    epilog=examples(
        "mentalglm generate runs/demo/merged --task suicide_risk --in posts.txt --out answers.csv",
        "mentalglm generate zai-org/glm-4-9b-hf --adapter ORG/NAME --in records.jsonl --out answers.jsonl",
    )
)(generate)
app.command(
    epilog=examples(
        "mentalglm chat runs/demo/merged --task suicide_risk",
        "mentalglm chat zai-org/glm-4-9b-chat-hf --adapter ORG/NAME",
    )
)(chat)
app.command(
    epilog=examples(
        "mentalglm serve runs/demo/merged", "mentalglm serve zai-org/glm-4-9b-chat-hf --adapter mine --port 8000"
    )
)(serve)
app.command(
    epilog=examples(
        "mentalglm evaluate runs/demo --out scores",
        "mentalglm evaluate zai-org/glm-4-9b-hf --adapter ORG/NAME --data test.jsonl --out scores",
    )
)(evaluate)
app.command(epilog=examples("mentalglm bench --against peft", "mentalglm bench configs/gpu-80gb.yaml --part step"))(
    bench
)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, e.g. configs/demo.yaml")]
Restart = Annotated[bool, typer.Option(help="Delete what another recipe left in the run directory")]
AllowChanged = Annotated[bool, typer.Option("--allow-changed", help="Go on although the recipe differs from the run's")]
Profile = Annotated[bool, typer.Option("--profile", help="Training stages write a trace of three steps to profile/")]


def _version(asked: bool) -> bool:
    if asked:
        say(f"mentalglm-jax {__version__}")
        raise typer.Exit
    return asked


@app.callback(
    epilog=examples("mentalglm run configs/demo.yaml", "mentalglm COMMAND --help", "mentalglm --install-completion")
)
def about(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Print the version")] = False) -> None:  # fmt: skip
    """Explainable, checkable fine-tuning of GLM-4 in JAX. Every command takes --debug for a traceback."""


@app.command(
    epilog=examples(
        "mentalglm run configs/demo.yaml", "mentalglm run configs/demo.yaml --set seed=1 --set run_dir=runs/seed1"
    )
)
def run(recipe: RecipeFile, set_: Overrides = [], tasks: TaskFile = None, restart: Restart = False,  # noqa: B006
        allow_changed: AllowChanged = False, profile: Profile = False, json_: AsJson = False) -> None:  # fmt: skip
    """The whole path: data, training stages, export, evaluation, probes, report. The same command continues a run."""
    from mentalglm_jax.pipeline.job import run as run_pipeline
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, [*set_, *naming(tasks)])
    join_others(loaded.mesh)
    reporter = ConsoleReporter(stderr())
    try:
        summary = run_pipeline(loaded, reporter, restart=restart, allow_changed=allow_changed, profile=profile)
    finally:
        reporter.close()
    if json_:
        print_json(summary)
        return
    say(summary_table(summary))
    say(f"\n{SAFETY}\n", style="dim")
    say(f"summary  {loaded.run_dir / 'summary.json'}")
    if (loaded.run_dir / "report.html").exists():
        say(f"report   {loaded.run_dir / 'report.html'}")


@app.command(epilog=examples("mentalglm train configs/tpu-v5e-8.yaml --set data.root=my-data"))
def train(recipe: RecipeFile, set_: Overrides = [], tasks: TaskFile = None, restart: Restart = False,  # noqa: B006
          allow_changed: AllowChanged = False, profile: Profile = False, json_: AsJson = False) -> None:  # fmt: skip
    """Only the training stages of a recipe; adapters end up in RUN_DIR/stages/NAME/adapter."""
    from mentalglm_jax.pipeline.job import run as run_pipeline
    from mentalglm_jax.train.recipe import load_recipe

    loaded = load_recipe(recipe, [*set_, *naming(tasks)])
    join_others(loaded.mesh)
    reporter = ConsoleReporter(stderr())
    try:
        result = run_pipeline(loaded, reporter, restart=restart, until="train", allow_changed=allow_changed,
                              profile=profile)  # fmt: skip
    finally:
        reporter.close()
    last = loaded.run_dir / "stages" / loaded.stages[-1].name / "adapter"
    print_json({"adapter": str(last), "stages": result}) if json_ else say(f"adapter  {last}")


@app.command(
    epilog=examples(
        "mentalglm plan configs/tpu-v5e-8.yaml --topology v5e:2x4",
        "mentalglm plan configs/tpu-v5e-8.yaml --topology v5e:2x4 --generate --batch 16 --new-tokens 512",
    )
)
def plan(
    recipe: RecipeFile,
    topology: Annotated[str, typer.Option(help="TPU slice, e.g. v5e:2x4, v5p:2x2x1 or v5e-8")],
    stage: Annotated[str | None, typer.Option(help="Training stage; default: the first")] = None,
    device_order: Annotated[
        bool,
        typer.Option("--device-order", help="Also whether exchanges depend on the order of devices: compiles twice"),
    ] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Answers and label scores instead of training")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="With --generate: posts at a time; default: 16")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="With --generate: of prompts; default 1024")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="With --generate: of an answer; default: 512")] = None,
    set_: Overrides = [],  # noqa: B006
    tasks: TaskFile = None,
    json_: AsJson = False,
) -> None:
    """Does a recipe fit a TPU slice, and how fast can it be: asks the TPU compiler, needs no TPU. Exit code 1: no."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU that is there may be busy with a run; planning needs none
    from mentalglm_jax.train.recipe import load_recipe

    sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if sizes and not generate:
        raise InputError(f"--{next(iter(sizes)).replace('_', '-')} goes with --generate")
    if generate and (stage is not None or device_order):
        raise InputError(f"{'--device-order' if stage is None else '--stage'} is of training, --generate of what comes "
                         "after it")  # fmt: skip
    loaded = load_recipe(recipe, [*set_, *naming(tasks)])
    with stderr().status(cell(f"compiling for {topology} (minutes for a 9B model) ...")):
        if generate:
            from mentalglm_jax.planning.answering import plan_answers

            found, table = plan_answers(loaded, topology, **sizes), answer_plan_table
        else:
            from mentalglm_jax.planning.plan import plan as make_plan

            found, table = make_plan(loaded, topology, stage=stage, device_order=device_order), plan_table
    if json_:
        print_json(found.to_dict())
    else:
        say(table(found))  # type: ignore[arg-type]
        if loaded.mesh is None and math.prod(found.mesh.values()) > 1:
            say("the recipe has no mesh, so that a run would take one device; this plan is of `mesh: {fsdp: -1}`, "
                "which takes all", stderr())  # fmt: skip
    if not found.fits:
        raise typer.Exit(1)


app.command(epilog=examples("mentalglm leaderboard runs/one runs/two --out board.md"))(leaderboard)
app.command(epilog=examples("mentalglm sweep configs/demo.yaml --grid lora.rank=8,16 --seeds 3"))(sweep)
app.command(epilog=examples("mentalglm convert zai-org/glm-4-9b-chat glm-4-9b-chat --to glm"))(convert)


@app.command(
    epilog=examples(
        "mentalglm export runs/demo --to merged --out model",
        "mentalglm export runs/mine --to peft --push ORG/NAME --dry-run",
    )
)
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory")],
    to: Annotated[str, typer.Option(help="peft | vllm | vllm-split | llama.cpp | chatglm | merged")],
    out: Annotated[Path | None, typer.Option(help="Directory to write; default RUN/export-FORMAT")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage whose adapter to export; default: the last")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload to this Hub repository, ORG/NAME, which is made "
                                                  "private")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: make it public")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: upload nothing; list the files and print the "
                                                            "model card")] = False,
    base_name: Annotated[str | None, typer.Option(help="Hub id that adapter and card name as base, ORG/NAME")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence that the card states, e.g. mit; default: "
                                                                  "the base's")] = None,
    set_: OnMesh = [],  # noqa: B006
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Exports what a run trained, as an adapter or merged into its base, with a model card; uploads it if asked."""
    from mentalglm_jax.pipeline.export import describe, export_run

    section = place(set_)
    out = out or run_dir / f"export-{to}"
    done = export_run(run_dir, to, out, stage=stage, push=push, public=public, base_name=base_name, licence=licence,
                      dry_run=dry_run, mesh=section)  # fmt: skip
    if json_:
        print_json({"out": str(out), "files": done.files, "card": done.card, "url": done.pushed and done.pushed.url,
                    "private": done.pushed and done.pushed.private})  # fmt: skip
        return
    say(f"{out}: written")
    if dry_run:
        say("\n".join(describe(done)))
        say(f"{push}: nothing was uploaded (--dry-run)")
    elif done.pushed is not None:
        say(f"{done.pushed.url}: uploaded, {'private' if done.pushed.private else 'public'}")


@app.command(epilog=examples("mentalglm doctor"))
def doctor(json_: AsJson = False) -> None:
    """What hardware and versions are seen, and what will be used."""
    from mentalglm_jax.devices.doctor import diagnose

    found = diagnose()
    if json_:
        print_json(found)
        return
    for key, value in found.items():
        say(f"{key:<14} {value}")


# What the system says of a path that a user gave.
_NAMES = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
          errno.EINVAL)  # fmt: skip


@functools.cache
def _commands() -> Any:
    """The commands with their options, read from the functions once."""
    return guarded(typer.main.get_command(app))


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
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.lastResort = LogLines(logging.WARNING)
    warnings.showwarning = lambda message, *rest, **named: complain(f"warning: {message}")
    try:
        with sigterm_ends():
            # of typer.Exit; None where a command just ends
            code = _commands().main(args=arguments, prog_name="mentalglm", standalone_mode=False)
        if code == 130:  # what newer versions of Typer make of Ctrl-C
            raise KeyboardInterrupt
    except Terminated:
        complain("mentalglm: stopped by SIGTERM; give the same command again (exit code 75)")
        raise
    except MentalGLMError as error:
        if debug:
            raise
        complain(f"mentalglm: {error}")
        sys.exit(error.exit_code)
    except OSError as error:  # of a path that no reader of ours came to: too long, not ours, a loop of links
        if debug:
            raise
        complain(f"mentalglm: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        sys.exit(2 if error.errno in _NAMES else 1)
    except (KeyboardInterrupt, typer.Abort) as error:
        if debug:
            raise
        if isinstance(error.__cause__, EOFError):  # which Typer takes for the end of what is typed
            complain(f"mentalglm: EOFError: {first_line(error.__cause__)} (--debug shows where)")
        else:
            complain("mentalglm: interrupted; what was finished is kept, the same command continues")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        show = getattr(error, "format_message", None)  # of Click's own errors
        if show is None or getattr(error, "exit_code", None) != 2:
            complain(f"mentalglm: {type(error).__name__}: {first_line(error)} (--debug shows where)")
            sys.exit(1)
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{show()}\n")
        else:
            complain(f"mentalglm: {usage(error, show())}")
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
