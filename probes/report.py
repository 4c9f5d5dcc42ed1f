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
from typing import TYPE_CHECKING, Any

from probes import view
from probes.crosscheck import Evidence
from probes.files import write_text
from probes.results import PostResult, Run, read_run
from probes.summary import check_of
from probes.verdict import FAMILIES

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_CARDS = 200
_CONCLUSIONS = {
    "supported": "The explanations cite what the label used, more than chance would.",
    "contradicted": "The explanations cite words the label did not use.",
    "inconclusive": "These posts do not settle whether the explanations cite what the label used.",
}


def write_report(suite: str | Path | Run, path: str | Path, redact: bool = False, max_cards: int = MAX_CARDS) -> Path:
    """Writes the report of a finished run as one HTML file.

    Args:
        suite: the run directory, or a ``Run``.
        redact: leave out every word of posts and explanations: offsets and scores only.
        max_cards: posts shown in full, the most suspicious first; the table always lists all, and the page says so.

    Returns:
        ``path``.

    Raises:
        ProbeInputError: not a finished run directory.
        ProbeError: the file can not be written.
    """
    run = suite if isinstance(suite, Run) else read_run(suite)
    write_text(path, render(run, redact, max_cards))
    return Path(path)


def render(run: Run, redact: bool = False, max_cards: int = MAX_CARDS) -> str:
    """The page as a string (``write_report``)."""
    redact = redact or bool(run.manifest.get("redact"))
    results = [result.redacted() for result in run.results] if redact else list(run.results)
    evidence = run.evidence or tuple(result.evidence() for result in results)
    environment = _environment()
    style = environment.get_template("style.css").render(levels=view.LEVELS, codes=sorted(view.LAYERS.values()))
    script = environment.get_template("script.js").render(layers=view.LAYERS)
    order = sorted(range(len(results)), key=lambda i: (-view.suspicion(results[i], evidence[i]), results[i].id))
    rows = [_row(rank, results[i], evidence[i], rank <= max_cards) for rank, i in enumerate(order, start=1)]
    cards = [view.card(rank, results[i], evidence[i]) for rank, i in enumerate(order[:max_cards], start=1)]
    return environment.get_template("report.html").render(
        csp=_policy(style, script),
        style=style,
        script=script,
        headline=_CONCLUSIONS[run.summary["conclusion"]],
        lede=_lede(run.summary),
        summary=run.summary,
        strips=_strips(run.summary, evidence),
        verdict_bar=_verdict_bar(run.summary),
        facts=_facts(run.summary),
        rows=rows,
        cards=cards,
        manifest=run.manifest,
        model=view.plain(_short(str(run.manifest.get("model", "model")))),
        redact=redact,
        families=list(FAMILIES),
        names=view.METHOD_NAMES,
    )


@functools.cache  # compiling the templates takes longer than filling them
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("probes", "templates"),
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
        "number": _number,
    }
    return environment


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _short(model: str) -> str:
    """The last parts of the paths in a model name: a report is passed on, a home directory should not be."""
    return " + ".join(part.rstrip("/").rsplit("/", 1)[-1] for part in model.split(" + "))


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _lede(summary: dict[str, Any]) -> str:
    """The headline numbers in one sentence."""
    n = summary["n"]
    posts = f"{n} post" if n == 1 else f"{n} posts"
    judged = [method for method in FAMILIES if summary["mass_ratio"].get(method) is not None]
    if not judged:
        return f"In {posts}, no map passed its gate over a post whose explanation cites it: nothing can be compared."
    shares = " and ".join(f"{view.percent(summary['mass_ratio'][m])} by {view.METHOD_NAMES[m]}" for m in judged)
    p = [summary["p_holm"][m] for m in judged if summary["p_holm"].get(m) is not None]
    weaker = (
        f"; {view.p_value(max(p))} for the weaker of the two against citations placed at random" if len(p) > 1 else ""
    )
    return (
        f"In {posts}, the words an explanation cites hold {shares} of the saliency that speaks for the label. "
        f"By their length alone they would hold {view.percent(summary['mass_ratio_null'][judged[0]])}{weaker}."
    )


