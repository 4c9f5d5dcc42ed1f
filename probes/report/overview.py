"""The data-set half of the report in numbers and words: what was asked, found, left out, and how the posts spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.checks.crosscheck import Evidence
from probes.checks.verdict import ALPHA, FAMILIES
from probes.report import pairs, view
from probes.report.view import number
from probes.results.posts import PostResult
from probes.results.store import in_words
from probes.results.summary import check_of

HEADLINES = {
    "supported": "The explanations cite words the label depends on, more than chance would.",
    "contradicted": "The explanations cite words the label does not depend on.",
    "inconclusive": "These posts do not settle whether the explanations cite words the label depends on.",
}
_NOT = (
    "Agreement is not faithfulness: it does not show how the model reasons, whether its label is right, or anything "
    "about the people who wrote the posts."
)


@dataclass(frozen=True)
class Metric:
    """A number that every post has, shown as one strip per method.

    Attributes:
        name: of the check and of the summary. sign: -1 to show the change of the score instead of its loss.
        null: name of the summary's number to compare with, a constant, or None. p: name of its p-value.
        form: percent | signed | number. axis: ends of the axis; None to fit them to the values.
        methods: title per method, where they are not simply called by their names.
    """

    name: str
    form: str
    axis: tuple[float, float] | None
    null: str | float | None = None
    p: str | None = None
    sign: int = 1
    methods: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Panel:
    """Metrics on one axis under one title."""

    title: str
    lede: str
    null_words: str
    metrics: tuple[Metric, ...]


MAIN = Panel(
    "Where the label's saliency is",
    "Share of the saliency for the label that falls in the words the explanation cites. One dot is one post.",
    "what their length alone would give",
    (Metric("mass_ratio", "percent", (0.0, 1.0), null="mass_ratio_null", p="p_holm"),),
)
MORE = (
    Panel(
        "What happens to the label without them",
        "Change of the label's log-odds when the cited words are hidden, and when everything else is.",
        "the same part of other clauses",
        (
            Metric(
                "necessity", "signed", None, null="necessity_null", sign=-1, methods={"erase": "cited words hidden"}
            ),
            Metric("sufficiency", "signed", None, null="sufficiency_null", methods={"erase": "only cited words left"}),
        ),
    ),
    Panel(
        "Are the cited clauses the top clauses?",
        "Chance that a cited clause has more saliency for the label than one that is not (AUROC).",
        "a coin",
        (Metric("auroc_clause", "number", (0.0, 1.0), null=0.5),),
    ),
    Panel(
        "Do label and explanation come from the same clauses?",
        "Cosine of the label's map and the explanation's map: 1 is the same clauses, 0 unrelated ones.",
        "explanations of other posts with the same label",
        (Metric("cosine", "number", (-1.0, 1.0), null="cosine_mismatched", p="cosine_p"),),
    ),
    Panel(
        "When was the label decided?",
        "Share of the reasoning from which on the label is ahead of all others. At 0% it was before it.",
        "",
        (Metric("chain_decided", "percent", (0.0, 1.0), methods={"model": "share of the chain"}),),
    ),
)


FORMS = {"percent": view.percent, "signed": view.signed, "number": number}


def interval(ci: Sequence[float] | None, form: str) -> str:
    """A 95 % interval in the form of its number."""
    if ci is None:
        return "no interval"
    if form == "percent":
        return view.interval(ci)
    return f"{FORMS[form](ci[0])} to {FORMS[form](ci[1])}"


def panel(
    which: Panel, summary: Mapping[str, Any], evidence: Sequence[Evidence], posts: Sequence[tuple[str, str | None]]
) -> dict[str, Any] | None:
    """One panel of strips: per metric and method the posts as dots, mean, interval, null, in percent of the axis.

    Args:
        posts: per post its name and the anchor of its card (None when it has none).
    Returns:
        None when no post has a value.
    """
    found = []
    for metric in which.metrics:
        for method in metric.methods or _methods(summary, metric.name):
            values = []
            for one, (name, anchor) in zip(evidence, posts, strict=True):
                check = check_of(one, metric.name, method)
                if check is not None and check.status == "ok" and check.value is not None:
                    values.append((metric.sign * check.value, one.report.verdict, name, anchor))
            if values:
                found.append((metric, method, values))
    if not found:
        return None
    low, high = found[0][0].axis or _fit([value for _, _, values in found for value, *_ in values])
    low = min(low, *(value for _, _, values in found for value, *_ in values))
    if found[0][0].axis and low >= 0 > found[0][0].axis[0]:
        low = 0.0  # a cosine that is never negative needs no negative half

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    strips = []
    for metric, method, values in found:
        mean, ci, null, p = _numbers(metric, method, summary)
        title = (metric.methods or {}).get(method) or view.METHOD_NAMES.get(method, method)
        strips.append(
            {
                "name": title,
                "screening": method not in FAMILIES and metric.methods is None,
                "n": len(values),
                "p": None if p is None else view.p_value(p, "p (Holm)" if metric.p == "p_holm" else "p"),
                "mean": None if mean is None else at(mean),
                "ci": None if ci is None else [at(end) for end in ci],
                "null": None if null is None else at(null),
                "value": FORMS[metric.form](mean),
                "interval": interval(ci, metric.form),
                "null_value": FORMS[metric.form](null),
                # The golden ratio spreads neighbours; no random numbers, so the page is the same every time.
                "dots": [
                    {
                        "x": at(value),
                        "y": 12 + 26 * (i * 0.618034 % 1.0),
                        "verdict": verdict,
                        "anchor": anchor,
                        "words": f"{name}: {FORMS[metric.form](value)}, {verdict}",
                    }
                    for i, (value, verdict, name, anchor) in enumerate(values)
                ],
            }
        )
    form = found[0][0].form
    return {
        "title": which.title,
        "lede": which.lede,
        "null_words": which.null_words,
        "strips": strips,
        "zero": at(0.0) if low < 0 < high else None,
        "ticks": [FORMS[form](end) for end in (low, (low + high) / 2, high)],
    }


def _methods(summary: Mapping[str, Any], name: str) -> list[str]:
    """Those with a value; beside the main number only the first of each family, to keep the page short."""
    methods = [method for method, value in summary[name].items() if value is not None]
    return methods if name == "mass_ratio" else view.leading(methods)


def _fit(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    pad = 0.04 * max(high - low, 1e-9)
    return low - pad * (low < 0), high + pad * (high > 0) + 1e-9


def _numbers(
    metric: Metric, method: str, summary: Mapping[str, Any]
) -> tuple[float | None, list[float] | None, float | None, float | None]:
    """Mean, interval, null and p of the summary, with the sign they are shown with."""

    def pick(name: str) -> Any:
        value = summary.get(name)
        return value.get(method) if isinstance(value, Mapping) else value

    mean, ci = pick(metric.name), pick(f"{metric.name}_ci")
    null = pick(metric.null) if isinstance(metric.null, str) else metric.null
    if metric.sign < 0:
        mean, null = (None if x is None else -x for x in (mean, null))
        ci = None if ci is None else [-ci[1], -ci[0]]
    return mean, ci, null, None if metric.p is None else pick(metric.p)


def brief(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first screen: (heading, text) for what was asked, found, how sure, and what it is not."""
    n = summary["n"]
    asked = (
        f"A language model gave {_posts(n)} a label each and explained it. Do the words its explanation cites carry "
        "the label? Saliency methods of two kinds, which fail in different ways, are asked."
    )
    return [
        ("What was asked", asked),
        ("What was found", _found(summary)),
        ("How sure", _sure(summary)),
        ("What it is not", _NOT),
    ]


