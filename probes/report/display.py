"""What a notebook shows of our objects: safe whatever a post contains, complete without a network.

A map or a report becomes a small table with inline styles and no script. What holds text (a post, a run) becomes the
report page in an ``iframe`` that may run the page's own script but has no origin: it cannot reach the notebook around
it, its cookies or its kernel.
"""

from __future__ import annotations

import functools
from html import escape
from typing import Any

import numpy as np

from probes.records import Attribution, Report
from probes.report import overview, view
from probes.report.page import render, render_post
from probes.results.posts import PostResult
from probes.results.store import Run, Suite

_BOX = (
    "font: 14px/1.5 system-ui, sans-serif; border: 1px solid #8888; border-radius: 8px; padding: 12px 16px; "
    "max-width: 860px"
)
_CELL = "text-align: right; padding: 2px 14px 2px 0; font-variant-numeric: tabular-nums"
_WORD = "text-align: left; padding: 2px 14px 2px 0"
_BLUE, _ORANGE = "#1b5e9e", "#d55e00"


@functools.singledispatch
def html(value: Any) -> str | None:
    """The HTML of one of our objects; None where there is none, so that a notebook shows its ``repr``."""
    return None


@html.register
def attribution_html(a: Attribution) -> str:
    """A map without its text, which it does not hold: one bar per unit along the post, and what it rests on."""
    n = max(len(a.char_values), 1)
    top = float(np.abs(a.values[np.isfinite(a.values)]).max(initial=0.0)) or 1.0
    bars = []
    for (start, end), value in zip(a.unit_spans, a.values, strict=True):
        if not np.isfinite(value):
            continue
        height = 28 * abs(float(value)) / top
        y, fill = (30 - height, _BLUE) if value >= 0 else (30.0, _ORANGE)
        width = max(end - start - 0.1, 0.5)
        title = f"{start}–{end}: {overview.number(float(value), 3)}"
        bars.append(
            f'<rect x="{start}" y="{y:.2f}" width="{width:g}" height="{height:.2f}" fill="{fill}">'
            f"<title>{escape(title)}</title></rect>"
        )
    facts = [f"score {overview.number(a.f_input)}, {overview.number(a.f_baseline)} without the post ({a.baseline})"]
    if a.rel_delta is not None:
        facts.append(f"completeness error {view.percent(a.rel_delta)}{'' if a.converged else ', not converged'}")
    facts.append(f"{a.n_fwd} forward and {a.n_bwd} backward passes")
    head = f"{view.METHOD_NAMES.get(a.method, a.method)} for the {a.target}, post {a.example_id}"
    label = f"{len(a.values)} units; blue above speaks for, orange below against"
    return (
        f'<div style="{_BOX}"><strong>{_text(head)}</strong>'
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {n} 60" preserveAspectRatio="none" '
        f'style="display: block; width: 100%; height: 72px; margin: 8px 0">{"".join(bars)}'
        f'<line x1="0" x2="{n}" y1="30" y2="30" stroke="#8888" stroke-width="0.5"/></svg>'
        f'<span style="opacity: 0.75">{_text("; ".join(facts))}. One bar per {_text(a.unit)}, nats.</span></div>'
    )


@html.register
def report_html(report: Report) -> str:
    """Verdict, notes and every check with its null."""
    rows = []
    for c in report.checks:
        null = "" if c.null_q05 is None else f"{overview.number(c.null_q05)} to {overview.number(c.null_q95)}"
        name = c.name.replace("_", " ") + ("" if c.status == "ok" else f" ({c.status.replace('_', ' ')})")
        numbers = (overview.number(c.value), overview.number(c.null_mean), null, overview.number(c.p, 3), str(c.n))
        cells = "".join(f'<td style="{_CELL}">{_text(value)}</td>' for value in numbers)
        words = "".join(f'<td style="{_WORD}">{_text(word)}</td>' for word in (name, c.method))
        rows.append(f"<tr>{words}{cells}</tr>")
    heads = ("Check", "Method", "Value", "Null", "Null 5–95%", "p", "n")
    head = "".join(f'<th style="{_WORD if i < 2 else _CELL}">{word}</th>' for i, word in enumerate(heads))
    notes = "".join(f"<li>{_text(note)}</li>" for note in report.notes)
    return (
        f'<div style="{_BOX}"><strong>{_text(report.example_id)}: {_text(report.verdict)}</strong>'
        f'<ul style="margin: 4px 0; padding-left: 20px">{notes}</ul>'
        f'<table style="border-collapse: collapse"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )


@html.register
def post_html(result: PostResult) -> str:
    """The card of the report, to point at and to switch."""
    return _frame(render_post(result), 760, f"Explanation check of post {result.id}")


@html.register
def run_html(run: Run) -> str:
    """The report of the run with its twenty most suspicious posts."""
    return _frame(render(run, max_cards=20), 860, "Explanation check of a run")


@html.register
def suite_html(suite: Suite) -> str | None:
    """The report of the run that the suite wrote."""
    return run_html(suite.run)


def _frame(page: str, height: int, title: str) -> str:
    return (
        f'<iframe sandbox="allow-scripts" title="{_text(title)}" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: {height}px; border: 1px solid #8888; border-radius: 8px"></iframe>'
    )


def _text(value: Any) -> str:
    return escape(view.plain(value))
