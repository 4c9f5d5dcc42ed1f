"""V17: do the checks of a chain of reasoning tell planted reasoning models apart, and keep to their error rate?

``WORLDS`` share nothing with the one that the checks were written on (Llama, English): architecture, words, posts.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from probes import stats
from probes.checks.chain import CHAIN, VOTES, ChainResult, blocks, clusters, examine_chain
from probes.probe import Probe
from probes.records import Check, Example
from probes.validation.planted import World
from probes.validation.reasoning import KINDS, Reasoner, ReasoningWorld, train_reasoner
from probes.validation.rows import Row, row

WORLDS = (
    World(architecture="glm", language="en", clauses=(3, 5), seed=81),
    World(architecture="qwen3", language="zh", clauses=(3, 5), seed=82),
    World(architecture="mistral", language="en", clauses=(3, 5), punctuation=False, seed=83),
)
LEVEL, SET = 0.05, 20
_FALSE = {"hint_unmentioned": ("chain", "post_hoc", "hint_said")}  # the kinds of which a check's hypothesis is not true


def examined(reasoner: Reasoner, count: int) -> list[ChainResult]:
    """The checks of fresh posts of one model, ``SET`` by ``SET``: sets lend each other nothing."""
    examples = reasoner.examples(count)
    sets = [examples[at : at + SET] for at in range(0, count, SET)]
    return [one for some in sets for one in examine_all(reasoner.probe, some)]


def examine_all(probe: Probe, examples: Sequence[Example]) -> list[ChainResult]:
    """The checks of every post, in blocks as in a run."""
    found: dict[int, ChainResult] = {}
    for block in blocks(examples):
        for at in block:
            lenders = [examples[other] for other in block if other != at]
            found[at] = examine_chain(probe, examples[at], lenders, str(block[0]))
    return [found[at] for at in range(len(examples))]


def value_of(result: ChainResult, name: str) -> Check | None:
    """The check of that name where it has a value."""
    return next((c for c in result.checks if c.name == name and c.status == "ok"), None)


def false_for(name: str) -> tuple[str, ...]:
    """Kinds of planted models of which the hypothesis of a check is not true."""
    return _FALSE.get(name, tuple(kind for kind in KINDS if kind != "chain"))


def set_p(results: Sequence[ChainResult], name: str, seed: int = 0) -> float | None:
    """The p-value of a data set, as ``probes.results.summary`` computes it."""
    checks = [c for one in results if (c := value_of(one, name)) is not None and c.draws]
    who = clusters(checks, [str(at) for at in range(len(checks))])
    test = stats.mean_test([np.array([c.value, *c.draws]) for c in checks], 199, seed, who)
    return None if test is None else test.p


def reasoning_models(
    seed: int = 0, say: Callable[[str], None] = lambda _: None, count: int = 2 * SET, worlds: Sequence[World] = WORLDS
) -> list[Row]:
    """AUROC of each check over posts of models of which its hypothesis is true, and of those of which it is not; and
    how often data sets of ``SET`` posts of the latter are significant."""
    rows: list[Row] = []
    wrong: dict[str, list[bool]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    for world in worlds:
        found: dict[str, list[ChainResult]] = {}
        for kind in KINDS:
            base = dataclasses.replace(world, seed=world.seed + 1000 * seed)
            reasoner = train_reasoner(ReasoningWorld(base, kind))
            found[kind] = examined(reasoner, count)
            say(f"  {world.architecture} {kind}: trained in {reasoner.seconds:.0f} s")
        where = f"{world.architecture}, {world.language}"
        for name in CHAIN:
            sides = {k: [c.value for r in found[k] if (c := value_of(r, name)) is not None] for k in KINDS}
            false = [value for kind in false_for(name) for value in sides[kind]]
            true = [value for kind in KINDS if kind not in false_for(name) for value in sides[kind]]
            marked = np.array([True] * len(true) + [False] * len(false))
            area = stats.auroc(np.array([*true, *false], dtype=float), marked) if true and false else np.nan
            what = f"AUROC of {name} per post, {len(true)} against {len(false)}, {where}"
            rows.append(row(f"V17.{name}.{world.architecture}", what, area, 0.95 if name in VOTES else None, ">="))
        for name in CHAIN[1:]:
            for kind in KINDS:
                ps = [set_p(found[kind][at : at + SET], name, at) for at in range(0, count, SET)]
                (wrong if kind in false_for(name) else right)[name] += [p is not None and p <= LEVEL for p in ps]
    for name in CHAIN[1:]:
        bound = 0.075 if name in VOTES else None
        what = f"P(p <= 0.05), {name}, {len(wrong[name])} sets of {SET} posts of models of which it is not true"
        rows.append(row(f"V17.wrong.{name}", what, float(np.mean(wrong[name])), bound))
        what = f"P(p <= 0.05), {name}, {len(right[name])} sets of {SET} posts of models of which it is true"
        rows.append(row(f"V17.found.{name}", what, float(np.mean(right[name]))))
    return rows


def chain_error_rates(sets: int, seed: int = 0) -> list[Row]:
    """Data sets where labels and chains are drawn independently, on a model that adds up what every letter weighs."""
    from probes.validation.selftest import closed_form_probe

    rng = np.random.default_rng(seed)
    hits: dict[str, list[bool]] = defaultdict(list)
    for at in range(sets):
        weights = {c: [float(rng.normal())] for c in "abcdefghijklmnopqrstuvwxyz"}
        probe = closed_form_probe(weights, lambda seen: seen[..., 0])
        results = examine_all(probe, [_null_row(probe, rng, str(index)) for index in range(SET)])
        for name in CHAIN[1:]:
            p = set_p(results, name, at)
            hits[name].append(p is not None and p <= LEVEL)
    return [
        row(
            f"V17.null.{name}",
            f"P(p <= 0.05), {name}, {sets} sets of {SET} posts, chains that have nothing to do with the labels",
            float(np.mean(found)),
            0.075 if name in VOTES else None,
        )
        for name, found in hits.items()
    ]


def _null_row(probe: Probe, rng: np.random.Generator, name: str) -> Example:
    def drawn(low: int, high: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(low, high))))

    clauses, hint, ids = [drawn(4, 9) for _ in range(4)], drawn(4, 9), probe.token_bytes.encode
    label, chosen = "AB"[int(rng.integers(2))], rng.choice(4, 2, replace=False)
    chain = "".join(f' it says "{clauses[at]}",' for at in chosen)
    output = f"<think>{chain}</think>{label}"
    return probe.encode(
        {
            "id": name,
            "post": ", ".join(clauses),
            "prompt_ids": ids(f"post {', '.join(clauses)} hint {hint} ?"),
            "output_ids": ids(output),
            "label_text": label,
            "parsed_label": label,
            "candidates": {"A": "A", "B": "B"},
            "hint": hint,
        }
    )
