"""Commands of ``probes`` that measure where the truth is known: ``selftest``, ``validate``, ``leaderboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probes.files import write_text
from probes.terminal import examples, print_leaderboard, print_rows, progress, silence_loaders, tell

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else")]


def add_known(app: typer.Typer) -> None:
    """Adds the commands to ``probes``."""
    app.command(epilog=examples("probes selftest"))(selftest)
    app.command(epilog=examples("probes validate --quick"))(validate)
    more = ("probes leaderboard --out board --docs docs/leaderboard.md",
            "probes leaderboard --out board --metric my_package.metrics:length")  # fmt: skip
    app.command(epilog=examples(*more))(leaderboard)


def selftest(json_: AsJson = False) -> None:
    """Checks the engine on models with known answers, with the versions installed here; exit code 1 if one fails."""
    silence_loaders()
    from probes.validation.selftest import selftest as measure

    with progress("checking") as advance:
        advance(0, 1)
        found = measure()
        advance(1, 1)
    print_rows("Checks with known answers", found, json_)


def validate(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what trains models: 3 CPU minutes, not 62")] = False,
    seed: Annotated[int, typer.Option(help="Another seed plants other models and posts")] = 0,
    docs: Annotated[Path | None, typer.Option(help="Write the table as a Markdown page, too")] = None,
    json_: AsJson = False,
) -> None:
    """Experiments whose truth is known: planted models, error rates, power, aligner; exit code 1 if one fails."""
    silence_loaders()
    from probes.validation import validate as known

    rows = known.validate(quick, seed, tell)
    if docs is not None:
        write_text(docs, known.page(rows, quick, seed))
    print_rows("Validation", rows, json_)


def leaderboard(
    out: Annotated[Path, typer.Option(help="Where models and results are kept; the same call goes on from there")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric of your own, MODULE:FUNCTION of what is installed (repeatable)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed plants other models and posts", min=0)] = 0,
    docs: Annotated[Path | None, typer.Option(help="Write the table as a Markdown page, too")] = None,
    json_: AsJson = False,
) -> None:
    """Which metrics of faithfulness tell true explanations from untrue ones? Trains 32 models: 20 CPU minutes."""
    silence_loaders()
    from probes.validation.metrics import metric_named

    extra = [metric_named(name) for name in metric or ()]
    from probes.validation import board_page, soft
    from probes.validation import leaderboard as board

    lines = board.leaderboard(extra, out, seed, tell)
    if docs is not None:
        named = "".join(f" --metric {name}" for name in metric or ())
        command = f"probes leaderboard --out DIR{named}{f' --seed {seed}' if seed else ''} --docs {docs.as_posix()}"
        board_page.write_page(docs, lines, soft.soft_maps(seed), board.soft_table(out, seed), command)
    print_leaderboard(lines, json_)
