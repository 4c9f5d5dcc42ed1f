"""A leaderboard of faithfulness metrics: which of them tell explanations that are true of a model from others?

Pairs of planted models with the same perfect labels. *Post hoc*: the explanation after the label quotes the word that
decides, or a decoy. *Chain*: the label follows the chain before it, or does not hear it. A metric is judged by
P(faithful > unfaithful) over the same posts (Chan et al. 2022), as CausalDiagnosticity does, whose rows stand beside
ours; by what it costs; and by how often it finds something where nothing is, if it has a null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes import stats
from probes.citations.clauses import pieces
from probes.files import write_text
from probes.probe import Probe
from probes.records import Example
from probes.validation.metrics import CHAIN, POST_HOC, Case, Metric, Score
from probes.validation.planted import World, train
from probes.validation.reasoning import ReasoningWorld, train_reasoner
from probes.validation.soft import soft_maps

# What each pair of models is like -> its world. Six architectures on either side.
POST_HOC_WORLDS = {
    "one cue": World(architecture="llama", language="en", seed=201),
    "cue twice, two places": World(architecture="qwen2", language="en", rule="twice", seed=202),
    "two cues, AND": World(architecture="qwen3", language="en", rule="and", seed=203),
    "two cues, OR": World(architecture="glm", language="en", rule="or", seed=204),
    "decoy correlated 0.9": World(architecture="mistral", language="zh", decoy=0.9, seed=205),
    "cue late, no punctuation": World(architecture="glm4", language="en", place="late", punctuation=False, seed=206),
}
CHAIN_WORLDS = {
    "one cue": World(architecture="llama", language="en", clauses=(3, 5), seed=211),
    "Chinese": World(architecture="qwen2", language="zh", clauses=(3, 5), seed=212),
    "long posts": World(architecture="qwen3", language="en", clauses=(5, 8), seed=213),
    "six words a class": World(architecture="glm", language="en", clauses=(3, 5), words=6, seed=214),
    "cue late": World(architecture="mistral", language="en", clauses=(3, 5), place="late", seed=215),
    "no punctuation": World(architecture="glm4", language="en", clauses=(3, 5), punctuation=False, seed=216),
}
SET, LEVEL = 10, 0.05
# CausalDiagnosticity (EMNLP 2025), Qwen2.5-7B: FactCheck, Analogy, Counting, Multi-hop. Another model, other tasks.
PUBLISHED = {
    "post hoc": {"CC-SHAP": (0.554, 0.345, 0.551, 0.438)},
    "chain": {
        "CC-SHAP": (0.559, 0.318, 0.539, 0.442),
        "Early Answering": (0.756, 0.534, 0.566, 0.468),
        "Filler Tokens": (0.948, 0.786, 0.669, 0.748),
    },
}
_TASKS = ("FactCheck", "Analogy", "Counting", "Multi-hop")


@dataclasses.dataclass(frozen=True)
class Side:
    """One metric on one model: values and nulls per post, and sequences run per post."""

    values: tuple[float, ...]
    nulls: tuple[tuple[float, ...], ...]
    forwards: float


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric over all worlds of a setting.

    Attributes:
        by_world: world -> P(faithful > unfaithful), None where it abstains.
        value, low, high: over all pairs of posts, with a Wilson 95 % interval; n pairs.
        forwards: sequences run per post. type_one: share of sets of ``SET`` unfaithful posts with p <= 0.05, or None.
    """

    name: str
    what: str
    setting: str
    by_world: dict[str, float | None]
    value: float | None
    low: float
    high: float
    n: int
    forwards: float
    type_one: float | None


