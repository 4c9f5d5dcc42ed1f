"""Maps and checks of fresh posts of a planted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from probes.checks.crosscheck import Evidence, examine
from probes.citations.align import align
from probes.citations.clauses import pieces
from probes.records import Attribution, Example
from probes.validation.planted import Planted


@dataclasses.dataclass(frozen=True, eq=False)
class Probed:
    """One post of a planted model with all maps and checks."""

    example: Example
    attributions: list[Attribution]
    evidence: Evidence


def probe_posts(planted: Planted, count: int, methods: Sequence[str], targets: Sequence[str]) -> list[Probed]:
    """Attributes and checks ``count`` fresh posts; fillers come from posts of the same world."""
    from probes.saliency.attribute import attribute
    from probes.saliency.settings import Settings

    examples = planted.examples(count)
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