def _facts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, note) of the smaller numbers."""
    delta = summary["completeness_delta"]
    facts = [
        ("Quotes not in the post", view.percent(summary["fabricated_quote_rate"]), f"of {summary['n_quotes']} quotes"),
        ("Explanations citing nothing", str(summary["abstained"]), f"of {summary['n']}; not compared"),
        ("Gradients converged", view.percent(delta["converged"]), f"mean error {view.percent(delta['mean'])}"),
    ]
    for key, title in (("necessity", "Cited words erased together"), ("sufficiency", "Cited words kept alone")):
        if summary[key] is not None:
            sign = -1 if key == "necessity" else 1  # shown as the change of the score
            note = f"log-odds; {view.signed(sign * summary[f'{key}_null'])} for other words of that length"
            facts.append((title, view.signed(sign * summary[key]), note))
    for key, title, note in (
        ("cosine", "Label and explanation maps agree", "cosine"),
        ("cue_auroc", "Planted cues found", "AUROC"),
    ):
        shown = [method for method in FAMILIES if summary[key].get(method) is not None]
        if not shown:
            continue
        note = f"{note}, {' · '.join(view.METHOD_NAMES[method] for method in shown)}"
        stranger = summary["cosine_mismatched"].get(shown[0])
        if key == "cosine" and stranger is not None:
            note += f"; {_number(stranger)} with another post's explanation"
        facts.append((title, " · ".join(_number(summary[key][method]) for method in shown), note))
    return facts


def _strips(summary: dict[str, Any], evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Per method: one dot per post, mean, interval and what length alone gives, in percent of the axis."""
    strips = []
    for method, mean in summary["mass_ratio"].items():
        if mean is None:
            continue
        found = [(check_of(e, "mass_ratio", method), e.report.verdict) for e in evidence]
        values = [
            (c.value, verdict) for c, verdict in found if c is not None and c.status == "ok" and c.value is not None
        ]
        strips.append(
            {
                "method": method,
                "name": view.METHOD_NAMES.get(method, method),
                "screening": method not in FAMILIES,
                "mean": 100 * mean,
                "ci": summary["mass_ratio_ci"][method],
                "null": 100 * summary["mass_ratio_null"][method],
                "p": summary["p"][method],
                "n": len(values),
                # The golden ratio spreads neighbours; no random numbers, so the page is the same every time.
                "dots": [
                    {"x": 100 * value, "y": 12 + 26 * (i * 0.618034 % 1.0), "verdict": verdict}
                    for i, (value, verdict) in enumerate(values)
                ],
            }
        )
    return strips


def _verdict_bar(summary: dict[str, Any]) -> list[dict[str, Any]]:
    total, left, parts = max(1, sum(summary["verdicts"].values())), 0.0, []
    for name in ("supported", "inconclusive", "contradicted"):
        count = summary["verdicts"][name]
        width = 100 * count / total
        chance = summary["verdicts_by_chance"].get(name)
        parts.append({"name": name, "count": count, "x": left, "width": width, "chance": chance})
        left += width
    return parts


def _row(rank: int, result: PostResult, evidence: Evidence, shown: bool) -> dict[str, Any]:
    """One line of the table of posts."""

    def value(name: str, method: str) -> float | None:
        found = check_of(evidence, name, method)
        return None if found is None else found.value

    invented = check_of(evidence, "fabricated_quote_rate", "align")
    return {
        "rank": rank,
        "anchor": f"post-{rank}" if shown else None,
        "id": view.visible(result.id),
        "label": view.plain(result.label),
        "verdict": evidence.report.verdict,
        "mass": {method: value("mass_ratio", method) for method in FAMILIES},
        "invented": None if invented is None or invented.value is None else round(invented.value * invented.n),
        "suspicion": view.suspicion(result, evidence),
    }
