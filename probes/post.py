"""One post of a data set: from a row laid out to its maps, its citations and what was measured on the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.checks.crosscheck import post_units
from probes.checks.swaps import LeftOut, Swap, counterpart, swap
from probes.checks.verdict import FAMILIES
from probes.citations.align import align, merge_spans
from probes.errors import ProbeError, ProbeInputError
from probes.records import Attribution, Example
from probes.results.cache import Cache
from probes.results.store import SCHEMA_VERSION, PostResult, cited_target
from probes.saliency.settings import METHODS, NEED_FILLERS, Settings

if TYPE_CHECKING:
    from probes.models.probed import Probed

Within = Callable[[float], None]  # told the share of a post that is done


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run does to each post: methods, fillers per post, other rows to exchange with, how deep to look."""

    methods: tuple[str, ...]
    fillers: tuple[tuple[str, ...], ...]
    examples: tuple[Example, ...]
    deep: bool
    seed: int

    def able(self, at: int) -> tuple[str, ...]:
        """The methods a post can have: those that put other text in its place need other text."""
        return tuple(m for m in self.methods if self.fillers[at] or m not in NEED_FILLERS)


def probe_post(
    probe: Probed,
    example: Example,
    plan: Plan,
    at: int,
    settings: Settings,
    cache: Cache,
    name: str,
    within: Within | None = None,
) -> PostResult:
    """Attributes one post, aligns its citations, and measures on the model what its budget asks for.

    Args:
        at: its place in ``plan``.
        name: its name in the cache; finished maps are kept beside it, and read back.
        within: told how far it is, after each map.
    """
    from probes.checks.faithfulness import cited_effects

    citations = align(example)
    targets = ("label", "explanation") if example.explanation else ("label",)
    # What each cited phrase is written from. Erasure reads every target from the same passes, so only it is asked.
    phrases = tuple(dict.fromkeys(cited_target(c) for c in citations)) if example.explanation else ()
    calls: list[tuple[str, tuple[str, ...]]] = []
    for method in plan.able(at):
        if METHODS[method][0] in ("erase", "shap", "kernelshap"):  # one pass serves all targets
            calls.append((method, targets + phrases * (method == "erase")))
        else:
            calls += [(method, (target,)) for target in targets]
    maps = _maps(probe, example, calls, settings, plan.fillers[at], cache, name, within)
    spans = merge_spans(span for citation in citations for span in citation.post_char)
    judged = any(a.method == "ig" for a in maps)  # the fast budget screens; it does not pay for this
    measured = list(cited_effects(probe, example, spans)) if spans and judged else []
    moved: tuple[tuple[float, float], ...] = ()
    if plan.deep:
        from probes.checks.behaviour import counterfactuals, mediation_share, weight_of_evidence
        from probes.checks.gates import judge, max_sensitivity

        donors = [e for j, e in enumerate(plan.examples) if j != at]
        measured += [weight_of_evidence(probe, example), mediation_share(probe, example, donors)]
        measured += judge(probe, example, maps, settings)
        measured += max_sensitivity(probe, example, maps, settings, plan.fillers[at])
        moved = counterfactuals(probe, example, plan.fillers[at], seed=plan.seed)
    result = PostResult.of(example, citations, maps, post_units(maps, example.post, example.cut), measured)
    return dataclasses.replace(result, counterfactuals=moved)


def _maps(
    probe: Probed,
    example: Example,
    calls: Sequence[tuple[str, tuple[str, ...]]],
    settings: Settings,
    fillers: Sequence[str],
    cache: Cache,
    name: str,
    within: Within | None,
) -> list[Attribution]:
    """The maps of one post, each call kept as soon as it is made: on a real model a post takes minutes, and Ctrl-C must
    not cost them. A map holds no text."""
    from probes.saliency.attribute import attribute

    maps: list[Attribution] = []
    for step, (method, targets) in enumerate(calls):
        part = cache.part(name, step)
        found = _kept(cache, part)
        if found is None:
            found = attribute(probe, example, (method,), targets, settings, fillers)
            _require_finite(found)
            cache.write(part, {"maps": [a.to_dict() for a in found]})
        maps += found
        if within:
            within((step + 1) / (len(calls) + 1))
    return maps


def _require_finite(maps: Sequence[Attribution]) -> None:
    for a in maps:
        if not (np.isfinite(a.values).all() and np.isfinite([a.f_input, a.f_baseline]).all()):
            raise ProbeError(
                f"{a.example_id}: the map {a.method} of the {a.target} is not finite in {a.dtype}; a model that "
                "overflows needs --dtype float32"
            )


def swap_pair(
    probe: Probed,
    pair: tuple[Example, Example],
    fillers: Sequence[str],
    results: tuple[PostResult, PostResult],
    settings: Settings,
    cache: Cache,
) -> list[Swap | LeftOut]:
    """One swap pair by every method that may give a verdict; the second post's maps for the first's answer are kept in
    the cache like a post."""
    from probes.saliency.attribute import attribute

    (first, second), (one, other) = pair, results
    methods = [a.method for a in one.attributions if a.target == "label" and a.method in FAMILIES]
    if first.label_text == second.label_text and first.ids[first.prompt_len :] == second.ids[second.prompt_len :]:
        maps = [a for a in other.attributions if a.target == "label"]
    else:
        try:
            moved = counterpart(first, second)
        except ProbeInputError:
            return [LeftOut(str(first.pair), m, "a prompt ends inside a character") for m in methods]
        able = [m for m in methods if fillers or m not in NEED_FILLERS]
        depends: list[Any] = [SCHEMA_VERSION, probe.fingerprint, able, dataclasses.asdict(settings), list(fillers)]
        name = cache.name([*depends, moved.to_dict()], kind="swap-")
        kept = _kept(cache, name)
        maps = attribute(probe, moved, able, ("label",), settings, fillers) if kept is None else kept
        if kept is None:
            cache.write(name, {"maps": [a.to_dict() for a in maps]})
    texts, units, turned = (first.post, second.post), (one.units, other.units), first.label != second.label
    return [
        swap(a, b, texts, units, str(first.pair), first.user, turned)
        for a in one.attributions
        for b in maps
        if a.target == "label" and a.method == b.method and a.method in methods
    ]


def _kept(cache: Cache, name: str) -> list[Attribution] | None:
    """Maps kept under a name; None where there are none, or none that can be used."""
    value = cache.read(name)
    with contextlib.suppress(KeyError, TypeError, ValueError, ProbeInputError):
        return None if value is None else [Attribution.from_dict(item) for item in value["maps"]]
    return None
