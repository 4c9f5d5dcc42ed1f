"""Tables that the ``probes`` command prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

# Of the report's facts, those that the terminal tells as well.
_TOLD = ("Labels given", "Mean |log-odds| of the label", "Label scores that are no plain contrast",
         "Labels in other words", "Tokens at the ends not varied", "Posts cut into", "Rows left out",
         "Swap pairs left out")  # fmt: skip


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


def summary(summary: Mapping[str, Any]) -> Table:
    """The numbers of a run."""
    from probes.report.view import interval, p_value, percent

    table = Table(title=f"{summary['n']} posts: {summary['conclusion']}", title_justify="left", show_edge=False)
    for name, side in (("", "left"), ("value", "right"), ("95 %", "right"), ("beside", "left")):
        table.add_column(name, justify=side, no_wrap=name in ("", "value"))  # type: ignore[arg-type]
    for method, value in summary["mass_ratio"].items():
        p = p_value(summary["p_holm"].get(method), "p (Holm)")
        beside = f"by length {percent(summary['mass_ratio_null'][method])}, {p}"
        name = f"label saliency in cited words ({method})"
        table.add_row(name, percent(value), interval(summary["mass_ratio_ci"][method]), beside)
    for method, value in summary["cue_auroc"].items():
        if value is not None:
            table.add_row(f"planted cues found, AUROC ({method})", f"{value:.3f}", "", "chance 0.5")
    from probes.report import pairs
    from probes.report.overview import facts

    for title, value, note in facts(summary):
        if title in _TOLD:
            table.add_row(title[0].lower() + title[1:], value, "", note)
    for title, value, note in pairs.facts(summary):
        table.add_row(title[0].lower() + title[1:], value, "", note)
    quotes = f"of {summary['n_quotes']} quotes"
    table.add_row("quotes that are not in the post", percent(summary["fabricated_quote_rate"]), "", quotes)
    table.add_row("explanations that cite nothing", str(summary["abstained"]), "", "")
    if summary.get("cut_off"):
        table.add_row("answers cut off by the token limit", str(summary["cut_off"]), "", "")
    for name, count in summary["verdicts"].items():
        chance = summary["verdicts_by_chance"].get(name)
        table.add_row(name, str(count), "", "" if chance is None else f"{chance:.1f} expected from random citations")
    return table
