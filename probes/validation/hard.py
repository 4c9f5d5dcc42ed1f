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
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    count: int = 24,
    draws: int = 100,
    names: Sequence[str] = tuple(HARD),
) -> list[Row]:
    """Verdicts on ``count`` posts of each model, and the power of the data-set test of the mass cited, by each map.

    Power is over data sets of 5, 10 and 20 posts drawn from those; a test counts that finds the truth (more cited than
    by chance by the faithful model, less by the other). A wrong verdict is bounded, what is not found is shown. One
    pair of models stands for a world: the intervals are over posts.
    """
    rows: list[Row] = []
    for name in names:
        base = HARD[name]
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
                    low, high = power_interval(nulls, size, draws, seed, more=faithful)
                    said = f"P(p <= 0.05 and right), {name}, {side}, {method}, {size} posts, 95 % over posts "
                    said += f"{low:.2f} to {high:.2f}"
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


def power_interval(
    nulls: Sequence[np.ndarray], posts: int, draws: int, seed: int = 0, more: bool = True, again: int = 40
) -> tuple[float, float]:
    """95 % percentile interval of ``power_of`` over posts like these: all of them drawn anew ``again`` times.

    A power of 0 or 1 in every draw is bounded as if each post alone had shown it (the rule of three).
    """
    if not nulls:
        return 0.0, 1.0
    rng = np.random.default_rng(seed)
    found = [
        power_of([nulls[at] for at in rng.integers(len(nulls), size=len(nulls))], posts, draws, seed + one, more)
        for one in range(1, again + 1)
    ]
    low, high = (float(one) for one in np.quantile(found, [0.025, 0.975]))
    rest = min(1.0, 3 / len(nulls))
    return min(low, 1 - rest) if low == 1.0 else low, max(high, rest) if high == 0.0 else high
