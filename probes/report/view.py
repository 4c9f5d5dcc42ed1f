"""From results to what the report's template shows: numbers in words, text in pieces, bars in percent. No HTML here."""

from __future__ import annotations

import itertools
import math
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from probes.checks.chain import decided_at
from probes.checks.crosscheck import Evidence, char_mask
from probes.checks.verdict import FAMILIES, pearson
from probes.checks.verdict import NAMES as METHOD_NAMES
from probes.citations.align import merge_spans
from probes.records import Attribution, Span
from probes.results.posts import PostResult, cited_target
from probes.results.summary import check_of

LEVELS = 5
# One letter per layer: an attribute name in the page.
LAYERS = {
    pair: string.ascii_lowercase[i]
    for i, pair in enumerate((t, m) for t in ("label", "explanation") for m in METHOD_NAMES)
}
VERDICT_WORDS = {
    "supported": "Both maps put most of the label's saliency in the cited words.",
    "contradicted": "Both maps put the label's saliency elsewhere, in the same place.",
}


def leading(methods: Iterable[str]) -> list[str]:
    """The first of each family, in the order of ``FAMILIES``."""
    present, found = set(methods), {}
    for method, family in FAMILIES.items():
        if method in present:
            found.setdefault(family, method)
    return list(found.values())


def percent(value: float | None) -> str:
    """0.904 -> "90%"; one decimal below 10%."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}%" if 0 < abs(value) < 0.0995 else f"{100 * value:.0f}%"


def number(value: float | None, digits: int = 2) -> str:
    """0.913 -> "0.91", with a true minus sign; "–" for None."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def signed(value: float | None) -> str:
    """4.23 -> "+4.2", with a true minus sign."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if abs(value) >= 0.05 else "0.0"


def p_value(p: float | None, name: str = "p") -> str:
    """ "p < 0.001" or "p = 0.03"; an adjusted one has another name: ``name="p (Holm)"``."""
    if p is None or not math.isfinite(p):
        return f"no {name}"
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.3f}" if p < 0.1 else f"{name} = {p:.2f}"


def interval(ci: Sequence[float] | None) -> str:
    """[0.874, 0.918] -> "87–92%"."""
    return "" if ci is None else f"{100 * ci[0]:.0f}–{100 * ci[1]:.0f}%"


def visible(text: str) -> list[tuple[str, str]]:
    """Pieces of text: ("text", ...) as is, or ("mark", "U+202E") for a character that is invisible or moves others.

    Zero-width joiners stay (emoji and Indic scripts need them); direction marks, zero-width spaces, controls and lone
    surrogates become marks. Carriage returns vanish, or become line feeds where they stand alone.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    pieces: list[tuple[str, str]] = []
    for hidden, chars in itertools.groupby(text, _hidden):
        run = "".join(chars)
        pieces += [("mark", f"U+{ord(char):04X}") for char in run] if hidden else [("text", run)]
    return pieces


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and char not in "\n\t\u200d"


def plain(value: object) -> str:
    """Text for places without markup (titles, attributes): hidden characters named in words."""
    return "".join(text for _, text in visible(str(value)))


def language(text: str | None) -> str | None:
    """ "zh" or "ja" for text in Han characters (they are drawn differently), else None."""
    if not text or not any("\u4e00" <= char <= "\u9fff" for char in text):
        return None
    return "ja" if any("\u3040" <= char <= "\u30ff" for char in text) else "zh"


def levels(values: np.ndarray) -> np.ndarray:
    """-5 .. 5 per character, in fifths of the largest absolute value; 0 below a tenth of it."""
    top = np.abs(values).max(initial=0.0)
    if not np.isfinite(top) or top == 0:
        return np.zeros(len(values), int)
    share = values / top
    return np.where(np.abs(share) < 0.1, 0, np.sign(share) * np.ceil(np.abs(share) * LEVELS)).astype(int)