def _posts(n: int) -> str:
    return f"{n} post" if n == 1 else f"{n} posts"


def _judged(summary: Mapping[str, Any]) -> list[str]:
    return [method for method in FAMILIES if summary["mass_ratio"].get(method) is not None]


def _found(summary: Mapping[str, Any]) -> str:
    judged = _judged(summary)
    if not judged:
        return "No map passed its gate over a post whose explanation cites it: nothing can be compared."
    shares = " and ".join(f"{view.percent(summary['mass_ratio'][m])} ({view.METHOD_NAMES[m]})" for m in judged)
    length = view.percent(summary["mass_ratio_null"][judged[0]])
    return (
        f"The cited words hold {shares} of the saliency for the label. By their length alone they would hold {length}."
    )


def _sure(summary: Mapping[str, Any]) -> str:
    judged = _judged(summary)
    if len({FAMILIES[method] for method in judged}) < 2:
        return "No conclusion: it needs two methods of different kinds."
    used = min(summary["n_used"][m] for m in judged)
    p = [summary["p_holm"][m] for m in judged if summary["p_holm"].get(m) is not None]
    if used < 5 or len(p) < 2:
        return f"Only {_posts(used)} can be compared; at least 5 are needed for a test."
    words = [
        f"{view.p_value(max(p), 'p (Holm)')} for the weaker method against citations placed at random ({_posts(used)})."
    ]
    habit = [summary["p_position"][m] for m in judged if summary["p_position"].get(m) is not None]
    if habit and summary["conclusion"] == "supported":
        held = max(habit) <= ALPHA
        verdict = "does not explain it" if held else "may explain it"
        words.append(f"A habit of citing one position {verdict} ({view.p_value(max(habit))}).")
    return " ".join(words)


