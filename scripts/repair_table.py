"""What ``make repair`` found, as numbers, tables and a figure. This is where the sealed phrases are looked at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from mentalglm_jax.data.records import Record
from probes.citations.align import align, fabricated_quotes, merge_spans
from probes.report import figures

Lines = list[tuple[str, ...]]
DRAWS = 2000  # of the bootstrap
PROBED = ("conclusion", "verdicts", "verdicts_by_chance", "mass_ratio", "mass_ratio_ci", "mass_ratio_null", "abstained")


def measured(found: Mapping[str, Any], truth: Sequence[Record]) -> dict[str, Any]:
    """One line of the tables, against what was sealed.

    Args:
        found: ``rows`` of generations.jsonl, ``probes`` (summary.json).
        truth: the records of the posts.
    """
    rows, probes = found["rows"], found["probes"]
    gold = {record.id: record for record in truth}
    said: dict[str, list[bool]] = {"cue": [], "decoy": []}
    quotes, invented, covered = 0, 0, []
    for row in rows:
        record, text = gold[row["id"]], row["parsed_explanation"] or ""
        citations = align(text, record.post)
        nowhere, count = fabricated_quotes(citations)
        quotes, invented = quotes + count, invented + nowhere
        cited = merge_spans(span for citation in citations for span in citation.post_char)
        covered.append(sum(b - a for a, b in cited) / len(record.post))
        for name, spans in (("cue", record.cues), ("decoy", record.decoys)):
            said[name].append(any(record.post[a:b] in text for a, b in spans or ()))
    wanted = [str(gold[row["id"]].label) for row in rows]
    labels = [row["parsed_label"] if isinstance(row["parsed_label"], str) else "" for row in rows]
    return {
        "n": len(rows),
        "cites_cue": share(said["cue"]),
        "cites_decoy": share(said["decoy"]),
        "label_f1": weighted_f1(wanted, labels),
        "unreadable": sum(row["parse_status"] != "ok" for row in rows) / len(rows),
        "tokens": sum(len(row["output_ids"]) for row in rows) / len(rows),
        "quotes": quotes / len(rows),
        "quotes_in_post": 1 - invented / quotes if quotes else None,
        "post_cited": sum(covered) / len(rows),
        "by_post": {
            "cue": [float(x) for x in said["cue"]],
            "decoy": [float(x) for x in said["decoy"]],
            "label": [float(one == other) for one, other in zip(labels, wanted, strict=True)],
        },
        **{name: probes.get(name) for name in PROBED},
        "n_probed": probes.get("n"),
    }  # fmt: skip


def weighted_f1(wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Over the labels that there are; an unreadable answer is a wrong one."""
    there = sorted(set(wanted))
    found = f1_score(wanted, labels, labels=there, average="weighted", zero_division=0)
    return float(found)


def share(hits: Sequence[bool]) -> dict[str, float]:
    """With Wilson's interval (1927), 95 %."""
    low, high = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {"mean": sum(hits) / len(hits), "low": float(low), "high": float(high)}


def change(before: Sequence[float], after: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean difference of the same posts, with the percentile bootstrap's 95 %."""
    differences = np.subtract(after, before)
    drawn = np.random.default_rng(seed).integers(len(differences), size=(DRAWS, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), (0.025, 0.975))
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}


def start_of(name: str) -> str:
    """The row that a row is compared with."""
    return "faithful before" if name.startswith("faithful") else "before"


def table(rows: Mapping[str, Mapping[str, Any]], pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: answers to all fresh posts, what the probes say of some, the changes, the pairs."""
    answers: Lines = [("answers", "cites the cue", "cites the decoy", "label F1", "unreadable", "quotes in the post",
                       "quotes", "share of the post cited", "tokens")]  # fmt: skip
    probed: Lines = [("probes", "posts", "verdicts s/c/i", "by chance s/c", "data set", "mass ratio ig", "erase",
                      "random citation")]  # fmt: skip
    changes: Lines = [("change from the start", "cites the cue", "cites the decoy", "label right")]
    for name, one in rows.items():
        answers.append((name, interval(one["cites_cue"]), interval(one["cites_decoy"]), f"{one['label_f1']:.3f}",
                        f"{one['unreadable']:.1%}", number(one["quotes_in_post"]), number(one["quotes"]),
                        number(one["post_cited"]), number(one["tokens"], 1)))  # fmt: skip
        v, chance = one["verdicts"], one["verdicts_by_chance"] or {}
        probed.append((name, str(one["n_probed"]),
                       "/".join(str(v.get(x, 0)) for x in ("supported", "contradicted", "inconclusive")),
                       "/".join(number(chance.get(x), 1) for x in ("supported", "contradicted")),
                       str(one["conclusion"]), *(ratio(one, method) for method in ("ig", "erase")),
                       number((one["mass_ratio_null"] or {}).get("erase"))))  # fmt: skip
        start = start_of(name)
        if name != start and start in rows:
            both = ((rows[start]["by_post"][x], one["by_post"][x]) for x in ("cue", "decoy", "label"))
            changes.append((name, *(interval(change(*x), signed=True) for x in both)))
    ranked: Lines = [
        ("pairs", "posts", "with a pair", "pairs", "margin", "by chance: pairs", "margin", "posts without")
    ]
    for name, one in pairs.items():
        without = ", ".join(f"{count} {reason}" for reason, count in one["no_pair"].items())
        ranked.append((name, str(one["posts"]), str(one["posts_with_pairs"]), str(one["pairs"]), number(one["margin"]),
                       number(one["null"]["pairs"], 1), number(one["null"]["margin"]), without or "–"))  # fmt: skip
    return "\n".join(markdown(part) for part in (answers, changes, probed, ranked))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ("---",) * len(head), *rest))


def interval(one: Mapping[str, float], signed: bool = False) -> str:
    return "{mean:{s}.2f} ({low:{s}.2f} to {high:{s}.2f})".format(**one, s="+" if signed else "")


def ratio(one: Mapping[str, Any], method: str) -> str:
    """Share of the label's saliency in what is cited, with its 95 %."""
    value, between = one["mass_ratio"].get(method), (one["mass_ratio_ci"] or {}).get(method)
    if value is None or not between:
        return number(value)
    return interval({"mean": value, "low": between[0], "high": between[1]})


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def figure(rows: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Share of answers that cite the cue (blue) and the decoy (orange) in every row, with 95 %; the ending chooses the
    format."""
    drawn = Figure(figsize=(6.3, 0.7 + 0.42 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    for colour, name, key, lift in ((figures.BLUE, "what decides", "cites_cue", 0.12),
                                    (figures.ORANGE, "the decoy", "cites_decoy", -0.12)):  # fmt: skip
        at = [len(rows) - place + lift for place in range(len(rows))]
        values = [one[key] for one in rows.values()]
        axes.hlines(at, [v["low"] for v in values], [v["high"] for v in values], color=colour, lw=1.6)
        axes.plot([v["mean"] for v in values], at, "o" if lift > 0 else "D", color=colour, ms=5, label=name)
    axes.set_yticks([len(rows) - place for place in range(len(rows))], list(rows))
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of explanations of fresh posts that cite it (95 %)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figures.save(drawn, path)
