"""One post of a data set: from a row laid out to its maps, its citations and what was measured on the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.checks.crosscheck import post_units
from probes.checks.swaps import LeftOut, Swap, counterpart, swaps_of
from probes.checks.verdict import FAMILIES
from probes.citations.align import align, merge_spans
from probes.errors import ProbeError, ProbeInputError
from probes.records import Attribution, Check, Example
from probes.results.cache import Cache, digest
from probes.results.posts import PostResult, cited_target
from probes.results.store import SCHEMA_VERSION
from probes.saliency.settings import NEED_FILLERS, Settings

if TYPE_CHECKING:
    from probes.models.probed import Probed

Within = Callable[[float], None]  # told the share of a post that is done


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run does to each post.

    Attributes:
        fillers: per post. examples: other rows to exchange with. deep: the full budget. judged: not the fast one, which
            screens and does not pay for what runs the model again.
        limits: names of what the model cannot (``Abilities.limits``).
    """

    methods: tuple[str, ...]
    fillers: tuple[tuple[str, ...], ...]
    examples: tuple[Example, ...]
    deep: bool
    seed: int
    judged: bool = True
    limits: tuple[str, ...] = ()

    @functools.cached_property
    def together(self) -> str:
        """Digest of all rows as they are laid out: what lends and borrows (chains, explanations, labels) is of them."""
        return digest([digest(example.to_dict()) for example in self.examples])

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
        name: its name in the cache; finished steps are kept beside it, and read back.
        within: told how far it is, after each step.
    """
    from probes.checks.faithfulness import cited_effects

    citations = align(example)
    targets = ("label", "explanation") if example.explanation else ("label",)
    # What each cited phrase is written from. Erasure has it for nothing, from the passes of the other targets; a
    # gradient would have to go back once more for each.
    phrases = tuple(dict.fromkeys(cited_target(c) for c in citations)) if example.explanation else ()
    calls = [(method, targets + phrases * (method == "erase")) for method in plan.able(at)]
    deeper = 6 * plan.deep + plan.judged * (1 + chained(example))
    steps = Steps(cache, name, len(calls) + deeper, within)
    maps = _maps(probe, example, calls, settings, plan.fillers[at], steps)
    spans = merge_spans(span for citation in citations for span in citation.post_char)
    measured = steps.checks(lambda: cited_effects(probe, example, spans) if spans and plan.judged else ())
    moved: tuple[tuple[float, float], ...] = ()
    curve: list[list[float]] = []
    if plan.judged and chained(example):
        from probes.checks.chain import blocks, examine_chain

        def chain() -> list[Any]:
            block = next((one for one in blocks(plan.examples) if at in one), ())
            lenders = [plan.examples[other] for other in block if other != at]
            found = examine_chain(probe, example, lenders, str(min(block, default=at)))
            return [[c.to_dict() for c in found.checks], [list(point) for point in found.curve]]

        checks, curve = steps.kept(chain)
        measured += [Check.from_dict(c) for c in checks]
    if plan.deep:
        from probes.checks.behaviour import counterfactuals, mediation_share, weight_of_evidence
        from probes.checks.gates import judge, max_sensitivity

        donors, fillers = [e for j, e in enumerate(plan.examples) if j != at], plan.fillers[at]
        measured += steps.checks(lambda: [weight_of_evidence(probe, example)])
        measured += steps.checks(lambda: [mediation_share(probe, example, donors)])
        measured += steps.checks(lambda: judge(probe, example, maps, settings))
        measured += steps.checks(lambda: max_sensitivity(probe, example, maps, settings, fillers))
        pairs = steps.kept(lambda: [list(p) for p in counterfactuals(probe, example, fillers, seed=plan.seed)])
        moved = tuple((float(shift), float(said)) for shift, said in pairs)
    result = PostResult.of(example, citations, maps, post_units(maps, example.post, example.cut), measured)
    return dataclasses.replace(result, counterfactuals=moved, chain=tuple((a, b) for a, b in curve))


def chained(example: Example) -> bool:
    """Whether there is a chain of reasoning, or a hint, to examine (``probes.checks.chain``)."""
    return example.chain is not None or example.hint is not None


class Steps:
    """The steps of one post (or of what is done to several), each kept as soon as it is done: on a real model a post
    takes minutes, and Ctrl-C must not cost them. What is kept holds no text.

    Args:
        name: of the post in the cache. count: how many steps there are. within: told the share that is done.
    """

    def __init__(self, cache: Cache, name: str, count: int = 0, within: Within | None = None) -> None:
        self._cache, self._name, self._count, self._within = cache, name, count, within
        self._done = 0

    def kept(
        self,
        make: Callable[[], Any],
        read: Callable[[Any], Any] = lambda value: value,
        good: Callable[[Any], bool] = lambda found: True,
    ) -> Any:
        """What the next step gives, JSON types only, made or read back.

        Args:
            read: makes of JSON what is wanted; what it cannot read is made again, and what is not ``good`` when read.
        """
        part = self._cache.part(self._name, self._done)
        stored, found = self._cache.read(part), None
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, ProbeInputError):
            found = None if stored is None else (read(stored["made"]),)
            found = found if found and good(found[0]) else None
        if found is None:
            made = make()
            self._cache.write(part, {"made": made})
            found = (read(made),)
        self._done += 1
        if self._within:
            self._within(self._done / (self._count + 1))
        return found[0]

    def checks(self, make: Callable[[], Sequence[Check]]) -> list[Check]:
        """The next step, where it gives checks."""
        return self.kept(lambda: [c.to_dict() for c in make()], lambda value: [Check.from_dict(c) for c in value])

    def maps(
        self, make: Callable[[], Sequence[Attribution]], wanted: Sequence[tuple[str, str]] | None = None
    ) -> list[Attribution]:
        """The next step, where it gives maps: of these methods and targets (another version took other steps)."""

        def good(found: Sequence[Attribution]) -> bool:
            return wanted is None or [(a.method, a.target) for a in found] == list(wanted)

        return self.kept(lambda: [a.to_dict() for a in make()], lambda v: [Attribution.from_dict(a) for a in v], good)


def _maps(
    probe: Probed,
    example: Example,
    calls: Sequence[tuple[str, tuple[str, ...]]],
    settings: Settings,
    fillers: Sequence[str],
    steps: Steps,
) -> list[Attribution]:
    """The maps of one post, a step for each call: (method, targets)."""
    from probes.saliency.attribute import attribute

    def made(method: str, targets: tuple[str, ...]) -> list[Attribution]:
        found = attribute(probe, example, (method,), targets, settings, fillers)
        require_finite(found)
        return found

    found: list[Attribution] = []
    for method, targets in calls:
        wanted = [(method, target) for target in targets]
        found += steps.maps(lambda m=method, t=targets: made(m, t), wanted)
    return found


def require_finite(maps: Sequence[Attribution]) -> None:
    """Raises ``ProbeError`` where a model overflowed: such a map is nothing that can be kept."""
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
    (first, second), (one, other) = pair, results
    methods = [a.method for a in one.attributions if a.target == "label" and a.method in FAMILIES]
    if first.label_text == second.label_text and first.ids[first.prompt_len :] == second.ids[second.prompt_len :]:
        maps: Sequence[Attribution] = other.attributions
    else:
        try:
            moved = counterpart(first, second)
        except ProbeInputError:
            why, ids = "a prompt ends inside a character", (first.id, second.id)
            return [LeftOut(str(first.pair), m, why, ids) for m in methods]
        able = [m for m in methods if fillers or m not in NEED_FILLERS]
        depends: list[Any] = [SCHEMA_VERSION, probe.fingerprint, able, dataclasses.asdict(settings), list(fillers)]
        probe.scorer.check(moved)  # how the model is called with this row is a part of the name
        name = cache.name([*depends, moved.to_dict(), *probe.scorer.can.way], kind="swap-")
        kept = _kept(cache, name)
        if kept is None:
            steps = Steps(cache, name, len(able))
            kept = _maps(probe, moved, [(m, ("label",)) for m in able], settings, fillers, steps)
            cache.write(name, {"maps": [a.to_dict() for a in kept]})
        cache.forget_parts(name)
        maps = kept
    return swaps_of(first, second, one.attributions, maps, (one.units, other.units))


def _kept(cache: Cache, name: str) -> list[Attribution] | None:
    """Maps kept under a name; None where there are none, or none that can be used."""
    value = cache.read(name)
    with contextlib.suppress(KeyError, TypeError, ValueError, ProbeInputError):
        return None if value is None else [Attribution.from_dict(item) for item in value["maps"]]
    return None
