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
    more = ("probes leaderboard --docs docs/leaderboard.md", "probes leaderboard --worlds 1")
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
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what trains models: 2 CPU minutes, not 20")] = False,
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
    worlds: Annotated[int | None, typer.Option(help="Only the first N worlds of each setting", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Another seed plants other models and posts", min=0)] = 0,
    docs: Annotated[Path | None, typer.Option(help="Write the table as a Markdown page, too")] = None,
    json_: AsJson = False,
) -> None:
    """Which metrics of faithfulness tell true explanations from untrue ones? Trains planted models; takes long."""
    silence_loaders()
    from probes.validation import leaderboard as board

    lines = board.leaderboard(worlds=worlds, seed=seed, say=tell)
    if docs is not None:
        board.write_page(docs, lines, worlds, seed)
    print_leaderboard(lines, json_)
