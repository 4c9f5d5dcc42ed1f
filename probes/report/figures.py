"""Figures for papers: vector PDF with real letters, a palette that survives colour blindness and grey print.

Every function returns a ``Figure`` of its own and leaves matplotlib's global state alone; ``save`` writes it. Post text
is drawn only where a font on this machine has its characters (``docs/report.md`` names them); otherwise, and in a
redacted result, clauses go by their numbers.
"""

from __future__ import annotations

import functools
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.checks.crosscheck import unit_sums
from probes.checks.verdict import FAMILIES
from probes.errors import ProbeError
from probes.report import view
from probes.results.posts import PostResult
from probes.results.store import Run
from probes.results.summary import check_of

# Okabe and Ito (2008).
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
_VERDICTS = {"supported": (BLUE, "o"), "inconclusive": (GREY, "o"), "contradicted": (ORANGE, "D")}
# One with Chinese, Japanese and Korean letters is taken from these, the first that is installed.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
)
_WIDTH = 6.3  # inches: the text width of A4 and letter paper with usual margins


class Shown(Figure):
    """A figure that a notebook shows by itself; matplotlib's own needs pyplot, whose state is global."""

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.savefig(sink, format="png", dpi=130, bbox_inches="tight")
        return sink.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure; the ending chooses the format. In PDF and SVG text stays text, to be searched and edited.

    Raises:
        ProbeError: the format is unknown or the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # No date in the file: the same run gives the same bytes.
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(Path(path).suffix[1:].lower())
        with mpl.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "probes"}):
            figure.savefig(path, dpi=300, bbox_inches="tight", metadata=dated)
    except (OSError, ValueError) as error:
        raise ProbeError(f"{path}: cannot write the figure ({error})") from error
    return Path(path)


def headline(runs: Run | Mapping[str, Run]) -> Figure:
    """Share of the label's saliency in the cited words: one row per method and run, a dot per post, mean, 95 %, null.

    Args:
        runs: one run, or several by name to stand under each other.
    """
    named = {"": runs} if isinstance(runs, Run) else dict(runs)
    rows = [
        (name, run, method)
        for method in dict.fromkeys(m for run in named.values() for m in run.summary["mass_ratio"])
        for name, run in named.items()
        if run.summary["mass_ratio"].get(method) is not None
    ]
    figure, axes = _figure(0.8 + 0.45 * max(len(rows), 1))
    for row, (_, run, method) in enumerate(rows):
        y, summary = len(rows) - row, run.summary
        evidence = run.evidence or tuple(result.evidence() for result in run.results)
        for i, one in enumerate(evidence):
            check = check_of(one, "mass_ratio", method)
            if check is None or check.status != "ok" or check.value is None:
                continue
            colour, marker = _VERDICTS[one.report.verdict]
            at = y + 0.3 * (i * 0.618034 % 1.0 - 0.5)
            axes.plot(check.value, at, marker, ms=3.2, color=colour, alpha=0.55, mew=0, zorder=2)
        if summary["mass_ratio_ci"][method]:
            axes.plot(summary["mass_ratio_ci"][method], [y, y], color=INK, lw=1.6, zorder=3)
        axes.plot(summary["mass_ratio"][method], y, "o", ms=6, color=INK, mec="white", mew=0.8, zorder=4)
        null = summary["mass_ratio_null"][method]
        axes.plot([null, null], [y - 0.32, y + 0.32], color=INK, lw=0.9, ls=(0, (2, 2)), zorder=3)
    labels = [
        f"{view.METHOD_NAMES.get(m, m)}{f' · {name}' if name else ''}{'' if m in FAMILIES else ' (screening)'}"
        for name, _, m in rows
    ]
    axes.set_yticks(range(len(rows), 0, -1), labels)
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of the label's saliency in the cited words (dashed: their share of the length)")
    return figure