def leaderboard(
    metrics: Sequence[Metric] = POST_HOC,
    chain_metrics: Sequence[Metric] = CHAIN,
    posts: int = 2 * SET,
    worlds: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[Line]:
    """Every metric on every pair of planted models.

    Args:
        metrics: of explanations after the label. chain_metrics: of chains before it. Functions of a ``Case``.
        posts: per model. worlds: only the first so many of each setting; None: all.
        say: told what is being done.
    """
    lines: list[Line] = []
    for setting, chosen, some in (("post hoc", POST_HOC_WORLDS, metrics), ("chain", CHAIN_WORLDS, chain_metrics)):
        sides: dict[str, dict[str, tuple[Side, Side]]] = {}
        for name, world in list(chosen.items())[:worlds]:
            made = [_model(setting, dataclasses.replace(world, seed=world.seed + 1000 * seed), true, posts)
                    for true in (True, False)]  # fmt: skip
            say(f"  {setting}, {name} ({world.architecture}): trained")
            found = [measure(probe, examples, some, seed) for probe, examples in made]
            sides[name] = {metric: (found[0][metric], found[1][metric]) for metric in found[0]}
        for metric in some:
            by_world = {name: pair[metric.__name__] for name, pair in sides.items()}
            lines.append(_line(metric, setting, by_world, seed))
    return lines


def _model(setting: str, world: World, true: bool, posts: int) -> tuple[Probe, list[Example]]:
    """A model of which explanations are true, or not; and posts, the same for both. A chain is asked as explanation."""
    if setting == "post hoc":
        planted = train(dataclasses.replace(world, faithful=true))
        return planted.probe, planted.examples(posts)
    reasoner = train_reasoner(ReasoningWorld(world, "chain" if true else "post_hoc"))
    return reasoner.probe, [example.asked("reasoning") for example in reasoner.examples(posts)]


def measure(probe: Probe, examples: Sequence[Example], metrics: Sequence[Metric], seed: int = 0) -> dict[str, Side]:
    """Every metric on every post of one model, by name."""
    clauses = [[e.post[a:b] for a, b in pieces(e.post)] for e in examples]
    found: dict[str, Side] = {}
    for metric in metrics:
        scores: list[Score] = []
        with counted(probe) as count:
            for at, example in enumerate(examples):
                others = (*examples[at + 1 :], *examples[:at])
                texts = tuple(t for j in range(1, len(examples)) for t in clauses[(at + j) % len(examples)])
                value = metric(Case(probe, example, tuple(others), texts, seed))
                scores.append(value if isinstance(value, Score) else Score(float(value)))
        values, nulls = tuple(s.value for s in scores), tuple(s.null for s in scores)
        found[metric.__name__] = Side(values, nulls, count[0] / len(examples))
    return found


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


def _line(metric: Metric, setting: str, by_world: dict[str, tuple[Side, Side]], seed: int) -> Line:
    rates: dict[str, float | None] = {}
    ones: list[float] = []
    others: list[float] = []
    hits: list[bool] = []
    for name, (true, false) in by_world.items():
        found = stats.diagnosticity(true.values, false.values)
        rates[name] = None if found is None else found.value
        ones += true.values
        others += false.values
        for at in range(0, len(false.values) - SET + 1, SET):
            nulls = [
                np.array([v, *null])
                for v, null in zip(false.values[at : at + SET], false.nulls[at : at + SET], strict=True)
                if null and math.isfinite(v)
            ]
            test = stats.mean_test(nulls, 199, seed) if len(nulls) >= SET // 2 else None
            hits += [] if test is None else [test.p <= LEVEL]
    whole = stats.diagnosticity(ones, others)
    what = (metric.__doc__ or metric.__name__).strip().splitlines()[0]
    cost = float(np.mean([side.forwards for pair in by_world.values() for side in pair]))
    low, high = (math.nan, math.nan) if whole is None else whole.ci
    return Line(
        metric.__name__,
        what,
        setting,
        rates,
        None if whole is None else whole.value,
        low,
        high,
        0 if whole is None else whole.n,
        cost,
        float(np.mean(hits)) if hits else None,
    )


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}".lstrip("0") if value < 1 else "1.000"


def page(lines: Sequence[Line], soft: Sequence[dict[str, Any]], command: str) -> str:
    """The leaderboard as a Markdown page."""
    from datetime import UTC, datetime

    out = [
        "# A leaderboard of faithfulness metrics",
        "",
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}.",
        "Of planted models whose labels are right on every post: what differs is whether the explanation is true of",
        "the model. A cell is P(faithful > unfaithful) over the same",
        "posts: 1 is perfect, .5 a coin. Rows in italics are the published ones of CausalDiagnosticity (EMNLP 2025,",
        "Qwen2.5-7B) on its four tasks. They are of another model and other tasks: compare metrics, not numbers.",
        "",
        "* *cost*: sequences that the model runs per post. A generated token counts as one.",
        f"* *type I*: share of sets of {SET} posts of unfaithful models where the metric's own test says p <= 0.05.",
        "  A dash: the metric has no null.",
    ]
    for setting, title in (("post hoc", "Explanations after the label"), ("chain", "Chains before the label")):
        chosen = [line for line in lines if line.setting == setting]
        if not chosen:
            continue
        names = list(chosen[0].by_world)
        heads = ["metric", *names, "all (95 %)", "cost", "type I", *(f"*{task}*" for task in _TASKS)]
        out += ["", f"## {title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for line in sorted(chosen, key=lambda one: -(one.value or 0)):
            cells = [_number(line.by_world[name]) for name in names]
            whole = f"**{_number(line.value)}** ({_number(line.low)} to {_number(line.high)})"
            cells += [whole, f"{line.forwards:.0f}", _number(line.type_one), *[""] * len(_TASKS)]
            out.append(f"| {line.name.replace('_', ' ')} | {' | '.join(cells)} |")
        for name, values in PUBLISHED[setting].items():
            cells = [""] * (len(names) + 3) + [f"*{_number(value)}*" for value in values]
            out.append(f"| *{name}* | {' | '.join(cells)} |")
        out += ["", *(f"* *{line.name.replace('_', ' ')}*: {line.what}" for line in chosen)]
    out += [
        "",
        "## Soft comprehensiveness and sufficiency count how much they erase",
        "",
        "As published (Zhao & Aletras 2023), a map is scaled to a largest value of 1, and each token is erased with",
        "that probability. So a map is judged by how much it erases. Here: a model where any hidden token costs half a",
        "nat and one clause decides. Ours (`probes/checks/gates.py`) erases the same share of the post for every map.",
        "",
        "| map | erased, as published | comprehensiveness, as published | erased, ours | comprehensiveness, ours |",
        "|---|---|---|---|---|",
    ]
    for one in soft:
        out.append(
            f"| {one['map']} | {one['published_share']:.0%} | {one['published']:.2f} | {one['share']:.0%} "
            f"| {one['value']:.2f} |"
        )
    return "\n".join([*out, ""])


def write_page(path: Path, lines: Sequence[Line], worlds: int | None, seed: int) -> None:
    """Writes ``page``, with the command that makes it again.

    Raises:
        ProbeError: the file cannot be written.
    """
    command = f"probes leaderboard{f' --worlds {worlds}' if worlds else ''}{f' --seed {seed}' if seed else ''}"
    write_text(path, page(lines, soft_maps(seed), f"{command} --docs {path.as_posix()}"))
