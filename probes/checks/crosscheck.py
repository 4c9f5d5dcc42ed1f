"""Does the explanation cite what the label used? All checks of one post.

Three questions are kept apart, because mixing them is how such reports overclaim:

1. *Measurement*: where do two methods of different families (integrated gradients; erasure) put the label's saliency,
   and is that in the cited words? Per post; ``probes.checks.verdict`` puts it into one word.
2. *Coincidence*: how many other places for the citation would have agreed as well? Per post, the check ``coincidence``.
3. *Inference*: does the model cite what it uses more than chance? Per data set only
   (``probes.results.summary``): the headline.

Every check carries the distribution of its value under its null (``probes.nulls``): for a map on characters all
circular shifts by its smallest pieces (``atoms``), for a map on clauses all rotations over the clauses. ``n`` is the
number of shifts, so no p-value is below 1 / n. The p-values of one post guard against a smooth random map; they do not
exclude coincidence among few clauses.

A method speaks only through its gate: ig when its completeness error converged, ig and erasure when the post moves the
label at all. ``gradnorm`` has no sign and no completeness; it is shown for screening and never enters a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes import stats
from probes.checks.agreement import f1_at_k, iou_f1, kendall_w, mean_pairwise, pearson, rotated, spearman, top_overlap
from probes.checks.erasure_offset import offsets
from probes.checks.verdict import FAMILIES, LabelMap, decide, gate, p_notes
from probes.citations.align import coverage, fabricated_quotes, merge_spans, turned_quotes
from probes.errors import ProbeInputError
from probes.nulls import (
    arrangements,
    atom_null,
    atoms,
    band,
    circular_cosine,
    p_greater,
    placement_null,
    require_null,
    rotations,
    shift_null,
)
from probes.records import Attribution, Check, Citation, Example, Report, Span


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one post contributes to the data set. k clauses.

    Attributes:
        report: its checks and verdict.
        label: the model's label.
        excess: method -> float64 [k]: excess mass of the cited clauses under all rotations (index 0: as cited); only
            maps that pass their gate, and none when nothing is cited.
        mass: method -> float64 [k], positive label saliency per clause, maps that pass their gate only.
        label_maps, explanation_maps: method -> float64 [k], signed, maps that pass their gate only.
        lengths: float64 [k] characters. cited: bool [k].
        chance: verdict -> share of the places the citation could have had that would have got it.
        user: author of the post, if known.
    """

    report: Report
    label: str
    excess: dict[str, np.ndarray]
    mass: dict[str, np.ndarray]
    label_maps: dict[str, np.ndarray]
    explanation_maps: dict[str, np.ndarray]
    lengths: np.ndarray
    cited: np.ndarray
    chance: dict[str, float]
    user: str | None = None


def char_mask(spans: Sequence[Span], length: int) -> np.ndarray:
    """bool [length]: True inside the spans."""
    mask = np.zeros(length, bool)
    for a, b in spans:
        mask[a:b] = True
    return mask


def units_hit(spans: Sequence[Span], units: Sequence[Span]) -> np.ndarray:
    """bool [units]: units that share with some span at least a third of the unit or of the span (no slivers)."""
    x, y = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    hit = np.zeros(len(units), bool)
    for i, (a, b) in enumerate(units):
        common = np.minimum(b, y) - np.maximum(a, x)
        hit[i] = ((common > 0) & ((3 * common >= b - a) | (3 * common >= y - x))).any()
    return hit


def unit_sums(char_values: np.ndarray, units: Sequence[Span]) -> np.ndarray:
    """float64 [units]: sum over the characters of each unit."""
    return np.array([char_values[a:b].sum() for a, b in units], dtype=np.float64)


def post_units(attributions: Sequence[Attribution], post: str, cut: str | None = None) -> tuple[Span, ...]:
    """Clauses of the post: those a map already lives on, so that all maps are compared on the same, else cut anew."""
    for a in attributions:
        if a.unit == "clause":
            return tuple(a.unit_spans)
    from probes.citations.clauses import pieces

    return tuple(pieces(post, cut=cut))