def _joined(text: str, position: int) -> bool:
    """True when a cut here would part what is drawn as one: combining marks, emoji sequences, flags."""
    char, before = text[position], text[position - 1]
    return (
        unicodedata.category(char) in ("Mn", "Me", "Mc")
        or "\u200d" in (char, before)
        or 0xFE00 <= ord(char) <= 0xFE0F
        or 0x1F3FB <= ord(char) <= 0x1F3FF
        or (0x1F1E6 <= ord(char) <= 0x1F1FF and 0x1F1E6 <= ord(before) <= 0x1F1FF)
    )


def groups(result: PostResult) -> list[dict[str, Any]]:
    """The post in stretches under the same citations, each in runs of equal look: levels per layer, size, text pieces.

    ``phrases`` of a run: level per citation, of the map of what that phrase was written from, as "c0:3 c1:-2". Pieces
    are None if redacted. A citation gets one outline, not one per shade.
    """
    columns = {
        LAYERS[a.target, a.method]: levels(a.char_values) for a in result.attributions if (a.target, a.method) in LAYERS
    }
    columns |= {f"phrase {name}": levels(a.char_values) for name, a in phrase_maps(result).items()}
    cites = _citing(result)
    keys = [(tuple(int(column[i]) for column in columns.values()), cites[i]) for i in range(result.length)]
    found: list[dict[str, Any]] = []
    start = 0
    for position in range(1, result.length + 1):
        if position < result.length and (
            keys[position] == keys[start] or (result.post is not None and _joined(result.post, position))
        ):
            continue
        shades = {code: level for code, level in zip(columns, keys[start][0], strict=True) if level}
        stretch = {
            "levels": {code: level for code, level in shades.items() if " " not in code},
            "phrases": " ".join(f"{code.split()[1]}:{level}" for code, level in shades.items() if " " in code),
            "size": position - start,
            "pieces": None if result.post is None else visible(result.post[start:position]),
        }
        names = keys[start][1]
        if not found or found[-1]["cites"] != names:
            found.append({"cites": names, "runs": []})
        found[-1]["runs"].append(stretch)
        start = position
    return found


def _citing(result: PostResult) -> list[str]:
    """For each character of the post the citations of it, as "c0 c1"."""
    turns: dict[int, list[int]] = {}  # where citations begin or end
    for number, citation in enumerate(result.citations):
        for span in merge_spans(citation.post_char):
            for at in span:
                turns.setdefault(at, []).append(number)
    found: list[str] = []
    here: set[int] = set()
    for start, end in itertools.pairwise(sorted({0, *turns, result.length})):
        for number in turns.get(start, ()):
            here ^= {number}
        found += [" ".join(dict.fromkeys(result.citations[number].id for number in sorted(here)))] * (end - start)
    return found


def phrase_maps(result: PostResult) -> dict[str, Attribution]:
    """Citation id -> map of what that phrase of the explanation was written from, where there is one; each map once."""
    by_target: dict[str, Attribution] = {}
    for a in result.attributions:
        if a.target.startswith("explanation[") and np.isfinite(a.char_values).all():
            by_target.setdefault(a.target, a)
    maps = ((c.id, by_target.pop(cited_target(c), None)) for c in result.citations)
    return {name: a for name, a in maps if a is not None}


def phrases(result: PostResult) -> list[dict[str, Any]]:
    """The explanation in stretches, cited ones with their citation; citations in order, without text if redacted."""
    found: list[dict[str, Any]] = []
    position = 0
    for citation in sorted(result.citations, key=lambda c: c.expl_char):
        a, b = citation.expl_char
        if a < position:
            continue
        if result.explanation is not None and a > position:
            found.append({"cite": None, "pieces": visible(result.explanation[position:a])})
        found.append(
            {
                "cite": citation.id,
                "kind": citation.kind,
                "score": citation.score,
                "grounded": bool(citation.post_char),
                "places": ", ".join(f"{x}–{y}" for x, y in citation.post_char),
                "size": b - a,
                "pieces": None if result.explanation is None else visible(result.explanation[a:b]),
            }
        )
        position = b
    if result.explanation is not None and position < len(result.explanation):
        found.append({"cite": None, "pieces": visible(result.explanation[position:])})
    return found


