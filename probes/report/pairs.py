"""Swap pairs (``probes.checks.swaps``) in the report: their numbers, and one line per pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probes.report import view
from probes.report.view import number


def redacted(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary in which pairs have numbers: the id of one is its author's own words."""
    if not (swaps := summary.get("swaps")):
        return summary
    each = [one | {"pair": f"pair {at}"} for at, one in enumerate(swaps.get("each") or ())]
    return summary | {"swaps": swaps | {"each": each}}


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, note) of the swap pairs."""
    whole, found = summary.get("swaps"), []
    if whole is None:
        return found
    found.append(("Labels that turn with a swapped phrase", f"{whole['turned']} of {whole['n']}",
                  f"pairs; it moves {number(whole['moved'])} nats on average"))  # fmt: skip
    for m, one in whole["by_method"].items():
        note = f"by chance {view.percent(one['share_null'])}; what they say against what the label does: cosine "
        note += f"{number(one['cosine'])}, {number(one['slope'])} nats per nat; {one['n']} pairs"
        note += "".join(f"; {count} left out: {why}" for why, count in one.get("left_out", {}).items())
        title = f"Difference of swapped posts' maps at the phrase, {view.METHOD_NAMES[m]}"
        found.append((title, view.percent(one["share"]), note))
    return found


def table(summary: Mapping[str, Any], anchors: Mapping[str, str | None]) -> dict[str, Any]:
    """The swap pairs one by one, as ``rows``: their posts with their cards, what the label does and what the map of
    each of ``methods`` says of it.

    Args:
        anchors: id of a post -> its card, None where it has none.
    """
    found = []
    for one in (summary.get("swaps") or {}).get("each") or ():
        says = {}
        for method, by in one["by_method"].items():
            if "left_out" in by:
                says[method] = by["left_out"]
            else:
                at = "" if by["share"] is None else f", {view.percent(by['share'])} at the phrase"
                says[method] = f"{view.signed(by['said'])}{at}"
        found.append(
            {
                "pair": view.plain(str(one["pair"])),
                "posts": [(view.plain(str(name)), anchors.get(name)) for name in one["posts"]],
                "label": "–" if one["turned"] is None else "turns" if one["turned"] else "stays",
                "moved": view.signed(one["moved"]),
                "says": says,
            }
        )
    return {"rows": found, "methods": list(dict.fromkeys(method for row in found for method in row["says"]))}
