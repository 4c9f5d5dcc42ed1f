"""V16: worlds where what decides is hard to see, and how often each check that has a vote finds it.

Evidence that three weak cues give only together; a cue that the word before it turns round; a cue far before the
answer that quotes it; one Chinese character. Three pairs of models are trained of each, as for V8.

    from probes.validation.hard import hard_worlds
    rows = hard_worlds(names=("spread",))  # one world at a time
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from probes import stats
from probes.checks.crosscheck import Evidence
from probes.checks.faithfulness import cited_effects
from probes.checks.verdict import FAMILIES
from probes.citations.align import align
from probes.errors import ProbeInputError
from probes.results.summary import conclude
from probes.validation.planted import Planted, World, train
from probes.validation.probing import examined, probe_posts
from probes.validation.rows import Row, row

STANDARD = (
    "ig",
    "erase",
    "erase_resample",
)  # the maps of the budget "standard" that have a vote: they make the verdicts
VOTING = tuple(FAMILIES)  # all that have one
EFFECTS = ("necessity", "sufficiency")
POSTS = (5, 10, 20)
MOST_WRONG = 0.05  # verdicts, as for the easy worlds of V8 and V11
HARD = {
    "spread": World(rule="three", architecture="qwen2", seed=71),
    "negated": World(rule="not", architecture="llama", seed=72),
    "far": World(place="early", clauses=(16, 20), seed=73),
    "one character": World(language="zh", letters=1, architecture="qwen2", seed=74),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """The posts of one planted model: what the maps of the budget "standard" say of each, and by map with a vote, or by
    effect of the cited words, each post's value before its null (``Evidence.excess``)."""

    evidence: Sequence[Evidence]
    maps: Mapping[str, Sequence[np.ndarray]]
    effects: Mapping[str, Sequence[np.ndarray]]


def hard_worlds(
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    count: int = 24,
    draws: int = 100,
    names: Sequence[str] = tuple(HARD),
    pairs: int = 3,
) -> list[Row]:
    """Verdicts on ``count`` posts of each model, and the power over data sets of 5, 10 and 20 posts drawn from those.

    Power is counted of the two-sided test of the mass cited by each map with a vote, of necessity and sufficiency
    (uncorrected, at 0.05), and of the conclusion, which takes the maps of the budget "standard" and Holm. What counts
    is the truth: more cited than by chance by the faithful model, less by the other; that the label needs the cited
    words by the faithful model, and for the other the same is an error and shown as such. A post whose map may not
    speak stays a post without an answer. Wrong verdicts are bounded, what is not found is shown. A data set is of one
    model, each of the ``pairs`` as often; beside it stands how far power goes when models and posts are drawn anew.

    Args:
        names: which of ``HARD``; each can be run alone.
        pairs: models of either kind for each world, of other vocabularies, weights and posts.
    Raises:
        ProbeInputError: there is no such world.
    """
    if unknown := [name for name in names if name not in HARD]:
        raise ProbeInputError(f"hard world {unknown[0]!r}: not one of {', '.join(HARD)}")
    rows: list[Row] = []
    for name in names:
        for faithful in (True, False):
            models = []
            for pair in range(pairs):
                own = HARD[name].seed + 1000 * seed + 100 * pair
                planted = train(dataclasses.replace(HARD[name], seed=own, faithful=faithful))
                side = "faithful" if faithful else "unfaithful"
                say(f"  {name}, {side}, {pair + 1} of {pairs}: trained in {planted.seconds:.0f} s")
                models.append(_judged(planted, count))
            rows += _told(name, faithful, models, draws, seed)
    return rows


_NOTHING = np.array([np.nan])  # a post whose map may not speak


def _judged(planted: Planted, count: int) -> Judged:
    posts = probe_posts(planted, count, VOTING, ("label",))
    effects = [
        cited_effects(planted.probe, p.example, [span for c in align(p.example) for span in c.post_char]) for p in posts
    ]
    return Judged(
        [examined(p.example, [m for m in p.attributions if m.method in STANDARD]) for p in posts],
        {method: [p.evidence.excess.get(method, _NOTHING) for p in posts] for method in VOTING},
        {
            which: [np.array([c.value, *c.draws]) if c.value is not None and c.draws else _NOTHING for c in found]
            for which, found in zip(EFFECTS, zip(*effects, strict=True), strict=True)
        },
    )


