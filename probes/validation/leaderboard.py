"""A leaderboard of faithfulness metrics: which of them tell explanations that are true of a model from others?

A metric is judged by P(faithful > unfaithful) over the same posts of a pair of planted models (Chan et al. 2022), as
CausalDiagnosticity does; by what it costs; and, if it has a null, by how often its test finds something where nothing
is true, and where it is. ``of_models`` says what is estimated and how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from probes import stats
from probes.checks.chain import blocks
from probes.citations.clauses import pieces
from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import Example
from probes.results.cache import Cache, digest
from probes.results.lock import held
from probes.validation.metrics import CHAIN, POST_HOC, Case, Metric, require_metric, score_of
from probes.validation.pairs import POSTS, SETTINGS, Pair, Setting, make_pair
from probes.validation.planted import stream
from probes.validation.soft import soft_planted

LEVEL, DRAWS = 0.05, 199
METRICS: Mapping[str, tuple[Metric, ...]] = {"post hoc": POST_HOC, "chain": CHAIN}
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Side:
    """One metric on posts of one model.

    Attributes:
        values, nulls: per post. clusters: per post, what its null shares with others'; every post its own if nothing.
        forwards: sequences run per post.
    """

    values: tuple[float, ...]
    nulls: tuple[tuple[float, ...], ...]
    clusters: tuple[str, ...]
    forwards: float


@dataclasses.dataclass(frozen=True)
class Sides:
    """One metric on a pair: the faithful model, the other one over the same posts, and posts where nothing is true
    (None for a metric without a null)."""

    true: Side
    false: Side
    empty: Side | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """``of_models``: value and 95 % interval, how many pairs of models, and pairs of posts."""

    value: float
    low: float | None
    high: float | None
    models: int
    posts: int


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric over all worlds of a setting.

    Attributes:
        by_world: world -> P(faithful > unfaithful), None where it abstains. whole: over all of them.
        forwards: sequences run per post. type_one, power: (data sets whose test says p <= 0.05, data sets), where
            nothing is true and of the faithful models; None without a null.
    """

    name: str
    what: str
    setting: str
    by_world: dict[str, float | None]
    whole: Estimate | None
    forwards: float
    type_one: tuple[int, int] | None
    power: tuple[int, int] | None


def of_models(pairs: Sequence[tuple[Side, Side]]) -> Estimate | None:
    """P(faithful > unfaithful) over pairs of models like these; None where the metric abstains on all.

    Estimator: each pair's share of posts on which the faithful model has the larger value, ties half
    (``stats.diagnosticity``), and the mean of those shares: every pair weighs alike.

    Interval: the posts of a pair share its two models, so they are no independent observations. The pairs are.
    Student's t over the shares of K pairs, K - 1 degrees of freedom, needs to know nothing of what goes on within one.
    K equal shares would give a point. So the variance is at least what independent posts have, with two successes and
    two failures added to each pair (Agresti & Coull 1998), and the interval is cut at 0 and 1. With one pair there is
    none. What K pairs agree on may still fail elsewhere: at 95 %, in up to 1 - 0.05^(1/K) of such models.
    """
    from scipy.stats import t

    found = [one for true, false in pairs if (one := stats.diagnosticity(true.values, false.values)) is not None]
    if not found:
        return None
    rates, n, count = np.array([one.value for one in found]), np.array([one.n for one in found]), len(found)
    value = float(rates.mean())
    if count < 2:
        return Estimate(value, None, None, count, int(n.sum()))
    smoothed = (rates * n + 2) / (n + 4)
    least = float((smoothed * (1 - smoothed) / (n + 4)).sum()) / count**2
    half = float(t.ppf(0.975, count - 1)) * math.sqrt(max(float(rates.var(ddof=1)) / count, least))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), count, int(n.sum()))


def rejections(side: Side, size: int, seed: int = 0) -> list[bool]:
    """Whether the test of each data set of ``size`` posts says p <= 0.05 (``stats.mean_test``).

    Posts whose null was made of one another are one cluster. A data set with fewer than half its values has no test.
    """
    hits = []
    for at in range(0, len(side.values) - size + 1, size):
        kept = [i for i in range(at, at + size) if side.nulls[i] and math.isfinite(side.values[i])]
        nulls = [np.array([side.values[i], *side.nulls[i]]) for i in kept]
        if len(kept) >= size // 2:
            test = stats.mean_test(nulls, DRAWS, seed + at, [side.clusters[i] for i in kept])
            hits += [] if test is None else [test.p <= LEVEL]
    return hits


