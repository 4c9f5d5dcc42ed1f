"""``probes``: every command is one library call.

Results go to stdout (``--json``: one JSON object and nothing else), progress and reasons to stderr. Exit codes: 0 done,
1 failed or interrupted, 2 bad usage or bad input, 3 done but for rows that cannot be probed, 75 stopped by SIGTERM. No
post and no explanation is ever printed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from probes.errors import ProbeError, ProbeInputError, ProbeWarning
from probes.files import write_jsonl
from probes.foreign import first_line, plain
from probes.known_cli import AsJson, add_known
from probes.terminal import (
    LINE,
    examples,
    guarded,
    print_comparison,
    print_json,
    print_pair,
    print_study,
    print_summary,
    print_written,
    progress,
    say,
    silence_loaders,
    tell,
    usage,
    warn,
)

_ROWS_REFUSED = 3
_INTERRUPTED = 130  # what typer returns, in place of raising, when a command was interrupted

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich would take "[probes]" in a help text for a style and leave it out
    context_settings={"max_content_width": 120},
)


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        say(f"probes, of mentalglm-jax {version('mentalglm-jax')}")
        raise typer.Exit
    return asked


@app.callback(epilog=examples("probes run MODEL --in generations.jsonl --out probed", "probes --install-completion"))
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Does the explanation say what the model used? Every command takes --debug for a traceback."""


def _bound(value: float | None) -> float | None:
    """Nothing is larger than NaN, so that nothing would fail."""
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"{value} is not a number from 0 on")
    return value