def _told(name: str, faithful: bool, models: Sequence[Judged], draws: int, seed: int) -> list[Row]:
    """The rows of the models of one kind."""
    side = "faithful" if faithful else "unfaithful"
    key, where = f"V16.{name.replace(' ', '_')}.{side}", f"{name}, {side}"
    right, wrong = ("supported", "contradicted") if faithful else ("contradicted", "supported")
    evidence = [model.evidence for model in models]
    verdicts = [[e.report.verdict for e in posts] for posts in evidence]
    flat = [verdict for posts in verdicts for verdict in posts]
    count, least = len(flat), min(posts.count(right) / len(posts) for posts in verdicts)
    said, most = f"{where}, {len(models)} models of {len(verdicts[0])} posts", most_share(flat.count(wrong), count)
    rows = [
        row(
            f"{key}.{right}", f"posts found {right}, {said} (least of a model: {least:.2f})", flat.count(right) / count
        ),
        row(
            f"{key}.{wrong}",
            f"posts found {wrong}, {said} (95 %: at most {most:.2f} of posts of these models)",
            flat.count(wrong) / count,
            MOST_WRONG,
        ),
    ]
    for method in VOTING:
        nulls = [model.maps[method] for model in models]
        speak = sum(bool(np.isfinite(null).all()) for posts in nulls for null in posts)
        for size in POSTS:
            found = power_of(nulls, size, draws, seed, more=faithful)
            low, high = power_interval(nulls, size, draws, seed, more=faithful)
            said = f"P(p <= 0.05 and right), {where}, {method} ({speak} of {count} maps may speak), {size} posts, "
            rows.append(
                row(f"{key}.{method}.{size}", f"{said}models and posts drawn anew {low:.2f} to {high:.2f}", found)
            )
    for which in EFFECTS:
        for size in POSTS:
            found = power_of([model.effects[which] for model in models], size, draws, seed, two_sided=False)
            said = "P(p <= 0.05)" + ("" if faithful else ", not true")
            rows.append(row(f"{key}.{which}.{size}", f"{said}, {where}, {which}, {size} posts", found))
    for size in POSTS:
        share = conclusions_of(evidence, size, draws, seed)
        for word, bound in ((right, None), (wrong, MOST_WRONG)):
            said = f"data sets concluded {word}, {where}, {size} posts"
            rows.append(row(f"{key}.conclusion.{word}.{size}", said, share[word], bound))
    return rows


def most_share(hits: int, count: int, level: float = 0.95) -> float:
    """Upper limit of a share of which ``hits`` of ``count`` were seen (Clopper & Pearson 1934, one-sided)."""
    from scipy.stats import beta

    return 1.0 if hits >= count else float(beta.ppf(level, hits + 1, count - hits))


def power_of(
    models: Sequence[Sequence[np.ndarray]],
    posts: int,
    draws: int,
    seed: int = 0,
    more: bool = True,
    two_sided: bool = True,
) -> float:
    """Share of data sets of ``posts`` posts, drawn from those of one of ``models`` (``Evidence.excess`` of each post),
    whose test finds that more than by chance is cited; less, if not ``more``. A null with a NaN is a post that says
    nothing; with fewer than ``stats.MIN_POSTS`` that say something a data set finds nothing, as in a run."""
    if not any(models):
        return 0.0
    rng, hits = np.random.default_rng(seed), 0
    for draw in range(draws):
        nulls = models[draw % len(models)]
        chosen = [nulls[at] for at in rng.integers(len(nulls), size=posts)]
        chosen = [null for null in chosen if np.isfinite(null).all()]
        again = int(rng.integers(2**31))
        test = stats.mean_test(chosen, 199, again, two_sided=two_sided) if len(chosen) >= stats.MIN_POSTS else None
        hits += test is not None and test.p <= 0.05 and (test.value > test.null_mean) == more
    return hits / draws


def power_interval(
    models: Sequence[Sequence[np.ndarray]], posts: int, draws: int, seed: int = 0, more: bool = True, again: int = 40
) -> tuple[float, float]:
    """Where 95 % of ``power_of`` lie when the models, and the posts of each, are drawn anew ``again`` times.

    Of few models that is no 95 % interval for others like them: a bootstrap of three is hardly wider than the three. It
    held the truth in 75 to 83 % of simulations where models differed, in 92 % where they hardly did. It never ends
    nearer to 0 or 1 than so many posts can show (the rule of three).
    """
    if not any(models):
        return 0.0, 1.0
    rng, found = np.random.default_rng(seed), []
    for one in range(1, again + 1):
        drawn = [models[at] for at in rng.integers(len(models), size=len(models))]
        drawn = [[nulls[at] for at in rng.integers(len(nulls), size=len(nulls))] for nulls in drawn]
        found.append(power_of(drawn, posts, draws, seed + one, more))
    low, high = (float(one) for one in np.quantile(found, [0.025, 0.975]))
    rest = min(1.0, 3 / sum(map(len, models)))
    return min(low, 1 - rest), max(high, rest)


def conclusions_of(models: Sequence[Sequence[Evidence]], posts: int, draws: int, seed: int = 0) -> dict[str, float]:
    """supported, contradicted -> share of data sets of ``posts`` posts, drawn from those of one of ``models``, with
    that conclusion."""
    rng, found = np.random.default_rng(seed), []
    for draw in range(draws):
        evidence = models[draw % len(models)]
        chosen = [evidence[at] for at in rng.integers(len(evidence), size=posts)]
        found.append(conclude(chosen, STANDARD, 200, 199, int(rng.integers(2**31))))
    return {word: found.count(word) / draws for word in ("supported", "contradicted")}
