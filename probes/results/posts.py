"""What a run keeps of each post: clauses, citations, maps, checks, read strictly. Which posts of two runs are one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from probes import stats
from probes.checks.crosscheck import Evidence, examine
from probes.citations.clauses import choose_cut
from probes.citations.normalise import normalise
from probes.errors import ProbeError, ProbeInputError
from probes.foreign import first_line, plain
from probes.notebook import Shown
from probes.records import Attribution, Check, Citation, Example, Span
from probes.saliency.settings import METHODS

# Of a post or an explanation, in characters: beyond what a model can be asked at once. A redacted post is a number
# alone, and what is shown of it is made by that number.
MOST_CHARACTERS = 1 << 18
MOST_UNITS = 200  # the full budget cuts a post into 60; what is asked of them takes the square of their number
_MOST_CITED = 100  # characters cited for one of the post: a few citations may overlap
_MOST_SPANS = 10_000  # that are marked in a post: each is looked for in every clause
_MOST_STEPS = 1000  # of a chain of reasoning, or clauses put into a post; nine and eight are made


def cited_target(citation: Citation) -> str:
    """The attribution target of one cited phrase: its characters of the explanation."""
    return f"explanation[{citation.expl_char[0]}:{citation.expl_char[1]}]"


@dataclass(frozen=True, eq=False)
class PostResult(Shown):
    """One post, its citations and its maps. Character offsets throughout; ``units`` are the clauses of the post.

    ``measured`` are checks that needed the model (necessity and sufficiency of the cited words ...); ``rationales`` are
    spans that people marked, ``user`` is the author, ``counterfactuals`` are (label shift, mentioned), one
    per inserted clause; ``chain`` is (share of the chain of reasoning that is there, log-odds of the label).

    ``border`` tokens also hold characters of the template and were not varied; ``not_varied`` are the post's characters
    in them, ``border_letters`` says whether one is a letter or digit. ``contrast``: what the label's score is
    (``records.Example.contrast``). ``cut``: clause | word, what the units are. ``pair``: id of its swap pair.

    ``post``, ``explanation`` and ``label_text`` are None in a redacted result; lengths and offsets stay.
    """

    id: str
    task: str
    label: str
    label_text: str | None
    length: int
    units: tuple[Span, ...]
    post: str | None
    explanation: str | None
    explanation_length: int
    cues: tuple[Span, ...] | None
    decoys: tuple[Span, ...] | None
    citations: tuple[Citation, ...]
    attributions: tuple[Attribution, ...]
    measured: tuple[Check, ...] = ()
    rationales: tuple[Span, ...] | None = None
    user: str | None = None
    counterfactuals: tuple[tuple[float, float], ...] = ()
    border: int = 0
    not_varied: tuple[Span, ...] = ()
    border_letters: bool = False
    contrast: str = "log-odds"
    cut: str = "clause"
    pair: str | None = None
    chain: tuple[tuple[float, float], ...] = ()

    def __repr__(self) -> str:
        """Without the post, its maps and its author: it ends in logs, and beside the picture in every notebook."""
        return f"PostResult({self.id!r}, {len(self.attributions)} maps)"

    @classmethod
    def of(
        cls,
        example: Example,
        citations: Sequence[Citation],
        attributions: Sequence[Attribution],
        units: tuple[Span, ...],
        measured: Sequence[Check] = (),
    ) -> PostResult:
        return cls(
            id=example.id,
            task=example.task,
            label=example.label,
            label_text=example.label_text,
            length=len(example.post),
            units=units,
            post=example.post,
            explanation=example.explanation,
            explanation_length=len(example.explanation or ""),
            cues=example.cues,
            decoys=example.decoys,
            citations=tuple(citations),
            attributions=tuple(attributions),
            measured=tuple(measured),
            rationales=example.rationales,
            user=example.user,
            border=len(example.border),
            not_varied=_stretches(~example.varied),
            border_letters=any(
                c.isalnum() for c, varied in zip(example.post, example.varied, strict=True) if not varied
            ),
            contrast=example.contrast,
            cut=example.cut or choose_cut([example.post]),
            pair=example.pair,
        )

    def redacted(self) -> PostResult:
        """A copy with offsets and scores only: no text, no hash of a quote, no author, no pair."""
        citations = tuple(replace(citation, text_hash="") for citation in self.citations)
        return replace(self, post=None, explanation=None, label_text=None, citations=citations, user=None, pair=None)

    def evidence(self, null: str = "circular", n_boot: int = 2000, seed: int = 0) -> Evidence:
        """Runs all checks (``crosscheck.examine``)."""
        return examine(
            self.attributions,
            self.citations,
            example_id=self.id,
            length=self.length,
            units=self.units,
            label=self.label,
            explanation_length=self.explanation_length,
            cues=self.cues,
            decoys=self.decoys,
            measured=self.measured,
            rationales=self.rationales,
            user=self.user,
            null=null,
            n_boot=n_boot,
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Only JSON types; ``from_dict`` gives an equal result back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "citations": [citation.to_dict() for citation in self.citations],
            "attributions": [attribution.to_dict() for attribution in self.attributions],
            "measured": [check.to_dict() for check in self.measured],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PostResult:
        """Inverse of ``to_dict``.

        Raises:
            ProbeInputError: written by another version, damaged, or not consistent in itself.
        """
        try:
            read: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__}
            for name in ("units", "cues", "decoys", "rationales", "not_varied"):
                read[name] = None if read[name] is None else tuple((a, b) for a, b in read[name])
            read["citations"] = tuple(Citation.from_dict(item) for item in read["citations"])
            read["attributions"] = tuple(Attribution.from_dict(item) for item in read["attributions"])
            read["measured"] = tuple(Check.from_dict(item) for item in read["measured"])
            for name in ("counterfactuals", "chain"):
                read[name] = tuple((a, b) for a, b in read[name])
            result = cls(**read)
            result._require_sound()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ProbeError) as error:
            raise ProbeInputError(f"not a post as this version writes it ({first_line(error)})") from error
        return result

    def _require_sound(self) -> None:
        """Raises where a field has another type, or a span or number lies outside what it counts."""

        def require(good: object, what: str) -> None:
            if not good:
                raise ProbeInputError(f"{what} does not fit the rest")

        def texts(*values: object, none: bool = False) -> bool:
            return all(isinstance(value, str) or (none and value is None) for value in values)

        def numbers(*values: object) -> bool:
            return all(
                value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values
            )

        def within(spans: Sequence[Span] | None, length: int) -> bool:
            return all(type(a) is int and type(b) is int and 0 <= a < b <= length for a, b in spans or ())

        lengths = (self.length, self.explanation_length)
        require(all(type(n) is int and 0 <= n <= MOST_CHARACTERS for n in lengths), "a length")
        require(texts(self.id, self.task, self.label), "id, task or label")
        require(texts(self.label_text, self.post, self.explanation, self.user, none=True), "a text")
        require(self.post is None or len(self.post) == self.length, "the post")
        require(self.post is not None or self.explanation is None, "an explanation without its post")
        require(self.explanation is None or len(self.explanation) == self.explanation_length, "the explanation")
        for spans in (self.units, self.cues, self.decoys, self.rationales, self.not_varied):
            require(within(spans, self.length), "a span")
        marked = (self.cues, self.decoys, self.rationales)
        require(all(len(spans or ()) <= _MOST_SPANS for spans in marked), "the number of spans")
        covered = [0, *(b for _, b in self.units)]
        require(len(self.units) <= MOST_UNITS, "the number of clauses")
        require(covered[-1] == self.length and [a for a, _ in self.units] == covered[:-1], "a clause")
        for one in self.citations:
            require(texts(one.id, one.kind, one.text_hash) and numbers(one.score), "a citation")
            require(within((one.expl_char,), self.explanation_length), "a citation")
            require(within(one.post_char, self.length), "a citation")
        cited = sum(b - a for one in self.citations for a, b in one.post_char)
        require(cited <= _MOST_CITED * self.length, "what is cited")
        maps = [(one.method, one.target) for one in self.attributions]
        require(len(set(maps)) == len(maps) and {method for method, _ in maps} <= METHODS.keys(), "the list of maps")
        for one in self.attributions:
            require(texts(one.method, one.target, one.unit, one.baseline, one.dtype, one.model_fp), "a map")
            require(numbers(one.f_input, one.f_baseline, one.delta, one.rel_delta, one.seconds, one.seed), "a map")
            require(one.converged in (None, True, False) and isinstance(one.params, dict), "a map")
            require(one.example_id == self.id and within(one.unit_spans, self.length), "a map")
            require(one.values.shape == (len(one.unit_spans),) and one.char_values.shape == (self.length,), "a map")
            require(np.isfinite(one.values).all() and np.isfinite(one.char_values).all(), "a map")
        for one in self.measured:
            plain_numbers = (one.value, one.null_mean, one.null_q05, one.null_q95, one.p, one.n)
            require(texts(one.name, one.method, one.status, *one.inputs), "a check")
            require(numbers(*plain_numbers, *(one.ci or ()), *one.draws), "a check")
            require(one.ci is None or len(one.ci) == 2, "a check")
        steps = (self.chain, self.counterfactuals)
        require(all(len(pairs) <= _MOST_STEPS for pairs in steps), "the number of steps")
        require(all(numbers(*pair) and None not in pair for pair in self.counterfactuals), "a counterfactual")
        require(all(numbers(*pair) and None not in pair for pair in self.chain), "a chain")
        require(all(0 <= share <= 1 and math.isfinite(value) for share, value in self.chain), "a chain")


def _stretches(mask: np.ndarray) -> tuple[Span, ...]:
    starts, ends = stats.runs(mask)
    return tuple((int(a), int(b)) for a, b in zip(starts, ends, strict=True))


def paired(first: Sequence[PostResult], second: Sequence[PostResult]) -> list[tuple[PostResult, PostResult]]:
    """The posts of two runs that have one id.

    Raises:
        ProbeInputError: an id is of two posts; it is often but the number of a line.
    """
    by_id = {r.id: r for r in second}
    found = [(r, by_id[r.id]) for r in first if r.id in by_id]
    if apart := [one.id for one, other in found if not _same_post(one, other)]:
        many = f"as are {len(apart)} of the {len(found)} ids that both runs have"
        said = f"post {plain(apart[0], 80)!r} is another text in the second run, {many}"
        raise ProbeInputError(f"{said}; compare runs over the same posts")
    return found


def erased_otherwise(pairs: Sequence[tuple[PostResult, PostResult]]) -> str | None:
    """Where one of two runs has erased tokens cut out of the sequence and the other hidden from attention, as its model
    can: a line that names the methods and says which run cut. None where both did the same."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        first, second = ({a.method: a.baseline for a in one.attributions if a.target == "label"} for one in pair)
        for method in first.keys() & second.keys():
            if {first[method], second[method]} == {"cut", "attention"}:
                found.setdefault("first" if first[method] == "cut" else "second", []).append(method)
    said = [
        f"{', '.join(sorted(set(methods)))}: the {run} run has erased tokens cut out of the sequence, the "
        f"{'second' if run == 'first' else 'first'} has them hidden from attention"
        for run, methods in found.items()
    ]
    return f"{'; '.join(said)}; such maps differ by how they erase, too" if said else None


def _same_post(one: PostResult, other: PostResult) -> bool:
    """As far as it can be told: of a redacted post its length is left. Case and width may be a tokenizer's doing."""
    if one.post is None or other.post is None:
        return one.length == other.length
    return one.post == other.post or normalise(one.post).text == normalise(other.post).text
