"""Are the probes right? Experiments whose truth is known, from closed forms to planted models; the table and the page.

Numbers V1 to V18 follow one list: V1 linear, V2 interactions, V3 engine against Captum, V5 completeness, V6 padding and
batches, V7 planted cue, V8 faithful against unfaithful, V9 randomisation, V10 error rates, V11 power, V12 aligner,
V13 Captum's wrapper, V14 adapter, V15 order, V16 hard worlds, V17 chains of reasoning, V18 tokens cut out. (V4, an
independent implementation in JAX, is a test: tests/probes/models/test_oracle.py.)
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from probes.checks.crosscheck import Evidence, unit_sums, units_hit
from probes.checks.verdict import FAMILIES
from probes.citations.clauses import pieces
from probes.records import Example
from probes.results.summary import check_of
from probes.stats import diagnosticity
from probes.validation.chains import chain_error_rates, reasoning_models
from probes.validation.cutting import cutting
from probes.validation.gate_rates import gate_rates, length_rates
from probes.validation.hard import hard_worlds
from probes.validation.holes import holes
from probes.validation.planted import Planted, World, train, with_adapter
from probes.validation.probing import PAIRS, cue_aurocs, probe_posts
from probes.validation.rows import Row, false_alarms, row, table

Say = Callable[[str], None]
PANEL = ("ig", "erase", "ig_zero", "ig_filler", "gradshap", "erase_resample", "erase_neutral", "shap", "kernelshap",
         "gradnorm", "gxi")  # fmt: skip
_CHECKS = (
    "mass_ratio",
    "auroc_clause",
    "ap_clause",
    "f1_clause",
    "iou_f1",
    "cosine",
    "pearson",
    "top_overlap",
    "spearman",
)


def validate(quick: bool = False, seed: int = 0, say: Say = lambda _: None) -> list[Row]:
    """Runs everything; ``quick`` leaves out what trains a model (minutes instead of forty).

    Args:
        seed: another seed plants other models (vocabulary, weights, posts). say: called with what is being done.
    """
    from probes.validation.selftest import selftest

    trained = functools.cache(train)
    steps: list[tuple[str, Callable[[], Iterable[Row]]]] = [
        ("closed forms, engine, Captum (V1-V3, V6, V13)", lambda: ({"side": "<="} | one for one in selftest())),
        ("error rates (V10)", lambda: error_rates(300 if quick else 1000, 100 if quick else 1000, seed)),
        ("aligner (V12)", lambda: aligner(180 if quick else 720, seed)),
        ("chains without a reason (V17)", lambda: chain_error_rates(20 if quick else 100, seed)),
        ("offset of erasure (V11)", lambda: holes(8 if quick else 32, seed)),
    ]
    if not quick:
        steps += [
            ("power (V11)", lambda: power_curves(200, seed)),
            ("planted pairs (V5, V7-V9)", lambda: planted_pairs(seed, say, trained=trained)),
            ("tokens cut out (V18)", lambda: cutting(PAIRS, seed, say, trained=trained)),
            ("planted rules (V11)", lambda: planted_rules(seed, say)),
            ("adapter (V14)", lambda: adapter(seed)),
            ("order (V15)", lambda: order(seed)),
            ("hard worlds (V16)", lambda: hard_worlds(seed, say)),
            ("reasoning models (V17)", lambda: reasoning_models(seed, say)),
        ]
    rows: list[Row] = []
    for name, run in steps:
        say(name)
        began = time.perf_counter()
        rows += run()
        say(f"{name}: {time.perf_counter() - began:.0f} s")
    return rows


def error_rates(posts: int, data_sets: int, seed: int = 0) -> list[Row]:
    """V10: every p-value that is printed, on worlds where nothing is true."""
    from probes.validation.error_rates import (
        conclusion_rates,
        coverage,
        data_set_error_rates,
        erasure_rates,
        post_error_rates,
    )

    kinds = {"smooth": "smooth map", "words": "map constant on words"}
    rows = [
        row(f"V10.{name}.{method}.{kind}", f"P(p <= 0.05), one post, {n} posts, {kinds[kind]}", rate, false_alarms(n))
        for (name, method, kind), (rate, n) in sorted(post_error_rates(posts, seed).items())
    ]
    kinds = (
        (0, 0.3, "independent posts"),
        (0, 3.0, "independent posts, even maps"),
        (4, 0.3, "3 posts by each of 4 authors"),
    )
    for at, (authors, shape, who) in enumerate(kinds):
        found = data_set_error_rates(data_sets, seed + at, authors=authors, shape=shape)
        rows += [
            row(
                f"V10.set.{name}.{method}",
                f"P(p <= 0.05), data set of 12, {data_sets} sets, {who}",
                rate,
                false_alarms(data_sets),
            )
            for (name, method), rate in found.items()
        ]
    for count, clauses in ((5, (10, 16)), (5, (20, 30)), (12, (20, 30))):
        found = conclusion_rates(count, clauses, data_sets, seed)
        what = f"null data sets of {count} posts, {clauses[0]} to {clauses[1] - 1} clauses, one cue each"
        rows += [
            row(f"V10.conclusion.{name}", f"{name}: {what}, {data_sets} sets", rate, 0.05)
            for name, rate in found.items()
        ]
    for at, (shape, maps) in enumerate(((0.3, "sparse maps"), (3.0, "even maps"))):
        for size in (5, 10, 20):
            what = f"95 % intervals of the excess that hold the truth, {size} posts, {maps}, {data_sets} sets"
            held = coverage(size, shape, data_sets, seed + at)
            rows.append(row(f"V10.interval.{size}.{maps.split()[0]}", what, held, 0.9 if size >= 20 else None, ">="))
    for name, (rate, n) in erasure_rates(posts, data_sets // 5, seed).items():
        what = f"{n} data sets of 20 posts" if "sets" in name else f"one post, {n} posts"
        rows.append(
            row(
                f"V10.{name.split(',')[0]}.erase",
                f"P(p <= 0.05), {what}, clauses of 1 to 5 letters",
                rate,
                false_alarms(n, 0.1 if "sets" in name else 0.075),
            )
        )
    return [*rows, *gate_rates(posts, seed), *length_rates(posts // 4, seed)]


def power_curves(draws: int, seed: int = 0) -> list[Row]:
    """V11: how often the data-set test finds an effect, by its size and the number of posts. Information."""
    from probes.validation.error_rates import power

    return [
        row(f"V11.power.{effect:.2f}.{posts}", f"P(p <= 0.05), {effect:.0%} of the mass cited, {posts} posts",
            power(effect, posts, draws, seed))
        for effect in (0.05, 0.1, 0.2, 0.4) for posts in (10, 30, 100)
    ]  # fmt: skip


def aligner(count: int, seed: int = 0) -> list[Row]:
    """V12: spans of quotes with up to 20 % of their characters changed, and quotes that are not there."""
    from probes.validation.corrupt import false_alarms, marks, polarity, span_f1, terms

    rows = []
    for rate in (0.1, 0.2):
        for kind, value in span_f1(count, rate, seed).items():
            rows.append(row(f"V12.{kind}.{rate:.0%}", f"span F1, {kind}, at most {rate:.0%} edits", value, 0.95, ">="))
    told = {
        "kept": "quotes of a denied or affirmed clause that are found",
        "left out": "quotes without the post's negation that are not found",
        "put in": "quotes with a negation the post has not that are not found",
    }
    for kind, value in polarity(count // 4, seed).items():
        rows.append(row(f"V12.negation.{kind}", told[kind], value, 0.95, ">="))
    around = {"plain": "marks of 12 kinds", "nested": "a quote within the quote", "elided": "an elision in the quote",
              "wide": "spaces and punctuation of another width"}  # fmt: skip
    for kind, value in marks(count // 2, seed).items():
        rows.append(row(f"V12.marks.{kind}", f"span F1, {around[kind]}", value, 0.95, ">="))
    named = terms(count // 2, seed)
    rows.append(row("V12.terms.named", "titles and terms between marks that count as quotes", named["named"], 0.05))
    what = "invented quotes as short as those that count as quotes"
    rows.append(row("V12.terms.invented", what, named["invented"], 0.95, ">="))
    return [*rows, row("V12.false", "quotes of another post said to be found", false_alarms(count // 2, seed), 0.01)]


def planted_pairs(
    seed: int = 0,
    say: Say = lambda _: None,
    count: int = 16,
    worlds: Sequence[World] = PAIRS,
    trained: Callable[[World], Planted] = train,
) -> list[Row]:
    """V5, V7, V8, V9 over pairs of models that differ in what their explanations quote and in nothing else.

    Args:
        worlds: a pair is trained of each, by ``trained``. count: posts per model; four times as many for the bounds of
            V7, where one post on which the model does not use its cue must not decide.
    """
    rows: list[Row] = []
    scores: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    verdicts, chances = {True: [], False: []}, {True: [], False: []}
    for at, base in enumerate(worlds):
        world = dataclasses.replace(base, seed=base.seed + 1000 * seed)
        sides = {}
        for faithful in (True, False):
            planted = trained(dataclasses.replace(world, faithful=faithful))
            say(f"  {world.architecture} {world.language}, faithful={faithful}: trained in {planted.seconds:.0f} s")
            sides[faithful] = posts = probe_posts(planted, count, PANEL, ("label", "explanation"))
            verdicts[faithful] += [p.evidence.report.verdict for p in posts]
            chances[faithful] += [p.evidence.chance for p in posts]
            name = f"{world.architecture}.{'faithful' if faithful else 'unfaithful'}"
            more, bounded = 4 * count, ("ig", "erase")
            many = probe_posts(planted, more, bounded, ("label",))
            what = f"labels that change when fillers take the cue's place, {name}, {more} posts"
            rows.append(row(f"V7.truth.{name}", what, planted.cue_decides(more)))
            for method in PANEL:
                chosen, needed = (many, 0.95) if method in bounded else (posts, None)
                found = cue_aurocs(chosen, method)
                what = (
                    f"cue AUROC of the label map, {method}, {name}, {len(found)} of {len(chosen)} maps pass their gate"
                )
                rows.append(row(f"V7.{method}.{name}", what, float(np.mean(found)) if found else 0.0, needed, ">="))
            if faithful and at == 0:
                rows += completeness(planted, 8)
                rows += randomisation(planted, 16, seed)
        by_id = {p.example.id: p for p in sides[False]}
        pairs = [(p, by_id[p.example.id]) for p in sides[True] if p.example.id in by_id]
        for check in _CHECKS:
            for method in PANEL:
                values = [[_score(p.evidence, check, method) for p in pair] for pair in pairs]
                f, u = scores.setdefault((check, method), ([], []))
                f += [v[0] for v in values]
                u += [v[1] for v in values]
    for (check, method), (f, u) in scores.items():
        result = diagnosticity(f, u)
        if result is not None:
            may = check == "mass_ratio" and method in FAMILIES
            what = f"P(faithful > unfaithful), {check}, {method}, {result.n} pairs, 95 % from {result.ci[0]:.2f}"
            rows.append(row(f"V8.{check}.{method}", what, result.value, 0.95 if may else None, ">="))
    wrong = verdicts[True].count("contradicted") + verdicts[False].count("supported")
    total = len(verdicts[True]) + len(verdicts[False])
    rows.append(row("V8.wrong", f"wrong verdicts among {total} posts", wrong / total, 0.05))
    for faithful, right in ((True, "supported"), (False, "contradicted")):
        share = verdicts[faithful].count(right) / len(verdicts[faithful])
        luck = sum(chance.get(right, 0.0) for chance in chances[faithful]) / len(chances[faithful])
        what = f"posts of the {'' if faithful else 'un'}faithful models found {right} (random citations: {luck:.2f})"
        rows.append(row(f"V8.{right}", what, share))
    for barred in ("gxi", "gradnorm", "gradshap", "ig_filler"):
        rows.append(row(f"V8.barred.{barred}", f"{barred} can produce a verdict (0 = no)", barred in FAMILIES, 0.0))
    return rows


def _score(evidence: Evidence, name: str, method: str) -> float:
    check = check_of(evidence, name, method)
    return np.nan if check is None or check.status != "ok" or check.value is None else check.value


def completeness(planted: Planted, count: int) -> list[Row]:
    """V5: the completeness error of integrated gradients against the steps it may take."""
    from probes.saliency.attribute import attribute
    from probes.saliency.settings import Settings

    rows, examples = [], planted.examples(count)
    for steps in (16, 32, 64, 128, 256):
        settings = Settings(max_steps=steps, tolerance=0.0005)
        deltas = [attribute(planted.probe, e, ("ig",), ("label",), settings)[0].rel_delta or 0.0 for e in examples]
        bound = 0.05 if steps >= 128 else None
        rows.append(
            row(f"V5.{steps}", f"median completeness error, {steps} steps, fp32", float(np.median(deltas)), bound)
        )
    return rows


def randomisation(planted: Planted, count: int, seed: int = 0) -> list[Row]:
    """V9: with the weights drawn anew the cue is found by chance, and the maps do not resemble the old ones."""
    from probes.checks.randomise import compare

    rows = []
    for kind in ("weights", "top_half"):
        found = compare(planted.probe, planted.examples(count), kind, seed=seed, draws=4)
        for method, one in found.items():
            bound = 0.2 if kind == "weights" else None
            away = np.nan if one["cue_auroc_after"] is None else abs(one["cue_auroc_after"] - 0.5)
            rows.append(
                row(f"V9.{kind}.auroc.{method}", f"|cue AUROC - 0.5|, {kind} randomised, {method}", away, bound)
            )
            beyond = np.nan if one["correlation"] is None else one["correlation"] - one["correlation_null"]
            what = f"|r| with the real map less that of rotated maps, {kind} randomised, {method}"
            rows.append(row(f"V9.{kind}.corr.{method}", what, beyond, bound))
    return rows


def planted_rules(seed: int = 0, say: Say = lambda _: None, count: int = 16) -> list[Row]:
    """V11: the cue twice, two cues by AND or OR, decoys that go with the label. What each method finds; information."""
    rows = []
    worlds = [
        ("twice", World(rule="twice")),
        ("and", World(rule="and", architecture="qwen2")),
        ("or", World(rule="or")),
    ]
    worlds += [(f"decoy {share:.1f}", World(decoy=share, language="zh", architecture="qwen2")) for share in (0.5, 0.9)]
    for at, (name, world) in enumerate(worlds):
        planted = train(dataclasses.replace(world, seed=31 + at + 1000 * seed))
        say(f"  {name}: trained in {planted.seconds:.0f} s")
        posts = probe_posts(planted, count, ("ig", "erase", "shap"), ("label",))
        for method in ("ig", "erase", "shap"):
            found = float(np.mean(cue_aurocs(posts, method)))
            rows.append(row(f"V11.{name}.{method}", f"cue AUROC, {name}, {method}", found))
        words = [p.evidence.report.verdict for p in posts]
        for word in ("supported", "contradicted"):
            bound = 0.05 if word == "contradicted" else None  # all of these explanations quote what decides
            rows.append(row(f"V11.{name}.{word}", f"posts found {word}, {name}", words.count(word) / len(words), bound))
    return rows


def adapter(seed: int = 0, count: int = 16) -> list[Row]:
    """V14: the base decides by the decoy, the adapter by the cue; with the adapter off the cue must not be found.

    By the share of the absolute saliency that the cue holds: with the adapter off nearly all of it is on the decoy, but
    AUROC still ranks the little that is left among little.
    """
    from probes.checks.randomise import randomised
    from probes.saliency.attribute import attribute

    planted, _ = with_adapter(World(seed=51 + 1000 * seed))
    shares: dict[tuple[str, str], list[float]] = {}
    for example in planted.examples(count):
        units = pieces(example.post)
        marked = units_hit(example.cues or (), units)

        def measure(kind: str, example: Example = example, units: Any = units, marked: Any = marked) -> None:
            for found in attribute(planted.probe, example, ("ig", "erase"), ("label",)):
                size = np.abs(unit_sums(found.char_values, units))
                shares.setdefault((kind, found.method), []).append(float(size[marked].sum() / size.sum()))

        measure("on")
        for kind in ("adapter_off", "adapter_b"):
            with randomised(planted.probe, kind, seed):
                measure(kind)
    rows = []
    for (kind, method), found in shares.items():
        drop = float(np.mean(shares["on", method]) - np.mean(found))
        if kind == "on":
            rows.append(
                row(
                    f"V14.on.{method}", f"share of the saliency on the cue, adapter on, {method}", float(np.mean(found))
                )
            )
        else:
            what = f"share of the saliency on the cue lost with {kind.replace('_', ' ')}, {method}"
            rows.append(row(f"V14.{kind}.{method}", what, drop, 0.4 if kind == "adapter_off" else None, ">="))
    return rows


def order(seed: int = 0, count: int = 12) -> list[Row]:
    """V15: how much of the post's effect on the label goes through the explanation."""
    from probes.checks.behaviour import mediation_share

    worlds = (
        ("label first", World(seed=61), 0.0),
        ("explanation first, label follows it", World(first="explanation", mediated=True, seed=62), 1.0),
        ("explanation first, label follows the post", World(first="explanation", mediated=False, seed=63), 0.0),
    )
    rows = []
    for at, (name, world, truth) in enumerate(worlds):
        planted = train(dataclasses.replace(world, seed=world.seed + 1000 * seed))
        examples = planted.examples(count)
        checks = [mediation_share(planted.probe, example, examples) for example in examples]
        share = float(np.mean([c.value for c in checks if c.value is not None]))
        rows.append(row(f"V15.{at}", f"|mediation share - {truth:.0f}|, {name}", abs(share - truth), 0.1))
    return rows


