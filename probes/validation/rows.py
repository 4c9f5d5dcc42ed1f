"""One line of the table that validation prints."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def row(name: str, what: str, value: float, bound: float | None = None, side: str = "<=") -> Row:
    """One line of the table; without a bound it is information. ``side``: on which side of the bound is right."""
    ok = bound is None or bool(value <= bound if side == "<=" else value >= bound)
    return {"id": name, "what": what, "value": float(value), "bound": bound, "side": side, "ok": ok}
