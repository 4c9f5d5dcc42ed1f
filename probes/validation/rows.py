"""One line of the table that validation prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def row(name: str, what: str, value: float, bound: float | None = None, side: str = "<=") -> Row:
    """One line of the table; without a bound it is information. ``side``: on which side of the bound is right."""
    ok = bound is None or bool(value <= bound if side == "<=" else value >= bound)
    return {"id": name, "what": what, "value": float(value), "bound": bound, "side": side, "ok": ok}


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| id | what | value | bound | |", "|---|---|---|---|---|"]
    for one in rows:
        bound = "information" if one["bound"] is None else f"{one.get('side', '<=')} {one['bound']:.2g}"
        what = one["what"].replace("|", "\\|")
        word = "ok" if one["ok"] else "**FAILED**"
        lines.append(f"| {one['id']} | {what} | {one['value']:.3g} | {bound} | {word} |")
    return lines


def false_alarms(count: int, least: float = 0.075) -> float:
    """Bound for the share of ``count`` null draws in which a test at 0.05 finds something: ``least``, or, of so few
    draws, what a right test exceeds once in five hundred rows."""
    from scipy.stats import binom

    return max(least, float(binom.ppf(0.998, count, 0.05)) / count)
