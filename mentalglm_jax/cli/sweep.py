"""``mentalglm sweep``: many runs of one recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mentalglm_jax.cli.options import AsJson, Overrides, TaskFile, naming
from mentalglm_jax.cli.output import cell, print_json, say


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe that all runs share")],
    grid: Annotated[list[str], typer.Option(help="A key and its values: --grid train.learning_rate=1e-4,3e-4 "
                                                 "(repeatable: every combination)")] = [],  # noqa: B006
    search: Annotated[str | None, typer.Option(help="optuna:N: N combinations that Optuna proposes, by the development "
                                                    "score of those before; with --space instead of --grid")] = None,
    space: Annotated[list[str], typer.Option(help="A key and where it lies: --space train.learning_rate=log:1e-5:1e-3, "
                                                  "int:LOW:HIGH, float:LOW:HIGH or values (repeatable)")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every combination, counted from the recipe's seed")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; each takes all devices it sees")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory of all runs; default: the recipe's run_dir with "
                                                  "-sweep")] = None,
    set_: Overrides = [],  # noqa: B006
    tasks: TaskFile = None,
    print_: Annotated[bool, typer.Option("--print", help="Only print the commands, one line a run, for several "
                                                         "hosts; the same sweep then collects them")] = False,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Trains and evaluates a recipe with every combination of values and seeds. The same command goes on where it
    stopped; a run that fails stops no other. Exit code 1: one failed."""
    from mentalglm_jax.errors import InputError
    from mentalglm_jax.pipeline import sweep as sweeps
    from mentalglm_jax.pipeline.search import read_spaces
    from mentalglm_jax.pipeline.search import search as propose

    errors, given = Console(stderr=True), [*set_, *naming(tasks)]
    if search is not None:
        program, _, trials = search.partition(":")
        if program != "optuna" or not trials.isdecimal() or not 1 <= int(trials) <= sweeps.MOST_POINTS:
            raise InputError(f"--search {search[:100]}: write it as optuna:N, N from 1 to {sweeps.MOST_POINTS}")
        if grid or print_:
            raise InputError(f"--search and {'--grid' if grid else '--print'} do not go together: what is tried next "
                             "depends on what was found")  # fmt: skip
        directory, result = propose(recipe, read_spaces(space), int(trials), seeds=seeds, out=out, overrides=given,
                                    jobs=jobs, say=lambda line: say(line, errors))  # fmt: skip
    else:
        if space:
            raise InputError("--space goes with --search")
        directory, points = sweeps.make_points(recipe, grid, seeds, out, given)
        if print_:
            for line in sweeps.printed_commands(points, recipe):
                say(line)
            return
        result = sweeps.sweep(recipe, directory, points, jobs=jobs, say=lambda line: say(line, errors))
    print_json(result) if json_ else say(sweep_table(result["table"]))
    if not json_:
        say(f"runs   {directory}\ntests  mentalglm leaderboard {directory}/*/seed-*")
    if any(row["state"] == "failed" for row in result["points"]):
        raise typer.Exit(1)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Mean ± standard deviation over the seeds of every combination."""
    table = Table(title="Sweep", title_justify="left", show_edge=False, header_style="bold")
    measures = list(dict.fromkeys(name for row in rows for name in row["development"]))
    tasks = list(dict.fromkeys(name for row in rows for name in row["weighted_f1"]))
    table.add_column("values")
    for name in ("runs", *(f"development {name}" for name in measures), *(f"{task} weighted F1" for task in tasks)):
        table.add_column(cell(name), justify="right")
    for row in rows:
        runs = f"{row['runs']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        scores = [row["development"].get(name) for name in measures]
        scores += [row["weighted_f1"].get(task) for task in tasks]
        table.add_row(cell(row["name"]), runs, *map(_shown, scores))
    return table


def _shown(score: Sequence[float | None] | None) -> str:
    if score is None:
        return "–"
    return f"{score[0]:.3f}" + ("" if score[1] is None else f" ± {score[1]:.3f}")
