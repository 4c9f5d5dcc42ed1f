"""Tables that the ``probes`` command prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def study(found: Mapping[str, Any]) -> Table:
    """What ``probes randomise`` found."""
    from probes.report.overview import randomisation

    table = Table(title=f"{found['n']} posts, maps on clauses", title_justify="left", show_edge=False)
    for name, side in (("drawn anew", "left"), ("method", "left"), ("r with the real map", "right"),
                       ("AUROC of marked cues", "right")):  # fmt: skip
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in randomisation(found):
        table.add_row(row["what"], row["method"], row["r"], row["cue"])
    return table


def comparison(found: Mapping[str, Any]) -> Table:
    """What ``probes check --against`` found."""
    table = Table(title=f"{found['n_pairs']} pairs of posts", title_justify="left", show_edge=False)
    for name, side in (("P(this run scores higher)", "left"), ("value", "right"), ("95 %", "right"), ("n", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for name, methods in found["by_check"].items():
        for method, one in methods.items():
            if one is not None:
                ci = f"{one['ci'][0]:.2f}–{one['ci'][1]:.2f}"
                table.add_row(f"{name.replace('_', ' ')} ({method})", f"{one['value']:.3f}", ci, str(one["n"]))
    return table
