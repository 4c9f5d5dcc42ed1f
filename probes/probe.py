"""``Probe``: the face of the package. A causal language model made ready to be probed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from probes.checks.crosscheck import post_units
from probes.checks.swaps import LeftOut, Swap, counterpart, no_pair, swaps_of
from probes.citations.clauses import choose_cut
from probes.errors import ProbeInputError
from probes.models.probed import Probed
from probes.records import Attribution, Example
from probes.saliency.attribute import attribute
from probes.saliency.settings import Settings


class Probe(Probed):
    """A causal language model made ready to be probed: load it, lay a row out, attribute its label or explanation."""

    def attribute(
        self,
        example: Example,
        methods: Sequence[str] = ("ig", "erase", "gradnorm"),
        targets: Sequence[str] = ("label", "explanation"),
        units: str = "clause",
        fillers: Sequence[str] = (),
    ) -> list[Attribution]:
        """Saliency maps, one per method and target, with default settings (``probes.saliency.attribute.attribute``)."""
        return attribute(self, example, methods, targets, Settings(units=units), fillers)

    def swap(
        self,
        first: Example,
        second: Example,
        methods: Sequence[str] = ("ig", "erase"),
        fillers: Sequence[str] = (),
    ) -> list[Swap | LeftOut]:
        """Two posts that differ in one phrase: does the label move as their maps say (``probes.checks.swaps``)?

        Args:
            methods: those with a vote (``probes.checks.verdict.FAMILIES``); others are left out.
        Returns:
            one per method; ``probes.summarise_swaps`` makes the numbers of many pairs.
        Raises:
            ProbeInputError: the two are no pair; as ``attribute``.
        """
        if why := no_pair([first, second]):
            raise ProbeInputError(f"rows {first.id!r} and {second.id!r} are no swap pair: {why}")
        cut = choose_cut([first.post, second.post])
        first, second = dataclasses.replace(first, cut=cut), dataclasses.replace(second, cut=cut)
        maps, others = (
            self.attribute(example, methods, ("label",), fillers=fillers)
            for example in (first, counterpart(first, second))
        )
        units = post_units(maps, first.post, cut), post_units(others, second.post, cut)
        return swaps_of(first, second, maps, others, units)