def _window_sums(char_values: np.ndarray, span: Span) -> np.ndarray:
    """Sum over a window as long as the span, over all circular shifts of the map: float64 [characters]."""
    n, size = len(char_values), span[1] - span[0]
    prefix = np.concatenate(([0.0], np.cumsum(np.concatenate((char_values, char_values)))))
    return prefix[size : size + n] - prefix[:n]


def _bars(a: Attribution | None, units: Sequence[Span]) -> list[dict[str, float]] | None:
    """Per clause its sum in percent of the largest, and the null band in the same scale.

    The band is the middle half of what the clause would hold under all shifts of the map (all rotations of a clause
    map). It is a reference for the eye: single clauses are not tested.
    """
    if a is None or not np.isfinite(a.char_values).all():
        return None
    sums = np.array([a.char_values[x:y].sum() for x, y in units])
    top = max(np.abs(sums).max(initial=0.0), 1e-12)
    bars = []
    for value, span in zip(sums, units, strict=True):
        null = sums if a.unit == "clause" else _window_sums(a.char_values, span)
        low, high = np.clip(100 * np.quantile(null, [0.25, 0.75]) / top, 0, 100)
        bars.append(
            {"value": float(value), "width": float(100 * abs(value) / top), "low": float(low), "high": float(high)}
        )
    return bars


def clause_bars(result: PostResult, cited: np.ndarray) -> list[dict[str, Any]]:
    """One mirror chart per family: rows of clauses with label bar, explanation bar, and whether the clause is cited."""
    charts = []
    for method in leading(a.method for a in result.attributions):
        name = METHOD_NAMES[method]
        by_target = {a.target: a for a in result.attributions if a.method == method}
        left, right = (_bars(by_target.get(target), result.units) for target in ("label", "explanation"))
        if left is None and right is None:
            continue
        rows = []
        for i, (a, b) in enumerate(result.units):
            text = None if result.post is None else visible(result.post[a:b].strip())
            rows.append(
                {
                    "number": i + 1,
                    "text": text,
                    "span": f"{a}–{b}",
                    "cited": bool(cited[i]),
                    "left": left[i] if left else None,
                    "right": right[i] if right else None,
                }
            )
        charts.append({"method": method, "name": name, "rows": rows})
    return charts


def erasure(result: PostResult, evidence: Evidence) -> dict[str, Any] | None:
    """The erasure strip: change of the log-odds on a common axis, in percent.

    ``dots``: each clause hidden alone. ``rows``: the cited words hidden together, and only they left, each with the
    middle nine tenths of what the same part of other clauses does (``probes.checks.faithfulness``); the band is None
    where the post is too short for such a null.
    """
    a = next((a for a in result.attributions if (a.method, a.target) == ("erase", "label")), None)
    if a is None or a.unit != "clause" or not np.isfinite(a.values).all():
        return None
    rows, ends = [], [0.0, *(-a.values).tolist(), a.f_baseline - a.f_input]
    for name, sign, words in (("necessity", -1, "cited words hidden"), ("sufficiency", 1, "only cited words left")):
        check = check_of(evidence, name, "erase")
        if check is None or check.status != "ok" or check.value is None:
            continue
        band = sorted(sign * q for q in (check.null_q05, check.null_q95) if q is not None)
        mean = None if check.null_mean is None else sign * check.null_mean
        rows.append({"name": words, "value": sign * check.value, "band": band, "mean": mean, "p": check.p})
        ends += [sign * check.value, *band]
    low, high = min(ends), max(ends)
    pad = 0.06 * max(high - low, 1e-9)
    low, high = low - pad, high + pad

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    cited = evidence.cited
    dots = [{"x": at(-v), "value": -float(v), "number": i + 1, "cited": bool(cited[i])} for i, v in enumerate(a.values)]
    for row in rows:
        row |= {"x": at(row["value"]), "low": at(row["band"][0]), "high": at(row["band"][1])} if row["band"] else {}
        row["x"] = at(row["value"])
    return {
        "zero": at(0.0),
        "dots": sorted(dots, key=lambda dot: dot["cited"]),
        "rows": rows,
        "all": a.f_baseline - a.f_input,
        "all_x": at(a.f_baseline - a.f_input),
    }