Model = Annotated[str, typer.Argument(help="Hugging Face model directory or Hub id", metavar="MODEL")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter over MODEL: directory or Hub id")]
Directory = Annotated[Path, typer.Argument(help="A directory that `probes run --out` wrote", metavar="DIR")]
Processes = Annotated[int, typer.Option(help="Processes on a CPU, a share of the posts each", min=1, max=64)]
Candidates = Annotated[Path | None, typer.Option(help='JSON file: {"label": "its sentence in an answer", ...}')]


@app.command(epilog=examples("probes rows ORG/NAME --in answered.jsonl --candidates labels.json --out rows.jsonl"))
def rows(
    model: Model,
    in_: Annotated[
        Path, typer.Option("--in", help="JSONL, .csv or .tsv: prompt (or messages), answer and post of each row")
    ],
    out: Annotated[Path, typer.Option(help="generations.jsonl to write")],
    candidates: Candidates = None,
    json_: AsJson = False,
) -> None:
    """Makes rows to probe of prompts (or conversations) and answers, with the model's tokenizer and chat template."""
    from probes.intake.rows import Reader, lay, read_candidates, read_records

    if out.exists():
        raise ProbeInputError(f"{out}: is there already; delete it, or give another --out")
    records, labels = read_records(in_), read_candidates(candidates)
    silence_loaders()
    laid = lay(Reader(model), records, labels)
    write_jsonl(out, laid.rows, private=True)
    _end_rows(laid.rows, laid.left_out, out, json_)


@app.command(
    epilog=examples(
        "probes answer ORG/NAME --in posts.jsonl --prompt prompt.jinja --candidates labels.json --out g.jsonl"
    )
)
def answer(
    model: Model,
    in_: Annotated[
        Path, typer.Option("--in", help="JSONL, .csv or .tsv with a post in each record, or .txt with one per line")
    ],
    prompt: Annotated[Path, typer.Option(help="Jinja template of what the model is asked, with {{ post }} in it")],
    out: Annotated[Path, typer.Option(help="generations.jsonl to write; an interrupted call continues in it")],
    text: Annotated[str, typer.Option(help="Key or column that holds the post", metavar="NAME")] = "post",
    adapter: Adapter = None,
    candidates: Candidates = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer", min=1)] = 256,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="torch device; auto takes a GPU when there is one")] = "auto",
    json_: AsJson = False,
) -> None:
    """Has a model answer every post greedily, and writes rows to probe."""
    from probes.intake.rows import Reader, lay, read_candidates, read_records
    from probes.intake.template import read_template

    records, labels = read_records(in_, text)[:limit], read_candidates(candidates)
    template = read_template(prompt)
    silence_loaders()
    from probes.intake.answer import answer as ask
    from probes.intake.answer import prompts
    from probes.probe import Probe

    reader = Reader(model)
    laid = lay(reader, prompts(reader, records, template, prompt), labels, answered=False)
    probe = Probe.from_pretrained(model, adapter=adapter, dtype=dtype, device=_place(device))
    with progress("answering") as advance:
        found = ask(probe, laid.rows, out, max_new_tokens, advance)
    _end_rows(found, laid.left_out, out, json_)


def _end_rows(found: Sequence[dict[str, Any]], left_out: Sequence[dict[str, str]], out: Path, json_: bool) -> None:
    """What a command that writes rows says at its end."""
    reasons = Counter(one["reason"] for one in left_out)
    print_written(found, reasons, out, json_)
    _end_refused(reasons, f"the others are in {out}")


@app.command(
    epilog=examples(
        "probes run runs/demo/base --adapter runs/demo/adapter --in runs/demo/generations.jsonl --out probed",
        "probes run ORG/NAME --in generations.jsonl --out probed --budget fast --limit 20",
    )
)
def run(
    model: Model,
    in_: Annotated[Path, typer.Option("--in", help="generations.jsonl: posts with what the model answered")],
    out: Annotated[Path, typer.Option(help="Directory for numbers and report; an interrupted run continues in it")],
    adapter: Adapter = None,
    budget: Annotated[str, typer.Option(help="fast (screening, no verdicts) | standard | full")] = "standard",
    limit: Annotated[int | None, typer.Option(help="Only the first N rows")] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Write no text of any post or explanation")] = False,
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="torch device; auto takes a GPU when there is one")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of bootstrap and tests")] = 0,
    max_memory: Annotated[float | None, typer.Option(callback=_bound, help="GiB for weights and batches")] = None,
    ask: Annotated[str, typer.Option(help="What is asked: explanation | reasoning (before the label)")] = "explanation",
    processes: Processes = 1,
    json_: AsJson = False,
) -> None:
    """Probes every row of a file: saliency, citations, checks, summary.json and report.html."""
    from probes.intake.rows import read_rows
    from probes.suite import prepare, run_suite

    # Before the model: a bad option or file should be said at once.
    prepare(out, budget, limit, redact, max_memory, ask)
    rows = read_rows(in_)
    silence_loaders()
    from probes.probe import Probe
    from probes.workers import workers

    place, memory = _place(device), None if max_memory is None else max_memory / processes
    options = {"in": in_, "out": out, "adapter": adapter, "budget": budget, "limit": limit, "dtype": dtype,
               "device": place, "seed": seed, "max-memory": memory, "ask": ask}  # fmt: skip
    same = [f"--{name}={value}" for name, value in options.items() if value is not None] + ["--redact"] * redact
    with workers(processes, ["run", *same, "--", model], place) as working, progress("probing posts") as advance:
        probe = Probe.from_pretrained(model, adapter=adapter, dtype=dtype, device=place)
        summary = run_suite(
            probe, rows, out, budget, limit, redact, advance, seed=seed, max_memory=memory, tell=tell, ask=ask,
            working=working,
        )  # fmt: skip
    if not summary:
        return  # not the first of several processes
    if json_:
        print_json({**summary, "report": str(out / "report.html")})
    else:
        print_summary(summary)
        say(f"report   {out / 'report.html'}")
    _end_refused(summary["skipped_by_reason"], f"the others are in {out}; its manifest.json names each")


@app.command(epilog=examples("probes demo", "probes demo --out first-look"))
def demo(
    out: Annotated[Path, typer.Option(help="Directory for numbers and reports")] = Path("probes-demo"),
    json_: AsJson = False,
) -> None:
    """Probes two tiny models that come with the package: one quotes its reason, the other does not. About a minute."""
    from probes.demo import MODELS, PAGE, prepare_demo
    from probes.demo import demo as probe_both

    prepare_demo(out)
    silence_loaders()
    with progress("probing posts") as advance:
        found = probe_both(out, advance)
    if json_:
        print_json({"models": found, "report": str(out / PAGE)})
        return
    print_pair([(quotes, found[name]) for name, quotes in MODELS.items()])
    say(f"report   {out / PAGE}")


