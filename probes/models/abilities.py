"""What a model can do, as its trial found (``probes.models.trial``), and the engine obeys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Abilities:
    """What a model can do besides answering token ids. A reason is empty where it can.

    Attributes:
        packs: several continuations in one sequence.
        counts: it counts its positions itself: right only where it is given none.
        on_ids: why it is given token ids instead of their embeddings.
        ungraded: why it has no gradient by the embeddings.
        unmasked: why erased tokens are cut out of the sequence instead of hidden from attention.
        unkept: why what stands before the post is run in every pass.
    """

    packs: bool = True
    counts: bool = False
    on_ids: str = ""
    ungraded: str = ""
    unmasked: str = ""
    unkept: str = ""

    def both(self, other: Abilities) -> Abilities:
        """What each of two can. Nobody has tried that together yet: ``probes.models.trial.try_joined`` does."""
        reasons = {name: getattr(self, name) or getattr(other, name)
                   for name in ("on_ids", "ungraded", "unmasked", "unkept")}  # fmt: skip
        return Abilities(self.packs and other.packs, self.counts or other.counts, **reasons)

    @property
    def way(self) -> tuple[str, ...]:
        """How it is called, for a cache to name: what is done otherwise than where it can do all, without the reasons,
        which hold numbers of one row."""
        done = {"one at a time": not self.packs, "own positions": self.counts, "ids": self.on_ids,
                "no gradients": self.ungraded, "cut": self.unmasked, "prefix every time": self.unkept}  # fmt: skip
        return tuple(name for name, otherwise in done.items() if otherwise)

    @property
    def limits(self) -> dict[str, str]:
        """What is measured otherwise than in other models, in words; of most models nothing."""
        said = {"gradients": f"no maps from gradients: {self.ungraded}"} if self.ungraded else {}
        if self.unmasked:
            said["masks"] = f"erased tokens are cut out of the sequence, what follows closes up: {self.unmasked}"
        return said