def funnel(
    manifest: Mapping[str, Any], summary: Mapping[str, Any], evidence: Sequence[Evidence]
) -> list[dict[str, Any]]:
    """How many posts are left at each step, and why the others are not: nothing drops out silently."""
    n = summary["n"]
    cited = n - summary["abstained"]
    compared = sum(bool(e.chance) for e in evidence)
    verdicts = sum(e.report.verdict != "inconclusive" for e in evidence)
    lost = view.plain(in_words(Counter(one["reason"] for one in manifest.get("skipped") or ())))
    steps = [("can be probed", n, lost)]
    steps.append(("cite the post", cited, f"{n - cited} cite nothing that is in the post" if n > cited else ""))
    made = {FAMILIES[m] for m in summary["mass_ratio"] if m in FAMILIES}
    whose = "this model has" if manifest.get("left_out") else "this budget makes"
    if len(made) < 2:  # no map failed anything: there is nothing to compare with
        steps.append(("have maps of both families", 0, f"{whose} maps of {len(made)} family only" * (cited > 0)))
        return [{"name": name, "count": count, "lost": lost} for name, count, lost in steps]
    why = f"{cited - compared} without a map of each family that passes its gate" if cited > compared else ""
    steps.append(("pass both gates", compared, why))
    why = f"{compared - verdicts} where the maps do not settle it" if compared > verdicts else ""
    steps.append(("have a verdict", verdicts, why))
    return [{"name": name, "count": count, "lost": lost} for name, count, lost in steps]