def label_maps(
    attributions: Sequence[Attribution], units: Sequence[Span], measured: Sequence[Check] = ()
) -> tuple[dict[str, LabelMap], list[Check]]:
    """The label's maps on clauses by method, those that may not speak marked; and the checks of one against another.

    Args:
        measured: checks that needed the model; a map for which one has status "failed_gate" may not speak.
    """
    nets = {a.method: unit_sums(a.char_values, units) for a in attributions if a.target == "label"}
    contrast = offsets(nets)
    shut = {c.method: c.name for c in reversed([*contrast, *measured]) if c.status == "failed_gate"}
    maps = {
        a.method: LabelMap(
            a,
            unit_sums(np.maximum(a.char_values, 0.0), units),
            nets[a.method],
            gate(a) or (f"failed the gate {shut[a.method].replace('_', ' ')}" if a.method in shut else None),
        )
        for a in attributions
        if a.target == "label"
    }
    return maps, contrast


def examine(
    attributions: Sequence[Attribution],
    citations: Sequence[Citation],
    *,
    example_id: str,
    length: int,
    units: Sequence[Span],
    label: str = "",
    explanation_length: int = 0,
    cues: Sequence[Span] | None = None,
    decoys: Sequence[Span] | None = None,
    measured: Sequence[Check] = (),
    rationales: Sequence[Span] | None = None,
    user: str | None = None,
    null: str = "circular",
    n_boot: int = 2000,
    seed: int = 0,
) -> Evidence:
    """All checks of one post.

    Args:
        attributions: maps of this post; targets "label" and "explanation" are used, others ignored.
        citations: from ``align``.
        length: characters of the post. units: its clauses, character spans that cover it.
        explanation_length: characters of the explanation. cues, decoys: known spans in the post, if any.
        measured: checks already made that needed the model; they are reported as they are, and a map for which one of
            them has status "failed_gate" may not speak.
        rationales: spans of the post that people marked, for plausibility.
        null: for maps on characters "circular" (all shifts; exact) or "placement" (``n_boot`` random placements of
            spans of the same lengths); maps on clauses are always rotated.

    Raises:
        ProbeInputError: a map of another post or of another length, or an unknown null.
    """
    require_null(null)
    for a in attributions:
        if a.example_id != example_id or len(a.char_values) != length:
            where = f"{a.example_id!r} over {len(a.char_values)} characters"
            raise ProbeInputError(f"{example_id}: got a map of {where}; the post has {length}")
    grounded = tuple(c for c in citations if c.post_char)
    spans = merge_spans(span for c in grounded for span in c.post_char)
    mask, cited = char_mask(spans, length), units_hit(spans, units)
    lengths = np.array([b - a for a, b in units], dtype=np.float64)
    maps, contrast = label_maps(attributions, units, measured)
    explained = {a.method: a for a in attributions if a.target == "explanation"}
    ids = tuple(c.id for c in grounded)
    checks: list[Check] = []
    marked = units_hit(rationales, units) if rationales else cited
    known = {name: units_hit(s, units) for name, s in (("cue_auroc", cues), ("decoy_auroc", decoys)) if s}
    for method, m in maps.items():
        passed = "failed_gate" if m.blocked else "ok"
        if not grounded:
            checks.append(_empty("mass_ratio", method, "abstain"))
        else:
            draws, expected = _mass_null(m, mask, cited, lengths, null, n_boot, seed)
            checks.append(_check("mass_ratio", method, draws, passed, ids, expected))
            if m.attribution.unit != "clause":
                starts, sizes = atoms(m.attribution.char_values)
                placed = np.add.reduceat(mask.astype(np.float64), starts) * 2 >= sizes
                shifts = shift_null(m.attribution.char_values[starts], placed, "auroc")
                checks.append(_check("auroc_char", method, shifts, passed, ids))
            checks += _ranking("", m, cited, units, passed, ids)
        if rationales:
            share = rotations(m.mass, lengths, marked) + float(lengths[marked].sum() / lengths.sum())
            checks.append(_check("plausibility_mass", method, share, passed))
            checks += _ranking("plausibility_", m, marked, units, passed)
        if method in explained:
            checks += _consistency(m, explained[method], units)
        for name, hit in known.items():
            checks.append(_check(name, method, shift_null(m.net, hit, "auroc"), passed))
    speaking = [m for method, m in maps.items() if method in FAMILIES and not m.blocked]
    if len(speaking) > 1:
        pair = "~".join(m.method for m in speaking[:2])
        checks.append(_check("agreement", pair, circular_cosine(speaking[0].mass, speaking[1].mass), "ok"))
        nets, everyone = [m.net for m in speaking], "+".join(m.method for m in speaking)
        for name, value in (
            ("explainers_pearson", mean_pairwise(pearson, nets)),
            ("explainers_w", kendall_w(nets)),
        ):
            checks.append(_value(name, everyone, value, len(nets), ()))
    verdict, chance, notes = decide(maps, lengths, cited, mask)
    if chance:
        both, places = "+".join(m.method for m in speaking), len(arrangements(cited))
        checks.append(_value("coincidence", both, chance["coincidence"], places, ids))
    fabricated, quotes = fabricated_quotes(citations)
    quoted = tuple(c.id for c in citations if c.kind == "quote")
    checks.append(_value("fabricated_quote_rate", "align", fabricated / quotes if quotes else math.nan, quotes, quoted))
    checks.append(_value("coverage", "align", coverage(citations, explanation_length), explanation_length, ids))
    checks += [*contrast, *measured]
    if rationales:
        plain = f1_at_k(marked.astype(float), cited) if cited.any() else math.nan
        checks.append(_value("plausibility_citations", "align", plain, len(units), ids))
    notes += _missing_text(checks)
    if fabricated:
        notes.append(f"{fabricated} of {quotes} quotes are not in the post")
    if against := turned_quotes(citations):
        notes.append(f"{against} of {quotes} quotes leave out or put in a negation")
    open_maps = {method: m for method, m in maps.items() if not m.blocked}
    return Evidence(
        report=Report(example_id, tuple(checks), verdict, tuple(notes + p_notes(checks))),
        label=label,
        excess={method: rotations(m.mass, lengths, cited) for method, m in open_maps.items() if cited.any()},
        mass={method: m.mass for method, m in open_maps.items()},
        label_maps={method: m.net for method, m in open_maps.items()},
        explanation_maps={method: unit_sums(a.char_values, units) for method, a in explained.items() if not gate(a)},
        lengths=lengths,
        cited=cited,
        chance=chance,
        user=user,
    )


