"""``report.html``: one file that works from disk without a network, safe to open whatever the posts contain.

Everything is escaped by Jinja2; style and script are inline and named by hash in a Content-Security-Policy that allows
nothing else, so markup in a post could not run even if it got through.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probes.checks.crosscheck import Evidence
from probes.checks.verdict import FAMILIES
from probes.errors import ProbeInputError
from probes.files import write_text
from probes.foreign import begins
from probes.report import overview, pairs, view
from probes.results.posts import PostResult
from probes.results.store import Run, Suite, read_run, short_name

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_CARDS = 200
_PAGE = b"<!doctype html>"


def write_report(
    suite: str | Path | Run | Suite, path: str | Path, redact: bool = False, max_cards: int = MAX_CARDS
) -> Path:
    """Writes the report of a finished run as one HTML file.

    Args:
        suite: the run directory, a ``Run``, or what ``run_suite`` returned.
        redact: leave out every word of posts and explanations: offsets and scores only.
        max_cards: posts shown in full, the most suspicious first; the table always lists all, and the page says so.

    Returns:
        ``path``.

    Raises:
        ProbeInputError: not a finished run directory.
        ProbeError: the file cannot be written.
    """
    run = suite if isinstance(suite, Run) else suite.run if isinstance(suite, Suite) else read_run(suite)
    write_text(path, render(run, redact, max_cards), private=not (redact or run.manifest.get("redact")))
    return Path(path)


def refuse_replacing(path: Path) -> None:
    """Raises ``ProbeInputError`` where a page would be written over something else."""
    if path.exists() and begins(path, len(_PAGE)).lower() != _PAGE:
        raise ProbeInputError(f"{path}: would be replaced, but is no page; give another --out")


def render(run: Run, redact: bool = False, max_cards: int = MAX_CARDS) -> str:
    """The page as a string (``write_report``)."""
    redact = redact or bool(run.manifest.get("redact"))
    results = [result.redacted() for result in run.results] if redact else list(run.results)
    evidence = run.evidence or tuple(result.evidence() for result in results)
    summary = pairs.redacted(run.summary) if redact else run.summary
    environment, (style, script) = _environment(), _code()
    order = sorted(range(len(results)), key=lambda i: (-view.suspicion(results[i], evidence[i]), results[i].id))
    ranks = enumerate(order, start=1)
    rows = [overview.table_row(rank, results[i], evidence[i], rank <= max_cards) for rank, i in ranks]
    cards = [view.card(rank, results[i], evidence[i]) for rank, i in enumerate(order[:max_cards], start=1)]
    # The dots of a strip in the order of the table, so that a dot can point at its card.
    ordered = [evidence[i] for i in order]
    posts = [(view.plain(results[i].id), row["anchor"]) for i, row in zip(order, rows, strict=True)]
    return environment.get_template("report.html").render(
        csp=_policy(style, script),
        style=style,
        script=script,
        headline=overview.HEADLINES[summary["conclusion"]],
        brief=overview.brief(summary),
        summary=summary,
        main=overview.panel(overview.MAIN, summary, ordered, posts),
        more=[p for which in overview.MORE if (p := overview.panel(which, summary, ordered, posts))],
        funnel=overview.funnel(run.manifest, summary, evidence),
        disagreement=overview.disagreement(evidence),
        verdict_bar=overview.verdict_bar(summary),
        facts=overview.facts(summary),
        tests=overview.tests(summary),
        behaviour=overview.behaviour(summary),
        swapped=pairs.table(summary, {results[i].id: row["anchor"] for i, row in zip(order, rows, strict=True)}),
        randomised=overview.randomisation(study) if (study := summary.get("randomisation")) else [],
        rows=rows,
        cards=cards,
        manifest=run.manifest,
        limits=[view.plain(str(line)) for line in run.manifest.get("limits") or ()],
        model=view.plain(short_name(str(run.manifest.get("model", "model")))),
        redact=redact,
        families=[method for method in summary["mass_ratio"] if method in FAMILIES],
        names=view.METHOD_NAMES,
    )


def render_post(result: PostResult, evidence: Evidence | None = None) -> str:
    """The card of one post as a page of its own, as safe as the report."""
    style, script = _code()
    methods = dict.fromkeys(a.method for a in result.attributions)
    return (
        _environment()
        .get_template("one.html")
        .render(
            csp=_policy(style, script),
            style=style,
            script=script,
            card=view.card(1, result, evidence or result.evidence()),
            families=[method for method in methods if method in FAMILIES],
            names=view.METHOD_NAMES,
        )
    )


def write_pair(models: Sequence[tuple[str, str, Suite, str]], path: str | Path) -> Path:
    """One page for several models over the same posts: the verdicts of each beside those of random citations.

    Args:
        models: of each its name, what its explanations quote, its run, and the link to its own report.
    Raises:
        ProbeError: the file cannot be written.
    """
    style, script = _code()
    rows = [
        {
            "name": name,
            "quotes": quotes,
            "count": suite["n"],
            "headline": overview.HEADLINES[suite["conclusion"]],
            "bar": overview.verdict_bar(suite),
            "link": link,
        }
        for name, quotes, suite, link in models
    ]
    page = _environment().get_template("pair.html").render(csp=_policy(style, script), style=style, models=rows)
    write_text(path, page)
    return Path(path)


@functools.cache
def _code() -> tuple[str, str]:
    """Style and script of every page."""
    style = _environment().get_template("style.css").render(levels=view.LEVELS, codes=sorted(view.LAYERS.values()))
    return style, _environment().get_template("script.js").render(layers=view.LAYERS)


@functools.cache  # compiling the templates takes longer than filling them
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("probes.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": view.plain,
        "percent": view.percent,
        "signed": view.signed,
        "p_value": view.p_value,
        "interval": view.interval,
        "number": overview.number,
    }
    return environment


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