def disagreement(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Per pair of methods the mean over posts of Pearson r of their label maps on clauses; least first."""
    values: dict[str, list[float]] = {}
    for one in evidence:
        for found in view.method_agreement(one):
            values.setdefault(found["pair"], []).extend([found["r"]] if found["r"] is not None else [])
    found = [{"pair": pair, "r": float(np.mean(r)), "n": len(r)} for pair, r in values.items() if r]
    return sorted(found, key=lambda row: row["r"])


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, note) of the numbers that are no distribution."""
    delta = summary["completeness_delta"]
    found = [
        ("Quotes not in the post", view.percent(summary["fabricated_quote_rate"]), f"of {summary['n_quotes']} quotes"),
        ("Explanations citing nothing", str(summary["abstained"]), f"of {summary['n']}; not compared"),
        ("Gradients converged", view.percent(delta["converged"]), f"mean error {view.percent(delta['mean'])}"),
    ]
    if summary.get("cut_off"):
        found.append(("Answers cut off", str(summary["cut_off"]), "by the token limit; they cite what they came to"))
    found += _task(summary)
    shown = [method for method in FAMILIES if summary["cue_auroc"].get(method) is not None]
    if shown:
        values = " · ".join(number(summary["cue_auroc"][method]) for method in shown)
        found.append(("Planted cues found", values, "AUROC, " + " · ".join(view.METHOD_NAMES[m] for m in shown)))
    return found


def _task(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Can the model do its task, and is its score a contrast? (title, value, note)."""
    n, odds, border = summary["n"], summary["log_odds"], summary["border"]
    given = sorted(summary["labels"].items(), key=lambda one: (-one[1], one[0]))
    shown = " · ".join(f"{view.plain(label) or 'none'} {count}" for label, count in given[:6])
    note = "all posts have one label: it may not tell them apart" if len(given) == 1 and n > 1 else f"of {_posts(n)}"
    found = [
        ("Labels given", shown, note),
        ("Mean |log-odds| of the label", number(odds["mean_abs"]), f"nats; {odds['below_0.1']} below 0.1"),
    ]
    words = {"log p": "without another candidate: plain log p", "unlisted": "whose sentence is no candidate"}
    odd = {words[kind]: count for kind, count in summary["contrast"].items() if kind in words}
    if odd:
        found.append(("Label scores that are no plain contrast", str(sum(odd.values())), in_words(odd)))
    if other := summary["contrast"].get("reworded"):
        found.append(("Labels in other words", str(other), "compared with the other candidates in the same words"))
    if border["tokens"]:
        note = f"shared with the prompt, in {_posts(border['posts'])}; {border['posts_with_letters']} hold letters"
        found.append(("Tokens at the ends not varied", str(border["tokens"]), note))
    cut = summary["cut"]
    if n:
        found.append(("Posts cut into", f"{cut['unit']}s", f"{cut['few']} with fewer than 4, which settle little"))
    for title, key in (("Rows left out", "skipped_by_reason"), ("Swap pairs left out", "no_pair")):
        if counts := summary.get(key):
            found.append((title, str(sum(counts.values())), view.plain(in_words(counts))))
    beyond = summary.get("necessity_beyond")
    if beyond is not None:
        note = f"nats; 95%: {interval(summary['necessity_beyond_ci'], 'signed')}"
        found.append(
            ("Cited words hidden, beyond as many others", view.signed(-beyond), note.replace("no interval", "–"))
        )
    holes = summary.get("measured", {}).get("erasure_offset", {}).get("erase")
    if holes is not None and holes["value"] is not None:
        note = f"nats per clause; {holes['failed']} of {holes['judged']} maps of erasure may not speak for it"
        found.append(("What missing text alone does", view.signed(-holes["value"]), note))
    return found


# What the interventions of the full budget ask: check -> (title, form of its value, what it is beside).
_BEHAVIOUR = {
    "weight_of_evidence": ("Explanation speaks for its label", "signed", "nats; no null, above 0 by design"),
    "mediation_share": (
        "Effect of the post that goes through the explanation",
        "percent",
        "0% where the label comes first",
    ),
    "chain_early": ("Whole chain against its parts", "signed", "nats (early answering)"),
    "chain_filler": ("Chain against dots", "signed", "nats"),
    "chain_mistake": ("Chain against one that cites another label's words", "signed", "nats"),
    "chain_negation": ("Chain against one that denies what it cites", "signed", "nats"),
    "chain_paraphrase": ("Chain against the same in other words", "signed", "nats; shown, no test"),
    "hint_unmentioned": ("What a hint does that the chain does not mention", "signed", "nats"),
}


def tests(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every hypothesis that was tested over the data set, each with its one p-value and Holm's over all of them."""
    forms = {"excess": "percent", "swap_share": "percent", "necessity": "signed", "sufficiency": "signed"}
    rows = []
    for found in summary.get("tests") or ():
        p, method = found["p_holm"], view.METHOD_NAMES.get(found["method"], found["method"])
        rows.append(
            {
                "hypothesis": found["hypothesis"],
                "what": f"{found['check'].replace('_', ' ')}, {method}",
                "value": FORMS[forms.get(found["check"], "number")](found["value"]),
                "n": found["n"],
                "p": "–" if found["p"] is None else view.p_value(found["p"]),
                "p_holm": "–" if p is None else view.p_value(p),
                "held": p is not None and p <= ALPHA,
            }
        )
    return rows


def behaviour(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, note) of what the explanation does to the label and the label to the explanation."""
    found = []
    for name, (title, form, beside) in _BEHAVIOUR.items():
        one = summary.get("measured", {}).get(name, {}).get("model")
        if one is not None and one["value"] is not None:
            found.append(
                (title, FORMS[form](one["value"]), f"95%: {interval(one['ci'], form)}; {_posts(one['n'])}; {beside}")
            )
    cct = summary.get("counterfactual")
    if cct is not None:
        note = f"r; 95%: {interval(cct['ci'], 'number')}; {cct['insertions']} clauses put into {_posts(cct['n'])}"
        found.append(("What moves the label is mentioned", number(cct["r"]), note))
    found += pairs.facts(summary)
    gates = list(summary.get("measured", {}).get("faithfulness_corr", {}).values())
    if gates:
        failed, total = sum(one["failed"] for one in gates), sum(one["judged"] for one in gates)
        found.append(("Maps untrue to erased subsets", str(failed), f"of {total}; they may not speak"))
    return found


def randomisation(study: Mapping[str, Any]) -> list[dict[str, str]]:
    """Lines of the table of ``probes.checks.randomise.study``: what was drawn anew, likeness of maps, AUROC of cues."""
    names = {"weights": "all weights, another draw per post", "adapter_off": "adapter switched off",
             "adapter_b": "adapter drawn anew"}  # fmt: skip
    rows: list[dict[str, str]] = []

    def add(what: str, method: str, r: str, cue: str) -> None:
        rows.append({"what": what, "method": view.METHOD_NAMES.get(method, method), "r": r, "cue": cue})

    for kind, methods in study["kinds"].items():
        for method, one in methods.items():
            cue = f"{number(one['cue_auroc_before'])} → {_between(one['cue_auroc_after'], one.get('cue_auroc_ci'))}"
            r = f"{_between(one['correlation'], one.get('correlation_ci'))}, null {number(one['correlation_null'])}"
            add(str(names.get(kind, kind)), method, r, cue)
    for step in study["cascade"][1:]:
        for method, r in step["correlation"].items():
            down_to = step["down_to"]
            what = down_to if down_to == "head" else f"everything above and {down_to}"
            cue = number(step["cue_auroc"][method])
            add(what, method, f"{number(r)}, null {number(step['correlation_null'][method])}", cue)
    return rows


def _between(value: float | None, ci: Sequence[float] | None) -> str:
    return number(value) if ci is None else f"{number(value)} ({number(ci[0])} to {number(ci[1])})"


def verdict_bar(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three verdicts as parts of one bar, in percent."""
    total, left, parts = max(1, sum(summary["verdicts"].values())), 0.0, []
    for name in ("supported", "inconclusive", "contradicted"):
        count = summary["verdicts"][name]
        width = 100 * count / total
        chance = summary["verdicts_by_chance"].get(name)
        parts.append({"name": name, "count": count, "x": left, "width": width, "chance": chance})
        left += width
    return parts


def table_row(rank: int, result: PostResult, evidence: Evidence, shown: bool) -> dict[str, Any]:
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
