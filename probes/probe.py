"""``Probe``: the face of the package. A causal language model made ready to be probed."""

from __future__ import annotations

from collections.abc import Sequence

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