def clauses(result: PostResult, method: str = "ig") -> Figure:
    """Mirror bars per clause: label left, explanation right, in nats; cited clauses in bold with a mark.

    Raises:
        ProbeError: the post has no such map.
    """
    maps = {a.target: a for a in result.attributions if a.method == method and not a.target.startswith("explanation[")}
    if not maps:
        raise ProbeError(f"{result.id}: no map by {method!r}")
    cited = result.evidence(n_boot=0).cited
    k = len(result.units)
    figure, left = _figure(0.9 + 0.28 * k, columns=2)
    for axes, target in zip(left, ("label", "explanation"), strict=True):
        if target in maps:
            values = unit_sums(maps[target].char_values, result.units)
            colours = [BLUE if value >= 0 else ORANGE for value in values]
            bars = axes.barh(range(k, 0, -1), values, height=0.62, color=colours)
            for bar, value in zip(bars, values, strict=True):
                bar.set_hatch("" if value >= 0 else "////")
                bar.set_edgecolor("white")
        axes.axvline(0, color=INK, lw=0.6)
        axes.set_xlabel(f"{view.METHOD_NAMES.get(method, method)}, {target} (nats)")
        axes.set_ylim(0.4, k + 0.6)
    left[0].invert_xaxis()
    left[0].set_yticks(range(k, 0, -1), _names(result, cited))
    left[1].set_yticks([])
    for text, bold in zip(left[0].get_yticklabels(), cited, strict=True):
        text.set_fontweight("bold" if bold else "normal")
    return figure


def erasure(result: PostResult) -> Figure:
    """Change of the log-odds: each clause hidden alone, the cited words hidden, only they left; grey: the null's 90 %.

    Raises:
        ProbeError: the post has no erasure map on clauses.
    """
    strip = view.erasure(result, result.evidence(n_boot=0))
    if strip is None:
        raise ProbeError(f"{result.id}: no erasure map on clauses")
    names = ["each clause hidden alone", *(row["name"] for row in strip["rows"])]
    figure, axes = _figure(0.7 + 0.4 * len(names))
    for dot in strip["dots"]:
        fill = {"color": BLUE} if dot["cited"] else {"mfc": "white", "mec": GREY}
        axes.plot(dot["value"], len(names), "o", ms=6, **fill)
    for at, row in zip(range(len(names) - 1, 0, -1), strip["rows"], strict=True):
        if row["band"]:
            axes.barh(at, row["band"][1] - row["band"][0], left=row["band"][0], height=0.5, color="#DDDDDD")
        axes.plot(row["value"], at, "o", ms=6, color=BLUE)
    axes.axvline(0, color=INK, lw=0.9, ls=(0, (2, 2)))
    axes.set_yticks(range(len(names), 0, -1), names)
    axes.set_ylim(0.4, len(names) + 0.6)
    axes.set_xlabel("change of the label's log-odds (filled: cited)")
    return figure


def randomisation(values: Mapping[str, Sequence[float]], xlabel: str, chance: float | None = None) -> Figure:
    """One row per condition, a dot per post and the mean: for comparisons such as adapter on, off, drawn anew."""
    figure, axes = _figure(0.7 + 0.42 * max(len(values), 1))
    for at, found in zip(range(len(values), 0, -1), values.values(), strict=True):
        finite = [value for value in found if np.isfinite(value)]
        for i, value in enumerate(finite):
            axes.plot(value, at + 0.3 * (i * 0.618034 % 1.0 - 0.5), "o", ms=3.2, color=BLUE, alpha=0.55, mew=0)
        if finite:
            axes.plot(np.mean(finite), at, "o", ms=6, color=INK, mec="white", mew=0.8)
    if chance is not None:
        axes.axvline(chance, color=INK, lw=0.9, ls=(0, (2, 2)))
    axes.set_yticks(range(len(values), 0, -1), list(values))
    axes.set_ylim(0.4, len(values) + 0.6)
    axes.set_xlabel(xlabel)
    return figure


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    with mpl.rc_context({"font.family": list(_fonts()), "font.size": 8, "axes.linewidth": 0.6}):
        figure = Shown(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(1, columns)
        for one in np.atleast_1d(axes):
            _plain(one)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


@functools.cache
def _fonts() -> tuple[str, ...]:
    """DejaVu Sans, which comes with matplotlib, and the first installed font with Han characters."""
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1])


def _names(result: PostResult, cited: np.ndarray) -> list[str]:
    """Names of the clauses: their beginning where it can be drawn, else their number."""
    found = []
    for i, ((a, b), mark) in enumerate(zip(result.units, cited, strict=True), start=1):
        text = None if result.post is None else "".join(result.post[a:b].split("\n")).strip()
        name = text if text and _drawable(text) else f"clause {i}"
        wide = 14 if any(unicodedata.east_asian_width(char) in "WF" for char in name) else 28
        name = name if len(name) <= wide else name[: wide - 1] + "…"
        found.append(("▸ " if mark else "") + name.replace("$", r"\$"))
    return found


def _drawable(text: str) -> bool:
    """Whether some font has every character and none of them is a control or a direction mark."""
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in _fonts()]
    plain = all(unicodedata.category(char)[0] != "C" for char in text)
    return plain and all(any(font.get_char_index(ord(char)) for font in fonts) for char in text)