@app.command(epilog=examples("probes check runs/demo/probes --against runs/demo/control/probes"))
def check(
    directory: Directory,
    against: Annotated[
        Path | None, typer.Option(help="A second run over the same posts, compared post by post")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Prints the numbers of a finished run; with --against, how often each check scores this run above the other."""
    from probes.results.store import read_run
    from probes.results.summary import compare

    with _finished(directory):
        first = read_run(directory)
        found = None if against is None else compare(first.results, read_run(against).results)
        if json_:
            print_json(first.summary | (found or {}))
            return
        print_summary(first.summary)
        if found is not None:
            print_comparison(found)


@app.command(epilog=examples("probes report runs/demo/probes --redact"))
def report(
    directory: Directory,
    out: Annotated[Path | None, typer.Option(help="File to write; default report.html in DIR")] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out all text; default file report.redacted.html")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Writes the HTML report of a finished run again."""
    from probes.report.page import refuse_replacing, write_report

    if out is not None:
        refuse_replacing(out)
    with _finished(directory):
        path = write_report(directory, out or directory / ("report.redacted.html" if redact else "report.html"), redact)
    if json_:
        print_json({"report": str(path)})
    else:
        say(f"report   {path}")


@app.command(
    epilog=examples("probes randomise runs/demo/base --adapter runs/demo/adapter --in runs/demo/generations.jsonl")
)
def randomise(
    model: Model,
    in_: Annotated[Path, typer.Option("--in", help="generations.jsonl: posts with what the model answered")],
    adapter: Adapter = None,
    limit: Annotated[int, typer.Option(help="The first N rows that have a label", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="torch device; auto takes a GPU when there is one")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the weights that are drawn")] = 0,
    draws: Annotated[int, typer.Option(help="Draws of the weights per post, averaged", min=1)] = 1,
    json_: AsJson = False,
) -> None:
    """Do the maps change when the model does? Weights drawn anew, top to bottom; adapter off or drawn anew."""
    from probes.models.encode import read_generations

    rows = [row for row in read_generations(in_) if row.get("label_text")][:limit]
    if not rows:
        raise ProbeInputError(f"{in_}: no row has a label to attribute (label_text is null in all of them)")
    silence_loaders()
    from probes.checks.randomise import study
    from probes.probe import Probe
    from probes.suite import lay_out

    # Not merged: an adapter that has become part of the weights cannot be switched off.
    probe = Probe.from_pretrained(model, adapter=adapter, dtype=dtype, merge=False, device=_place(device))
    examples, skipped = lay_out(probe, rows)
    probe.scorer.settle(examples)
    for said in probe.scorer.can.limits.values():
        tell(said)
    able = ("erase",) if probe.scorer.can.ungraded else ("ig", "erase")
    found = study(probe, examples, able, seed=seed, draws=draws)
    if json_:
        print_json(found)
    else:
        print_study(found)
    _end_refused(Counter(one["reason"] for one in skipped), skipped[0]["said"] if skipped else "")


@app.command(
    epilog=examples("probes rank runs/demo/base --adapter runs/demo/adapter --in candidates.jsonl --out pairs.jsonl")
)
def rank(
    model: Model,
    in_: Annotated[Path, typer.Option("--in", help="generations.jsonl with several answers to each post")],
    out: Annotated[Path, typer.Option(help="Pairs of a chosen and a rejected answer to write: .jsonl")],
    adapter: Adapter = None,
    by: Annotated[str, typer.Option(help="Families that must prefer the chosen: both | gradient | erasure")] = "both",
    margin: Annotated[float, typer.Option(callback=_bound, help="By how much of the label's saliency")] = 0.2,
    length_ratio: Annotated[float, typer.Option(callback=_bound, help="Of two answers in tokens, at most")] = 1.5,
    per_post: Annotated[int, typer.Option(help="Pairs of one post, at most", min=1)] = 4,
    maps: Annotated[Path | None, typer.Option(help="Directory that keeps the maps for a later call")] = None,
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="torch device; auto takes a GPU when there is one")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of what is put in place of clauses, and of the null", min=0)] = 0,
    processes: Processes = 1,
    json_: AsJson = False,
) -> None:
    """Which of several explanations cites what the label was made from? Pairs for preference training."""
    from probes.models.encode import read_generations
    from probes.ranking import Rules, refuse_replacing, told
    from probes.ranking import rank as write_pairs

    rules = Rules(by, margin, length_ratio, per_post)
    refuse_replacing(out)
    rows = read_generations(in_)
    silence_loaders()
    from probes.probe import Probe
    from probes.workers import workers

    place = _place(device)
    options = {"in": in_, "out": out, "adapter": adapter, "by": by, "margin": margin, "length-ratio": length_ratio,
               "per-post": per_post, "maps": maps, "dtype": dtype, "device": place, "seed": seed}  # fmt: skip
    same = [f"--{name}={value}" for name, value in options.items() if value is not None]
    with workers(processes, ["rank", *same, "--", model], place) as working, progress("ranking posts") as advance:
        probe = Probe.from_pretrained(model, adapter=adapter, dtype=dtype, device=place)
        found = write_pairs(probe, rows, out, rules, maps, advance, seed, working)
        for said in probe.scorer.can.limits.values() if found else ():
            tell(said)
    if not found:
        return  # not the first of several processes
    if json_:
        print_json({**found, "out": str(out)})
    else:
        say(f"{out}: {told(found)}")
    _end_refused(found["skipped_by_reason"], "the others were ranked")


@app.command(epilog=examples("probes verify runs/demo/merged --reference runs/demo/reference_logits.npz"))
def verify(
    model: Model,
    reference: Annotated[
        Path | None, typer.Option(help="reference_logits.npz that the export left; without it MODEL is only opened")
    ] = None,
    adapter: Adapter = None,
    tolerance: Annotated[float | None, typer.Option(callback=_bound, help="Fail when a logit differs by more")] = None,
    json_: AsJson = False,
) -> None:
    """Reloads an export with transformers and PEFT and compares logits and greedy answers with the trainer's."""
    silence_loaders()
    from probes.models.verify import reopen
    from probes.models.verify import verify as compare_with_reference

    if reference is None:
        if adapter is not None or tolerance is not None:
            raise ProbeInputError(
                "--adapter and --tolerance need --reference: what should the logits be compared with?"
            )
        opened = reopen(model)
        if json_:
            print_json(opened)
        else:
            say(f"{model}: transformers opens it, {opened['tensors']} tensors, {opened['parameters']:,} parameters")
        return
    found = compare_with_reference(model, adapter, reference)
    if json_:
        print_json(found)
    else:
        say(f"max |Δ logit| {found['max_abs_logit_diff']:.2e} (largest logit {found['max_abs_logit']:.1f})")
        apart = f", others part where two logits are {found['greedy_gap']:.1e} apart"
        same, of = found["greedy_identical"], found["greedy_total"]
        say(f"greedy answers identical: {same} of {of}{apart * (same < of)}")
    if tolerance is not None and found["max_abs_logit_diff"] > tolerance:
        raise ProbeError(
            f"max |Δ logit| {found['max_abs_logit_diff']:.2e} is above {tolerance:.2e}: not the same model"
        )


add_known(app)


def _place(device: str) -> str:
    """The torch device; under `accelerate launch` one GPU per process."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    return (f"cuda:{local}" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _end_refused(skipped: Mapping[str, int], then: str) -> None:
    """What could be done is done and saved; rows that could not make an exit code of their own. An answer without a
    label is a result of the model, and makes none."""
    from probes.results.store import in_words
    from probes.suite import NO_LABEL

    refused = {reason: count for reason, count in skipped.items() if reason != NO_LABEL}
    if refused:
        _fail(f"rows that cannot be probed: {in_words(refused)}; {then}", _ROWS_REFUSED)


def _fail(reason: str, code: int) -> NoReturn:
    sys.stderr.write(f"probes: {plain(reason.strip().splitlines()[0] if reason.strip() else 'failed', LINE)}\n")
    sys.exit(code)


@contextlib.contextmanager
def _finished(directory: Path) -> Iterator[None]:
    """A run directory can be whole and still not be what this version wrote: crafted, or by another program."""
    from jinja2 import TemplateError  # of a page that meets a value which is not there

    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, TemplateError) as error:
        raise ProbeInputError(
            f"{directory}: holds no run as this version writes it ({first_line(error)}); run it again"
        ) from error


@functools.cache
def _commands() -> Any:
    return guarded(typer.main.get_command(app))  # read from the functions once


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: turns every error into one line on stderr and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        # A scheduler stops a job with SIGTERM; like Ctrl-C, it must not cost what is done.
        signal.signal(signal.SIGTERM, stop)
    for stream in (sys.stdout, sys.stderr):  # a locale without our characters must not cost the result
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not debug:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ProbeWarning)
        warnings.showwarning = warn
    try:
        words = [word for word in given if word != "--debug"]
        code = _commands().main(args=words, prog_name="probes", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        if isinstance(error.__cause__, EOFError):  # which Typer takes for the end of what is typed
            error = error.__cause__
        show = getattr(error, "format_message", None)  # click's own errors: unknown option, missing argument
        if isinstance(error, ProbeError):
            _fail(str(error), error.exit_code)
        elif type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{show() if callable(show) else ''}\n")
            sys.exit(2)
        elif callable(show):
            _fail(usage(error, str(show())), 2)
        elif isinstance(error, OSError) and error.filename is not None:  # a path too long, another's, a loop of links
            _fail(f"{error.filename}: {error.strerror}", 2)
        else:
            _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        # 75: "try again", which a scheduler's loop can tell from a failure
        _fail("interrupted; finished posts are kept, the same command continues", 75 if told else 1)
    if isinstance(code, int) and code:
        sys.exit(code)
