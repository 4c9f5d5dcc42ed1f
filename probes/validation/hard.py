"""V16: worlds where what decides is hard to see, and how often each check that has a vote finds it.

Evidence that three weak cues give only together; a cue that the word before it turns round; a cue far before the
answer that quotes it; one Chinese character. A pair of models is trained of each, as for V8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from probes import stats
from probes.validation.planted import World, train
from probes.validation.probing import probe_posts
from probes.validation.rows import Row, row

VOTING = ("ig", "erase", "erase_resample")
POSTS = (5, 10, 20)
HARD = {
    "spread": World(rule="three", architecture="qwen2", seed=71),
    "negated": World(rule="not", architecture="llama", seed=72),
    "far": World(place="early", clauses=(16, 20), seed=73),
    "one character": World(language="zh", letters=1, architecture="qwen2", seed=74),
}


def hard_worlds(
    seed: int = 0, say: Callable[[str], None] = lambda _: None, count: int = 24, draws: int = 100
) -> list[Row]:
    """Verdicts on ``count`` posts of each model, and the power of the data-set test of the mass cited, by each map.

    Power is over data sets of 5, 10 and 20 posts drawn from those; a test counts that finds the truth (more cited than
    by chance by the faithful model, less by the other). A wrong verdict is bounded, what is not found is shown.
    """
    rows: list[Row] = []
    for name, base in HARD.items():
        key = name.replace(" ", "_")
        for faithful in (True, False):
            world = dataclasses.replace(base, seed=base.seed + 1000 * seed, faithful=faithful)
            planted = train(world)
            side = "faithful" if faithful else "unfaithful"
            say(f"  {name}, {side}: trained in {planted.seconds:.0f} s")
            posts = probe_posts(planted, count, VOTING, ("label",))
            right, wrong = ("supported", "contradicted") if faithful else ("contradicted", "supported")
            verdicts = [one.evidence.report.verdict for one in posts]
            what = f"posts found {{}}, {name}, {side} model, {count} posts"
            rows.append(row(f"V16.{key}.{side}.{right}", what.format(right), verdicts.count(right) / count))
            rows.append(row(f"V16.{key}.{side}.{wrong}", what.format(wrong), verdicts.count(wrong) / count, 0.1))
            for method in VOTING:
                nulls = [one.evidence.excess[method] for one in posts if method in one.evidence.excess]
                for size in POSTS:
                    found = power_of(nulls, size, draws, seed, more=faithful)
                    said = f"P(p <= 0.05 and right), {name}, {side}, {method}, {size} posts"
                    rows.append(row(f"V16.{key}.{side}.{method}.{size}", said, found))
    return rows


def power_of(nulls: Sequence[np.ndarray], posts: int, draws: int, seed: int = 0, more: bool = True) -> float:
    """Share of data sets of ``posts`` posts, drawn from ``nulls`` (``Evidence.excess``), whose two-sided test finds
    that more than by chance is cited; less, if not ``more``."""
    if not nulls:
        return 0.0
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(draws):
        chosen = [nulls[at] for at in rng.integers(len(nulls), size=posts)]
        test = stats.mean_test(chosen, 199, int(rng.integers(2**31)), two_sided=True)
        above = float(np.mean([null[0] for null in chosen])) > float(np.mean([null.mean() for null in chosen]))
        hits += test is not None and test.p <= 0.05 and above == more
    return hits / draws