def cross_check(
    attributions: Sequence[Attribution],
    citations: Sequence[Citation],
    example: Example,
    null: str = "circular",
    n_boot: int = 2000,
    seed: int = 0,
) -> Report:
    """Checks and verdict for one post; arguments and errors as in ``examine``.

    Returns:
        checks, each with its null: ``mass_ratio`` (headline: share of the positive label saliency in the cited words,
        by chance their share of the length), ``auroc_char``, ``auroc_clause``, ``ap_clause``, ``f1_clause``,
        ``iou_f1``; ``cosine``, ``pearson``, ``top_overlap`` and ``spearman`` (label map against explanation map on
        clauses); ``plausibility_*`` (against what people marked) and ``cue_auroc`` / ``decoy_auroc`` where known;
        ``agreement`` of the first two maps, ``explainers_pearson`` and ``explainers_w`` (Kendall) of all that may
        speak; ``coincidence``, ``fabricated_quote_rate``, ``coverage``; the verdict; notes in words.
    """
    return examine(
        attributions,
        citations,
        example_id=example.id,
        length=len(example.post),
        units=post_units(attributions, example.post, example.cut),
        label=example.label,
        explanation_length=len(example.explanation or ""),
        cues=example.cues,
        decoys=example.decoys,
        rationales=example.rationales,
        null=null,
        n_boot=n_boot,
        seed=seed,
    ).report