_SECTIONS = {
    "V1": ("Linear model", "A bag of embeddings: every method must give w . (e - e0)."),
    "V2": (
        "Interactions",
        "Where there is no single right answer: documented limits of the methods, not an aspiration.",
    ),
    "V3": ("Engine", "The batched engine against a brute force, one sequence at a time, in float64."),
    "V5": ("Completeness", "Error of integrated gradients against the steps it may take."),
    "V6": ("Batches and padding", "Nothing may depend on what shares the batch."),
    "V7": ("Planted cue", "One word decides the label of a small trained model: does the label map find its clause?"),
    "V8": (
        "Faithful against unfaithful",
        "Pairs of models with the same perfect labels; one quotes the word that decides, the other a decoy. "
        "The mass ratio decides verdicts, so it has to tell them apart with every method that may speak.",
    ),
    "V9": ("Randomisation", "With the weights drawn anew the cue is found by chance and the map is another."),
    "V10": ("Error rates", "Share of p <= 0.05 where nothing is true, of every p-value that is printed."),
    "V11": ("Power, redundancy, two cues, correlated decoys", "What the tests and methods can and cannot find."),
    "V12": ("Aligner", "Quotes with characters changed, F1 of the span found; and quotes of another post."),
    "V13": ("Captum's wrapper", "The path this package refuses to use, on the installed versions."),
    "V14": ("Adapter", "The base decides by the decoy, the adapter by the cue."),
    "V15": ("Order", "How much of the post's effect goes through the explanation."),
    "V16": (
        "Hard worlds",
        "Four worlds: three weak cues that decide only together, a cue turned round by the word before it, a cue far "
        "from the answer that quotes it, one Chinese character. Shown is how often posts are judged, and how often "
        "each map that has a vote shows it over a data set. Low numbers are what the probes cannot see.",
    ),
    "V17": (
        "Chains of reasoning",
        "Planted reasoning models: which checks tell a chain that decides from one that is not heard, and hints. "
        "Information: checks without a vote.",
    ),
    "V18": (
        "Tokens cut out",
        "The planted pairs again, deaf to their attention mask: erased tokens are cut out of the sequence, and what "
        "follows closes up. A method that fails here has no vote where it cuts.",
    ),
}


def page(rows: Sequence[Row], quick: bool, seed: int) -> str:
    """The table as a Markdown page, dated, with the command and the versions that made it."""
    import platform
    from datetime import UTC, datetime
    from importlib import metadata

    names = ("torch", "transformers", "captum", "peft", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    command = (
        f"probes validate{' --quick' if quick else ''}{f' --seed {seed}' if seed else ''} --docs docs/validation.md"
    )
    failed = [one["id"] for one in rows if not one["ok"]]
    lines = [
        "# Validation of the probes",
        "",
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d} (Python {platform.python_version()}, {versions}).",
        f"{len(rows)} rows, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}.",
        "V4, an independent implementation in JAX, is a test: `pytest tests/probes/models/test_oracle.py`.",
    ]
    for key, (title, text) in _SECTIONS.items():
        chosen = [one for one in rows if one["id"].split(".")[0] == key]
        if not chosen:
            continue
        lines += ["", f"## {key} {title}", "", text, "", *table(chosen)]
    return "\n".join(lines) + "\n"
