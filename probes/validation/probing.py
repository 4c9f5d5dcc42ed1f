"""Maps and checks of fresh posts of a planted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from probes.checks.crosscheck import Evidence, examine, unit_sums, units_hit
from probes.checks.verdict import gate
from probes.citations.align import align
from probes.citations.clauses import pieces
from probes.records import Attribution, Example
from probes.stats import auroc
from probes.validation.planted import Planted, World

# Pairs that share nothing but the task: architecture, script, words, place and length differ. In the last, the post's
# last mark of punctuation and the template's closing quotation mark are one token, which decides as much as the cue.
PAIRS = (
    World(architecture="glm", language="en", seed=11),
    World(architecture="llama", language="zh", place="late", clauses=(4, 6), seed=12),
    World(architecture="gpt2", language="en", punctuation=False, clauses=(5, 7), layers=3, seed=13),
    World(architecture="qwen2", language="en", quoted=True, seed=14),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Probed:
    """One post of a planted model with all maps and checks."""

    example: Example
    attributions: list[Attribution]
    evidence: Evidence


def probe_posts(
    planted: Planted, count: int, methods: Sequence[str], targets: Sequence[str] = ("label", "explanation")
) -> list[Probed]:
    """Attributes and checks ``count`` fresh posts."""
    return probed(planted, planted.examples(count), methods, targets)


def probed(
    planted: Planted, examples: Sequence[Example], methods: Sequence[str], targets: Sequence[str]
) -> list[Probed]:
    """Attributes and checks these posts; fillers come from the others of them."""
    from probes.saliency.attribute import attribute
    from probes.saliency.settings import Settings

    texts = [(i, e.post[a:b]) for i, e in enumerate(examples) for a, b in pieces(e.post)]
    found = []
    for i, example in enumerate(examples):
        fillers = tuple(text for j, text in texts if j != i)
        maps = attribute(planted.probe, example, methods, targets, Settings(), fillers)
        found.append(Probed(example, maps, examined(example, maps)))
    return found


def examined(example: Example, maps: Sequence[Attribution]) -> Evidence:
    """What these maps say of one planted post: verdict, masses, nulls. Where the cue and the decoy are is known."""
    return examine(
        maps,
        align(example),
        example_id=example.id,
        length=len(example.post),
        units=pieces(example.post),
        label=example.label,
        explanation_length=len(example.explanation or ""),
        cues=example.cues,
        decoys=example.decoys,
    )


def cue_auroc(found: Attribution, example: Example, marked: str = "cues") -> float:
    """AUROC of the marked clauses under a map."""
    units = pieces(example.post)
    return auroc(unit_sums(found.char_values, units), units_hit(getattr(example, marked) or (), units))


def cue_aurocs(posts: Sequence[Probed], method: str, target: str = "label", marked: str = "cues") -> list[float]:
    """``cue_auroc`` of one method's map of each post where it passes its gate (elsewhere it may not speak)."""
    maps = [(a, p.example) for p in posts for a in p.attributions if (a.method, a.target) == (method, target)]
    found = [cue_auroc(a, example, marked) for a, example in maps if not gate(a)]
    return [value for value in found if np.isfinite(value)]