def _missing_text(checks: Sequence[Check]) -> list[str]:
    """Where hiding other words of the same amount does most of what hiding the cited ones does."""
    return [
        f"hiding the cited words costs the label {c.value:.2f} nats, hiding as many other words {c.null_mean:.2f}: "
        "most of it is that text is missing"
        for c in checks
        if c.name == "necessity"
        and c.value is not None
        and c.null_mean is not None
        and c.null_mean * c.value > 0
        and 2 * abs(c.null_mean) > abs(c.value) >= 0.1
    ]


def _empty(name: str, method: str, status: str) -> Check:
    return Check(name, method, None, None, None, None, None, None, 0, status, ())


def _value(name: str, method: str, value: float, n: int, inputs: tuple[str, ...]) -> Check:
    """A check without a null of its own."""
    if math.isnan(value):
        return _empty(name, method, "abstain")
    return Check(name, method, float(value), None, None, None, None, None, n, "ok", inputs)


def _check(
    name: str, method: str, null: np.ndarray, status: str, inputs: tuple[str, ...] = (), expected: float | None = None
) -> Check:
    """A check from its statistic under all shifts, the observed one at index 0."""
    if not np.isfinite(null).all():
        return _empty(name, method, "abstain" if status == "ok" else status)
    low, high = band(null)
    mean = float(null.mean()) if expected is None else expected
    p = p_greater(null)
    return Check(name, method, float(null[0]), mean, low, high, p, None, len(null), status, inputs)


def _mass_null(
    m: LabelMap, mask: np.ndarray, cited: np.ndarray, lengths: np.ndarray, null: str, n_boot: int, seed: int
) -> tuple[np.ndarray, float]:
    """Mass share under the null, and what it is by chance.

    A map that lives on clauses is compared on whole clauses, rotated by clause: it has no finer truth, and shifting it
    by characters would pretend to one.
    """
    if m.attribution.unit == "clause":
        expected = float(lengths[cited].sum() / lengths.sum())
        return rotations(m.mass, lengths, cited) + expected, expected
    values = m.attribution.char_values
    if null == "placement":
        starts, sizes = atoms(values)
        placed = np.add.reduceat(mask.astype(np.float64), starts) * 2 >= sizes
        draws = placement_null(np.add.reduceat(np.maximum(values, 0.0), starts), placed, n_boot, seed)
        return draws, float(sizes[placed].sum() / sizes.sum())
    return atom_null(values, mask), float(mask.mean())


def _ranking(
    prefix: str, m: LabelMap, marked: np.ndarray, units: Sequence[Span], status: str, ids: tuple[str, ...] = ()
) -> list[Check]:
    """AUROC, average precision, F1 of the top-k and IOU-F1 of its runs, each against all rotations over the clauses."""

    edges = np.array(units)

    def overlap(net: np.ndarray, cited: np.ndarray) -> float:
        return iou_f1(net, cited, edges)

    nulls = {
        "auroc_clause": shift_null(m.net, marked, "auroc"),
        "ap_clause": rotated(stats.average_precision, m.net, marked),
        "f1_clause": rotated(f1_at_k, m.net, marked),
        "iou_f1": rotated(overlap, m.net, marked),
    }
    return [_check(prefix + name, m.method, null, status, ids) for name, null in nulls.items()]


def _consistency(m: LabelMap, explained: Attribution, units: Sequence[Span]) -> list[Check]:
    """Label map against explanation map on clauses, by four measures, against all rotations of one over the other."""
    if len(units) < 3:
        return []
    status = "failed_gate" if m.blocked or gate(explained) else "ok"
    other = unit_sums(explained.char_values, units)
    return [
        _check("cosine", m.method, circular_cosine(m.net, other), status),
        _check("pearson", m.method, circular_cosine(m.net - m.net.mean(), other - other.mean()), status),
        _check("top_overlap", m.method, rotated(top_overlap, m.net, other), status),
        _check("spearman", m.method, rotated(spearman, m.net, other), status),
    ]