def chain(result: PostResult) -> dict[str, Any] | None:
    """The strip that shows when the label was decided: a cell per step of the chain, as dark as the label is likely."""
    if not result.chain:
        return None
    width = 100 / len(result.chain)
    cells = [
        {"x": at * width, "share": share, "value": value, "shade": 1 / (1 + math.exp(-max(-30.0, min(30.0, value))))}
        for at, (share, value) in enumerate(result.chain)
    ]
    return {"cells": cells, "width": width, "decided": decided_at(result.chain)}


def method_agreement(evidence: Evidence) -> list[dict[str, Any]]:
    """Pearson r between the label maps of each two methods on clauses, least first; only maps through their gate.

    A method without a sign is compared with the positive part of the other.
    """
    found = []
    methods = [m for m in METHOD_NAMES if m in evidence.label_maps]
    for i, one in enumerate(methods):
        for other in methods[i + 1 :]:
            maps = evidence.mass if not {one, other} <= set(FAMILIES) else evidence.label_maps
            r = pearson(maps[one], maps[other])
            pair = f"{METHOD_NAMES[one]} and {METHOD_NAMES[other]}"
            found.append({"methods": (one, other), "pair": pair, "r": r if math.isfinite(r) else None})
    return sorted(found, key=lambda row: 2.0 if row["r"] is None else row["r"])


def lights(result: PostResult, evidence: Evidence) -> list[dict[str, str]]:
    """The gates in words: state good | bad | none."""
    found = []
    ig = next((a for a in result.attributions if (a.method, a.target) == ("ig", "label")), None)
    if ig is None:
        found.append(("none", "no integrated gradients", "This budget does not run them, so no verdict is possible."))
    else:
        delta = "?" if ig.rel_delta is None else percent(ig.rel_delta)
        words = "converged" if ig.converged else "did not converge"
        found.append(
            (
                "good" if ig.converged else "bad",
                f"gradients {words}",
                f"Completeness error {delta} of the score change.",
            )
        )
    moved = "erase" in evidence.mass
    found.append(
        (
            "good" if moved else "bad",
            "erasure moves the label" if moved else "erasure moves nothing",
            "Gate: at least 0.1 nats in all.",
        )
    )
    grounded = sum(bool(c.post_char) for c in result.citations)
    found.append(
        (
            "good" if grounded else "bad",
            f"{grounded} cited {'phrase' if grounded == 1 else 'phrases'} found" if grounded else "nothing cited",
            "Quotes, cue verbs and common phrases of the explanation that are in the post.",
        )
    )
    invented = check_of(evidence, "fabricated_quote_rate", "align")
    if invented is None or invented.value is None:
        found.append(("none", "no quotes", "The explanation has no quotation marks around words of the post."))
    else:
        count = round(invented.value * invented.n)
        found.append(
            (
                "bad" if count else "good",
                f"{count} invented {'quote' if count == 1 else 'quotes'}" if count else "all quotes are real",
                f"{invented.n} in quotation marks, {count} not in the post.",
            )
        )
    return [{"state": state, "words": words, "why": why} for state, words, why in found]


def not_varied(result: PostResult) -> list[str]:
    """What of a post no map could vary, in words: its ends in tokens that also hold characters of the prompt."""
    if not result.border:
        return []
    tokens = "1 token" if result.border == 1 else f"{result.border} tokens"
    where = ", ".join(f"{a + 1} to {b}" if b > a + 1 else str(b) for a, b in result.not_varied)
    holds = f"characters {where} have" if sum(b - a for a, b in result.not_varied) > 1 else f"character {where} has"
    said = f"{tokens} at an end of the post also hold characters of the prompt and stay as they are"
    return [f"{said}; {holds} no saliency because nothing varied them" if where else said]