def leaderboard(
    extra: Sequence[Metric] = (),
    out: Path | None = None,
    seed: int = 0,
    say: Say = lambda _: None,
    settings: Sequence[Setting] = SETTINGS,
    metrics: Mapping[str, Sequence[Metric]] = METRICS,
) -> list[Line]:
    """Every metric on every pair of planted models.

    Args:
        extra: metrics of your own, asked in every setting: functions of a ``Case`` with a docstring.
        out: where models and results are kept; the same call goes on from there. None: nowhere.
        seed: another one plants other models and posts. say: told what is being done.
    Raises:
        ProbeInputError: a metric is none, or has another's name; another process is at work in ``out``.
        ProbeError: a metric fails on a post; a model does not learn its task; ``out`` cannot be written.
    """
    import torch

    for name, chosen in metrics.items():
        names = [
            require_metric(metric, getattr(metric, "__name__", "a metric")).__name__ for metric in (*chosen, *extra)
        ]
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise ProbeInputError(f"metric {twice}: there are two of that name ({name}); rename yours")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for its other threads
    try:
        with held(out) if out is not None else contextlib.nullcontext():
            found = [_setting(setting, (*metrics[setting.name], *extra), out, seed, say) for setting in settings]
    finally:
        torch.set_num_threads(threads)
    return [
        _line(metric, setting, {world: sides[metric.__name__] for world, sides in by_world.items()}, seed)
        for setting, by_world in zip(settings, found, strict=True)
        for metric in (*metrics[setting.name], *extra)
    ]


def _setting(
    setting: Setting, metrics: Sequence[Metric], out: Path | None, seed: int, say: Say
) -> dict[str, dict[str, Sides]]:
    """world -> metric -> what it said; each is kept as soon as it is there."""
    cache = None if out is None else Cache(out)
    found: dict[str, dict[str, Sides]] = {}
    for number, (name, base) in enumerate(setting.worlds.items(), start=1):
        world = dataclasses.replace(base, seed=base.seed + 1000 * seed)
        pair: Pair | None = None
        known: dict[str, Sides] = {}
        for metric in metrics:
            key = "" if cache is None else cache.name(_depends(setting, world, metric, seed))
            sides = None if cache is None else _read(cache.read(key))
            if sides is None:
                if pair is None:
                    say(f"{setting.name} {number}/{len(setting.worlds)}: {name} ({world.architecture})")
                    pair = make_pair(setting, world, out)
                sides = _sides(pair, metric, setting.size, seed)
                if cache is not None:
                    cache.write(key, _written(sides))
            known[metric.__name__] = sides
        found[name] = known
    return found


def _depends(setting: Setting, world: Any, metric: Metric, seed: int) -> list[Any]:
    """All that one result depends on: a metric counts as changed when its own source text is another, or what it was
    given when it was made (not when a function that it calls is); posts when they are drawn otherwise."""
    try:
        source = inspect.getsource(metric)
    except (OSError, TypeError):  # typed at a prompt, or no plain function
        code = getattr(metric, "__code__", None)
        source = repr(metric if code is None else (code.co_code, code.co_names, code.co_consts))
    cells = getattr(metric, "__closure__", None) or ()
    given = [repr(getattr(metric, "__defaults__", None)), *(repr(cell.cell_contents) for cell in cells)]
    own = [getattr(metric, "__module__", ""), metric.__name__, digest(source), *(given if given != ["None"] else ())]
    drawn = [POSTS, setting.nulls, setting.size, seed, stream(world, 0)]
    return [metadata.version("mentalglm-jax"), setting.name, dataclasses.asdict(world), own, drawn]


def _sides(pair: Pair, metric: Metric, size: int, seed: int) -> Sides:
    true, false = (
        measure(probe, examples, metric, size, seed) for probe, examples in zip(pair.probes, pair.examples, strict=True)
    )
    tested = any(true.nulls) or any(false.nulls)
    return Sides(true, false, measure(pair.probes[1], pair.nulls, metric, size, seed) if tested else None)


