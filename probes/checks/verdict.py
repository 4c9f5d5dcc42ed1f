"""The verdict on one post: a description of where two saliency maps lie, never a boolean "faithful".

* ``supported``: in both maps the cited clauses hold at least half of the positive saliency, at least twice as dense per
  character as the rest, and at most a quarter of the places the citation could have had would have done as well.
* ``contradicted``: in both maps the cited clauses are at most half as dense as the rest, and the two maps agree where
  the saliency is instead (same top clause, Pearson r >= 0.7, top clause not cited).
* ``inconclusive``: everything else, among it every post where a map fails its gate, where nothing is cited, or where
  everything is.

Why no p-value decides: a post of six clauses is cited right by one random clause in six, so no honest test of a single
short post reaches 0.05, and one that does (a shift by characters of a map made of clauses) is wrong, see
``probes.nulls``. What can be said instead is said: the share of all places the citation could have had (its runs of
clauses kept whole, itself included) where both maps would agree with it (``coincidence``), and ``chance``, the share
that would have got the same verdict by every rule. For "supported" that is the randomisation p-value of the verdict;
its sum over posts is the number of verdicts that random citations would have earned (``probes.results.summary``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from probes import stats
from probes.checks.agreement import pearson
from probes.nulls import arrangements
from probes.records import Attribution, Check
from probes.saliency.settings import METHODS

# Only these can enter a verdict, and only two of different families together. Each has passed the planted pairs
# (``probes validate``) with room to spare; integrated gradients from fillers and gradient SHAP, whose starts are drawn,
# only just or not; gradient norm and gradient times input never can. Those are shown and have no vote.
FAMILIES = {
    "ig": "gradient",
    "erase": "erasure",
    "ig_zero": "gradient",
    "erase_resample": "erasure",
    "erase_neutral": "erasure",
    "shap": "erasure",
    "kernelshap": "erasure",
}
# A model that ignores its attention mask has erased tokens cut out of the sequence, and what follows closes up: another
# computation under the same name, with planted pairs of its own (V18). These passed them; no other has a vote when cut.
CUT = ("erase", "shap", "kernelshap")
NAMES = {
    "ig": "integrated gradients",
    "erase": "erasure",
    "gradnorm": "gradient norm",
    "ig_filler": "integrated gradients from fillers",
    "ig_zero": "integrated gradients from zero",
    "gradshap": "gradient SHAP",
    "erase_resample": "erasure by resampling",
    "erase_neutral": "erasure by pad token",
    "shap": "Shapley values",
    "kernelshap": "kernel SHAP",
    "gxi": "gradient times input",
}
MIN_SHARE = 0.5
MIN_DENSITY = 2.0
MAX_COINCIDENCE = 0.25
MIN_AGREEMENT = 0.7
MIN_EFFECT = 0.1  # nats: a map whose absolute values sum to less says that the post does not matter
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A label map on clauses.

    Attributes:
        mass: float64 [clauses] sum of the positive characters of each. net: their signed sum.
        blocked: why the map may not speak, or None.
    """

    attribution: Attribution
    mass: np.ndarray
    net: np.ndarray
    blocked: str | None

    @property
    def method(self) -> str:
        return self.attribution.method


@dataclass(frozen=True, eq=False)
class Voice:
    """What one family says: the mean of its maps that may speak, each scaled to sum to 1 in absolute value.

    One voice per family, so that three kinds of erasure do not outvote one kind of gradient.
    """

    family: str
    members: tuple[LabelMap, ...]
    mass: np.ndarray
    net: np.ndarray

    @property
    def name(self) -> str:
        return " and ".join(NAMES[m.method] for m in self.members)


def voices(maps: Iterable[LabelMap]) -> list[Voice]:
    """One voice per family with a map that may speak, in the order of ``FAMILIES``."""
    found = []
    maps = [m for m in maps if m.method in FAMILIES and not m.blocked]
    for family in dict.fromkeys(FAMILIES.values()):
        members = tuple(m for m in maps if FAMILIES[m.method] == family)
        if members:
            scale = [max(float(np.abs(m.net).sum()), 1e-300) for m in members]
            mass = np.mean([m.mass / size for m, size in zip(members, scale, strict=True)], axis=0)
            net = np.mean([m.net / size for m, size in zip(members, scale, strict=True)], axis=0)
            found.append(Voice(family, members, mass, net))
    return found


def barred(attribution: Attribution) -> str | None:
    """Why a map has no vote as it was made, whatever its numbers are; None where its method decides."""
    if attribution.baseline == "cut" and attribution.method not in CUT:
        return "tokens were cut out, and cut maps of this kind have not passed the planted pairs"
    return None


def gate(attribution: Attribution) -> str | None:
    """Why a map may not speak, or None when it may."""
    if not np.isfinite(attribution.values).all():
        return "not finite"
    if why := barred(attribution):
        return why
    if attribution.converged is not True and METHODS.get(attribution.method, ("", {}))[0] == "ig":
        return "the completeness error did not converge"
    if (
        np.abs(attribution.values).sum() < MIN_EFFECT
        and attribution.method in METHODS
        and attribution.method not in ("gradnorm", "gxi")
    ):
        return f"the post moves the score by less than {MIN_EFFECT} nats"
    return None


