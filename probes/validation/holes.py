"""A planted world with an offset: every token taken away moves the label, whatever it says; one letter is the cue.

A closed form, so that the truth is exact: the label's log-odds are the cue's weight plus ``offset`` for each token the
model attends to, the pad token and filler letters included. Clauses differ in length, so a map that leaves holes ranks
them by length; the cue's clause is the shortest. In the same world without an offset the clauses of other posts may
speak for the other label, and then it is the map that puts them there that misleads.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from probes.checks.crosscheck import examine, unit_sums, units_hit
from probes.citations.align import align
from probes.citations.clauses import pieces
from probes.records import Example
from probes.stats import auroc

_FILLERS = "bcdefghij"
CUE_WEIGHT = 2.0
_TOLD = {
    "hole": "cue AUROC, erase",
    "filled": "cue AUROC, erase_resample",
    "shut": "maps of erasure that may not speak",
    "unfilled": "maps of erasure by other text that may not speak",
    "before": "posts supported, no contrast",
    "after": "posts supported",
}


def with_offset(offset: float, count: int, seed: int = 0, others: float = 0.0) -> dict[str, float]:
    """Probes ``count`` posts of the world.

    Args:
        offset: nats of each token. others: nats of a letter that stands in other posts only; most of them is that.

    Returns:
        ``hole``, ``filled``: mean AUROC of the cue's clause under ``erase`` and ``erase_resample``; ``shut``,
        ``unfilled``: share of posts where the offset shuts them; ``before``, ``after``: share of posts found supported
        by integrated gradients and ``erase`` alone, and with ``erase_resample`` beside them (all explanations quote
        the cue).
    """
    from probes.saliency.attribute import attribute
    from probes.saliency.settings import Settings
    from probes.validation.selftest import closed_form_probe

    rng = random.Random(seed)
    probe = closed_form_probe(
        {"x": [CUE_WEIGHT, 1.0], "y": [others, 1.0], "": [0.0, 1.0]}
        | {letter: [0.0, 1.0] for letter in (*_FILLERS, ",", ".", " ")},
        lambda seen: seen[..., 0] + offset * seen[..., 1],
    )
    encode = probe.token_bytes.encode
    found: dict[str, list[float]] = {name: [] for name in ("hole", "filled", "shut", "unfilled", "before", "after")}
    for at in range(count):
        clauses = ["".join(rng.choices(_FILLERS, k=rng.randint(4, 9))) for _ in range(rng.randint(8, 12))]
        clauses.insert(rng.randint(0, len(clauses)), "xb")
        post = ", ".join(clauses) + "."
        start = post.index("xb")
        example: Example = probe.encode(
            {
                "id": str(at),
                "post": post,
                "prompt_ids": encode(f"p {post} ?"),
                "output_ids": encode('A says "xb"'),
                "label_text": "A",
                "parsed_label": "a",
                "parsed_explanation": 'says "xb"',
                "candidates": {"a": "A", "b": "B"},
                "cues": [[start, start + 2]],
            }
        )
        fillers = tuple("".join(rng.choices("yyybcd" if others else _FILLERS, k=9)) for _ in range(8))
        maps = attribute(probe, example, ("ig", "erase", "erase_resample"), ("label",), Settings(seed=seed), fillers)
        units = pieces(post)
        marked = units_hit(example.cues or (), units)
        for name, method in (("hole", "erase"), ("filled", "erase_resample")):
            values = next(unit_sums(a.char_values, units) for a in maps if a.method == method)
            found[name].append(auroc(values, marked))
        for name, chosen in (("before", maps[:2]), ("after", maps)):
            report = examine(
                chosen, align(example), example_id=example.id, length=len(post), units=units, cues=example.cues
            ).report
            found[name].append(report.verdict == "supported")
        failed = {c.method for c in report.checks if c.name == "erasure_offset" and c.status == "failed_gate"}
        found["shut"].append("erase" in failed)
        found["unfilled"].append("erase_resample" in failed)
    return {name: float(np.mean(values)) for name, values in found.items()}


def holes(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """V11: every token taken away moves the label by so many nats, whatever it says; a contrast must find the cue.

    And where nothing is moved by what is missing, but the text of other posts speaks for the other label, the contrast
    must not take from a good map its voice.
    """
    from probes.validation.rows import row

    rows = []

    def add(key: str, where: str, found: dict[str, float], bounds: dict[str, float]) -> None:
        for name, value in found.items():
            rows.append(row(f"V11.{key}.{name}", f"{_TOLD[name]}, {where}", value, bounds.get(name), ">="))

    for nats in (0.0, 0.5, -0.5):
        found = with_offset(nats, count, seed)
        add(f"{nats:+}", f"{nats:+} nats for any token hidden", found, {"filled": 0.95, "after": 0.95})
    for nats in (-1.0, -2.0):
        found = with_offset(0.0, count, seed, nats)
        add(f"others{nats:+}", f"{nats:+} nats for a letter of other posts", found, {"hole": 0.95, "after": 0.95})
    return rows
