"""The leaderboard as a Markdown page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probes.files import write_text
from probes.validation.leaderboard import LEVEL, Line
from probes.validation.pairs import POSTS, SETTINGS

SOURCE = "CausalDiagnosticity (Zaman & Srivastava, EMNLP 2025), Qwen2.5-7B"
TASKS = ("FactCheck", "Analogy", "Counting", "Multi-hop")
# setting -> our metric -> its published name and values on those tasks. Another model, other tasks.
PUBLISHED = {
    "post hoc": {"cc_shap": ("CC-SHAP", (0.554, 0.345, 0.551, 0.438))},
    "chain": {
        "cc_shap": ("CC-SHAP", (0.559, 0.318, 0.539, 0.442)),
        "early_answering": ("Early Answering", (0.756, 0.534, 0.566, 0.468)),
        "filler_tokens": ("Filler Tokens", (0.948, 0.786, 0.669, 0.748)),
    },
}
_HEAD = """\
# A leaderboard of faithfulness metrics

Written by `{command}` on {today}.

Which metrics tell explanations that are true of a model from others? Pairs of small models were trained, with equally
right labels. One of a pair explains itself truly, the other does not. A cell is P(faithful > unfaithful) over {posts}
posts of such a pair: 1 is perfect, .5 a coin. The layout is that of the table of CausalDiagnosticity, with worlds in
place of tasks. Rows in italics are its own, of another model and other tasks: compare metrics, not numbers.

* *all*: the mean over pairs of models, with a 95 % interval over pairs. The posts of one pair share its models and
  count as one observation (Student's t over pairs; its variance is never below that of independent posts). What all
  {worlds} pairs agree on may still fail in up to {fail:.0%} of models like these.
* *cost*: sequences that the model runs per post. A generated token counts as one.
* *type I*: how many of so many data sets without a true effect have p <= 0.05 by the metric's own null. After the
  label ({nulls_after} posts of each unfaithful model, {after} a data set) the explanation quotes a clause drawn at
  random. Of chains ({nulls_chains} posts, {chains} a data set) the label does not hear the chain. A right test finds
  one in twenty, and in one table of twenty more than {most_after} of {sets_after} ({most_chains} of {sets_chains}).
  All metrics see the same posts, so rows err together.
* *power*: the same of the faithful models. A dash: the metric has no null.
"""
_OWN = """
## A metric of your own

It is one function of a `Case`, with a docstring, in a package that is installed (or in a folder on `PYTHONPATH`): the
command never looks into the working directory. Models and finished results are kept in `DIR`, so only the new metric is
run. A metric is run again when its own text changes. Where a function that it calls has changed, give another `DIR`.

<!-- not run: takes minutes -->
```sh
probes leaderboard --out DIR --metric my_package.metrics:length --docs leaderboard.md
```

`probes/validation/metrics.py` says what a `Case` holds, and has the metrics above as examples. From Python, a notebook
say, pass the function itself: `leaderboard(extra=[length], out=Path("DIR"))` of `probes.validation.leaderboard`.
"""
_SOFT = """
## Soft comprehensiveness and sufficiency count how much they erase

As published (Zhao & Aletras 2023), a map is scaled to a largest value of 1, and each token is erased, or kept, with
that probability. So a map is judged by how much it erases. First a model in closed form, where any hidden token costs
half a nat and one clause decides. The map that says nothing erases all and keeps all: as published it wins both. Ours
(`probes/checks/gates.py`) erases, and keeps, the same share of the post by every map. *Lost*
is in nats: when the share is erased more is better, when it is kept less is.

| map | share, as published | lost, erased | lost, kept | share, ours | lost, erased | lost, kept |
|---|--:|--:|--:|--:|--:|--:|
"""
_TRAINED = """
Then the faithful models above: how often the map of the words that decide beats another one.

| against | comprehensiveness, as published | sufficiency, as published | comprehensiveness, ours | sufficiency, ours |
|---|--:|--:|--:|--:|
"""


def page(lines: Sequence[Line], soft: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]], command: str) -> str:
    """The page, dated, with the command that makes it again.

    Args:
        soft: ``soft.soft_maps``. trained: ``leaderboard.soft_table``.
    """
    from scipy.stats import binom

    worlds = max(len(line.by_world) for line in lines)
    sizes = {"posts": POSTS}
    for name, setting in zip(("after", "chains"), SETTINGS, strict=True):
        sizes |= {name: setting.size, f"nulls_{name}": setting.nulls}
        sizes[f"sets_{name}"] = sets = setting.nulls // setting.size * len(setting.worlds)
        sizes[f"most_{name}"] = int(binom.ppf(0.95, sets, LEVEL))
    told = {"command": command, "today": f"{datetime.now(UTC):%Y-%m-%d}", "fail": 1 - 0.05 ** (1 / worlds)}
    out = [_HEAD.format(worlds=worlds, **told, **sizes)]
    for setting in SETTINGS:
        chosen = [line for line in lines if line.setting == setting.name]
        if chosen:
            out.append(_table(setting.title, setting.name, chosen))
    out += [_OWN, _SOFT.rstrip("\n")]
    out += [
        f"| {one['map']} | {one['published_share']:.0%} | {one['published_comp']:.1f} | {one['published_suff']:.1f} "
        f"| {one['share']:.0%} | {one['comp']:.1f} | {one['suff']:.1f} |"
        for one in soft
    ]
    out.append(_TRAINED.rstrip("\n"))
    out += [
        f"| {one['map']} | {_number(one['published_comp'])} | {_number(one['published_suff'])} "
        f"| {_number(one['comp'])} | {_number(one['suff'])} |"
        for one in trained
    ]
    return "\n".join([*out, ""])


def _table(title: str, setting: str, lines: Sequence[Line]) -> str:
    names = list(lines[0].by_world)
    heads = ["metric", *names, "all (95 %)", "cost", "type I", "power", *(f"*{task}*" for task in TASKS)]
    out = [f"## {title}", "", f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for line in sorted(lines, key=lambda one: -(one.whole.value if one.whole else 0.0)):
        cells = [_number(line.by_world[name]) for name in names]
        if line.whole is None:
            whole = "–"
        else:
            whole = f"**{_number(line.whole.value)}** ({_number(line.whole.low)} to {_number(line.whole.high)})"
        counts = ["–" if pair is None else f"{pair[0]} of {pair[1]}" for pair in (line.type_one, line.power)]
        cells += [whole, f"{line.forwards:.0f}", *counts, *[""] * len(TASKS)]
        out.append(f"| {_shown(line.name)} | {' | '.join(cells)} |")
        if line.name in PUBLISHED[setting]:
            name, values = PUBLISHED[setting][line.name]
            cells = [""] * (len(names) + 4) + [f"*{_number(value)}*" for value in values]
            out.append(f"| *{name}, published* | {' | '.join(cells)} |")
    told = [f"* *{_shown(line.name)}*: {line.what}" for line in lines]
    return "\n".join([*out, "", f"Published rows: {SOURCE}.", "", *told, ""])


def _shown(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}".removeprefix("0")


def write_page(
    path: Path, lines: Sequence[Line], soft: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]], command: str
) -> None:
    """Writes ``page``.

    Raises:
        ProbeError: the file cannot be written.
    """
    write_text(path, page(lines, soft, trained, command))