_CONTRAST = {
    "log p": "the label has no other candidate: its score is a plain log-probability, not a contrast",
    "reworded": "the label stands in other words than its candidate's; the others are compared in the same words",
    "unlisted": "the label sentence is none of the candidates; its score is its log-odds against all of them",
}


def _why(evidence: Evidence) -> str:
    """The verdict in one sentence; an inconclusive one gives its reason (``verdict.decide`` puts it first)."""
    if evidence.report.verdict in VERDICT_WORDS:
        return VERDICT_WORDS[evidence.report.verdict]
    reason = evidence.report.notes[0] if evidence.report.notes else "the maps do not settle it"
    return f"{reason[0].upper()}{reason[1:]}."


def coincidence(evidence: Evidence) -> str | None:
    """ "1 place in 6 would have agreed by chance"."""
    found = next((c for c in evidence.report.checks if c.name == "coincidence"), None)
    if found is None or found.value is None:
        return None
    agree = round(found.value * found.n)
    verb = "agrees" if agree == 1 else "agree"
    return f"Of the {found.n} places this citation could have had, {agree} {verb} with the maps."


def suspicion(result: PostResult, evidence: Evidence) -> float:
    """0 .. 100 for sorting only: verdict first, then invented quotes, then how little saliency the cited words hold."""
    base = {"contradicted": 60.0, "inconclusive": 30.0, "supported": 0.0}[evidence.report.verdict]
    invented = check_of(evidence, "fabricated_quote_rate", "align")
    rate = 0.0 if invented is None or invented.value is None else invented.value
    shares = [
        c.value for m in FAMILIES if (c := check_of(evidence, "mass_ratio", m)) is not None and c.value is not None
    ]
    missing = 1 - float(np.mean(shares)) if shares else 0.5
    return round(base + 20 * rate + 20 * missing, 1)


def card(rank: int, result: PostResult, evidence: Evidence) -> dict[str, Any]:
    """Everything the template shows about one post."""
    label = next((a for a in result.attributions if a.target == "label"), None)
    mass = {m: check_of(evidence, "mass_ratio", m) for m in METHOD_NAMES}
    mask = char_mask([s for c in result.citations for s in c.post_char], result.length)
    present = {(a.target, a.method) for a in result.attributions}
    return {
        "rank": rank,
        "anchor": f"post-{rank}",
        "id": visible(result.id),
        "task": plain(result.task.replace("_", " ")),
        "label": visible(result.label),
        "label_text": None if result.label_text is None else visible(result.label_text),
        "log_odds": None if label is None else label.f_input,
        "verdict": evidence.report.verdict,
        "verdict_words": _why(evidence),
        "coincidence": coincidence(evidence),
        "notes": [
            *evidence.report.notes,
            *not_varied(result),
            *([_CONTRAST[result.contrast]] if result.contrast in _CONTRAST else []),
        ],
        "lights": lights(result, evidence),
        "suspicion": suspicion(result, evidence),
        "redacted": result.post is None,
        "language": language(result.post),
        "length": result.length,
        "cited_share": float(mask.mean()) if result.length else 0.0,
        "groups": groups(result),
        "phrases": phrases(result),
        "layers": [
            {"code": code, "target": t, "method": METHOD_NAMES[m]}
            for (t, m), code in LAYERS.items()
            if (t, m) in present
        ],
        "charts": clause_bars(result, evidence.cited),
        "erasure": erasure(result, evidence),
        "chain": chain(result),
        "agreement": method_agreement(evidence),
        "has_phrase_maps": bool(phrase_maps(result)),
        "mass": {m: None if c is None or c.status == "abstain" else c for m, c in mass.items()},
        "checks": evidence.report.checks,
    }
