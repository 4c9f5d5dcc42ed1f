"""``mentalglm leaderboard``: several evaluated runs in one table."""

from pathlib import Path
from typing import Annotated

import typer

from mentalglm_jax.cli.options import AsJson, TaskFile, make_known
from mentalglm_jax.cli.output import print_json, say


def leaderboard(
    runs: Annotated[list[Path], typer.Argument(help="evaluation.json files, or directories that hold one")],
    format_: Annotated[str | None, typer.Option("--format", help="markdown | csv | latex | json; default: what the "
                                                                 "name of --out says, or markdown")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write this file (.md, .csv, .tex, .json)")] = None,
    tasks: TaskFile = None,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """One table over several evaluated runs, beside floors and, marked as such, published figures. Runs that differ
    only in their seed are one row: mean and standard deviation. Paired tests compare each row with the best."""
    from mentalglm_jax.errors import InputError
    from mentalglm_jax.evaluate.leaderboard import FORMATS, formatted, leaderboard_rows
    from mentalglm_jax.files import working_on, write_text

    by_name = {".csv": "csv", ".tex": "latex", ".json": "json"}
    form = format_ or by_name.get("" if out is None else out.suffix, "markdown")
    if form not in FORMATS:
        raise InputError(f"--format {form!r} is not one of {', '.join(FORMATS)}")
    make_known(tasks)
    rows = leaderboard_rows(runs)
    if out is not None:
        with working_on(out):
            write_text(out, formatted(rows, form))
    print_json(rows) if json_ else say(formatted(rows, form).rstrip("\n"))