def measure(probe: Probe, examples: Sequence[Example], metric: Metric, size: int, seed: int = 0) -> Side:
    """A metric on posts of one model. Data sets of ``size`` posts lend each other no chains."""
    clauses = [[e.post[a:b] for a, b in pieces(e.post)] for e in examples]
    lent: dict[int, tuple[int, ...]] = {}
    for at in range(0, len(examples), size):
        for block in blocks(examples[at : at + size]):
            lent |= {at + own: tuple(at + other for other in block) for own in block}
    scores = []
    with counted(probe) as count:
        for at, example in enumerate(examples):
            others = (*examples[at + 1 :], *examples[:at])
            texts = tuple(t for j in range(1, len(examples)) for t in clauses[(at + j) % len(examples)])
            block = tuple(examples[other] for other in lent.get(at, ()) if other != at)
            scores.append(score_of(metric, Case(probe, example, others, texts, seed, block)))
    who = [f"block {min(lent[at])}" if one.borrowed and at in lent else f"post {at}" for at, one in enumerate(scores)]
    values, nulls = tuple(s.value for s in scores), tuple(tuple(map(float, s.null)) for s in scores)
    return Side(values, nulls, tuple(who), count[0] / max(1, len(examples)))


@contextlib.contextmanager
def counted(probe: Probe) -> Iterator[list[int]]:
    """Counts the sequences that the model runs while the block lasts, generated tokens one by one."""
    count = [0]

    def add(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next((named[k] for k in ("inputs_embeds", "input_ids") if named.get(k) is not None), None)
        count[0] += len(given[0] if first is None else first)

    handle = probe.model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def _written(sides: Sides) -> dict[str, Any]:
    """As JSON, which has no NaN."""

    def plain(side: Side) -> dict[str, Any]:
        nulls = [[_finite(v) for v in null] for null in side.nulls]
        return dataclasses.asdict(side) | {"values": [_finite(v) for v in side.values], "nulls": nulls}

    return {key: None if side is None else plain(side) for key, side in vars(sides).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(kept: dict[str, Any] | None) -> Sides | None:
    """What ``_written`` wrote; None where there is nothing, or something else."""

    def side(value: dict[str, Any]) -> Side:
        values = tuple(math.nan if one is None else float(one) for one in value["values"])
        nulls = tuple(tuple(math.nan if v is None else float(v) for v in null) for null in value["nulls"])
        return Side(values, nulls, tuple(map(str, value["clusters"])), float(value["forwards"]))

    if kept is None:
        return None
    try:
        empty = kept["empty"]
        return Sides(side(kept["true"]), side(kept["false"]), None if empty is None else side(empty))
    except (KeyError, TypeError, ValueError):
        return None


def _line(metric: Metric, setting: Setting, by_world: Mapping[str, Sides], seed: int) -> Line:
    pairs = {world: (sides.true, sides.false) for world, sides in by_world.items()}
    single = {world: of_models([pair]) for world, pair in pairs.items()}
    wrong = [hit for sides in by_world.values() if sides.empty for hit in rejections(sides.empty, setting.size, seed)]
    right = [hit for sides in by_world.values() for hit in rejections(sides.true, setting.size, seed)]
    return Line(
        metric.__name__,
        (metric.__doc__ or "").strip().splitlines()[0],
        setting.name,
        {world: None if one is None else one.value for world, one in single.items()},
        of_models(list(pairs.values())),
        float(np.mean([side.forwards for pair in pairs.values() for side in pair])),
        (sum(wrong), len(wrong)) if wrong else None,
        (sum(right), len(right)) if right else None,
    )


def soft_table(out: Path, seed: int = 0, setting: Setting = SETTINGS[0], posts: int = 20) -> list[dict[str, Any]]:
    """``soft.soft_planted`` on the faithful models of a setting, which are kept in ``out``.

    Returns:
        per rival map its name and, for each score, the mean over models of the share of posts where the true map wins.
    """
    found = []
    for base in setting.worlds.values():
        pair = make_pair(setting, dataclasses.replace(base, seed=base.seed + 1000 * seed), out, posts, nulls=0)
        found.append(soft_planted(pair.probes[0], pair.examples[0], seed))
    return [
        {key: value if isinstance(value, str) else float(np.mean([one[at][key] for one in found]))
         for key, value in row.items()} for at, row in enumerate(found[0])
    ]  # fmt: skip