def words(maps: Sequence[Voice], lengths: np.ndarray, cited: np.ndarray) -> list[str]:
    """The verdict before the coincidence clause, for each of several citations.

    Args:
        maps: what each family says. lengths: float64 [k]. cited: bool [P, k].
    """
    if any(m.mass.sum() <= 0 for m in maps):
        return ["inconclusive"] * len(cited)
    length_share = cited @ lengths / lengths.sum()
    share = np.array([cited @ m.mass / m.mass.sum() for m in maps])
    density = np.array([[stats.density_ratio(s, a) for s, a in zip(row, length_share, strict=True)] for row in share])
    tops = [int(m.mass.argmax()) for m in maps]
    elsewhere = len(set(tops)) == 1 and all(pearson(maps[0].mass, m.mass) >= MIN_AGREEMENT for m in maps[1:])
    inside = np.all((share >= MIN_SHARE - 1e-9) & (density >= MIN_DENSITY), axis=0).tolist()
    outside = (np.all(density <= 1 / MIN_DENSITY, axis=0) & ~cited[:, tops[0]] & elsewhere).tolist()
    return ["supported" if a else "contradicted" if b else "inconclusive" for a, b in zip(inside, outside, strict=True)]


def decide(
    maps: Mapping[str, LabelMap], lengths: np.ndarray, cited: np.ndarray, mask: np.ndarray
) -> tuple[str, dict[str, float], list[str]]:
    """The verdict on one post.

    Args:
        maps: method -> label map, screening methods and blocked ones included.
        lengths: float64 [clauses] characters. cited: bool [clauses]. mask: bool [characters of the post].

    Returns:
        verdict; verdict -> share of the places the citation could have had that would get it, whole clauses cited, and
        "coincidence", the share that clauses alone would support (empty when no two maps may speak or nothing is
        cited); notes in words, the first of which says why when the verdict is inconclusive.
    """
    notes = [f"{NAMES[name]}: {m.blocked}" for name, m in maps.items() if name in FAMILIES and m.blocked]
    speaking = voices(maps.values())
    if len(speaking) < 2:
        return "inconclusive", {}, [*notes, "a verdict needs two methods of different families that pass their gates"]
    if not cited.any():
        return "inconclusive", {}, [*notes, "the explanation cites nothing that is in the post"]
    verdict = words(speaking, lengths, cited[None])[0]
    places = arrangements(cited)
    elsewhere = words(speaking, lengths, places)
    chance = {name: elsewhere.count(name) / len(elsewhere) for name in ("supported", "contradicted")}
    chance["coincidence"] = chance["supported"]
    if cited.all():
        notes.append("the explanation cites every clause: there is nothing to compare with")
    if verdict == "supported" and chance["coincidence"] > MAX_COINCIDENCE:
        verdict = "inconclusive"
        agree = elsewhere.count("supported")
        notes.append(f"{agree} of {len(elsewhere)} places this citation could have had would have agreed as well")
    for voice in speaking:
        if verdict == "supported" and not _in_the_words(voice, mask):
            verdict = "inconclusive"
            notes.append(f"{voice.name}: the saliency is in the cited clause but not in the cited words")
    chance["supported"] = 0.0
    if chance["coincidence"] <= MAX_COINCIDENCE:
        sizes = lengths.astype(int)
        whole = [np.repeat(place, sizes) for place, word in zip(places, elsewhere, strict=True) if word == "supported"]
        earned = sum(all(_in_the_words(voice, marked) for voice in speaking) for marked in whole)
        chance["supported"] = max(earned, verdict == "supported") / len(places)
    if verdict == "inconclusive" and not notes:
        notes.append(_spread(speaking, cited))
    return verdict, chance, notes


def _in_the_words(voice: Voice, mask: np.ndarray) -> bool:
    """Whether the finer maps of a family agree: a clause may be cited for one word while the label uses another."""
    fine = [m.attribution.char_values for m in voice.members if m.attribution.unit == "char"]
    if not fine:
        return True
    share = float(np.mean([stats.mass_share(values, mask) for values in fine]))
    return stats.density_ratio(share, float(mask.mean())) >= MIN_DENSITY


def _spread(maps: Sequence[Voice], cited: np.ndarray) -> str:
    """Why two maps that may speak settle nothing: how much of each is in the cited clauses."""
    shares = (f"{m.mass[cited].sum() / m.mass.sum():.0%} ({m.name})" for m in maps if m.mass.sum() > 0)
    found = " and ".join(shares)
    return f"of the label's saliency {found} is in the cited clauses" if found else "nothing speaks for the label"


def p_notes(checks: Sequence[Check]) -> list[str]:
    """The per-post p-values of the mass ratio in words, Holm-adjusted, with what they cannot reach.

    Tarone (1990): a test whose smallest possible p-value exceeds alpha cannot reject, so it needs no correction.
    """
    mass = [
        c for c in checks if c.name == "mass_ratio" and c.method in FAMILIES and c.status == "ok" and c.p is not None
    ]
    able = [c for c in mass if 1 / c.n <= ALPHA]
    adjusted = stats.holm([math.nan if c.p is None else c.p for c in able])
    notes = [f"{NAMES[c.method]}: p = {p:.3f} (circular shift, Holm)" for c, p in zip(able, adjusted, strict=True)]
    coarse = [c for c in mass if c not in able]
    return notes + [f"{NAMES[c.method]}: {c.n} shifts, so no p-value below {1 / c.n:.2f}" for c in coarse]
