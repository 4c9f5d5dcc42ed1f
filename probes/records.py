"""The plain data that everything else passes on: a generated row laid out in tokens and characters; maps; checks.

Everything is indexed by position (token index, byte offset, character offset), never by token string: in a byte-level
BPE a token is any run of bytes, so one Chinese character may be cut into three tokens and one token may hold several.
Offsets count Python characters (code points). Spans are half-open ``(start, end)``.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from probes.errors import ProbeError, ProbeInputError
from probes.notebook import Shown
from probes.wording import reworded

Span = tuple[int, int]
ASKED = ("explanation", "reasoning")
R = TypeVar("R", bound="_Record")


def _plain(value: Any) -> Any:
    """JSON form of a field: arrays and tuples become lists, nested records become objects."""
    if isinstance(value, _Record):
        return value.to_dict()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


class _Record:
    """JSON in and out for the frozen dataclasses below."""

    _arrays: ClassVar[tuple[str, ...]] = ()
    _nested: ClassVar[dict[str, type[_Record]]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Only JSON types; ``from_dict`` gives an equal record back."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls: type[R], values: dict[str, Any]) -> R:
        """Inverse of ``to_dict``.

        Raises:
            ProbeInputError: a key is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if names != set(values):
            wrong = sorted(names.symmetric_difference(values))
            raise ProbeInputError(f"{cls.__name__}: keys missing or unknown: {', '.join(wrong)}")
        read: dict[str, Any] = {}
        for name, value in values.items():
            if name in cls._arrays:
                read[name] = np.asarray(value, dtype=np.float64)
            elif name in cls._nested:
                read[name] = tuple(cls._nested[name].from_dict(item) for item in value)
            else:
                read[name] = _frozen(value)
        return cls(**read)


def one_name(name: str) -> str:
    """One spelling for names of authors that differ in width, case, white space, in how accents are put together, or in
    characters nobody sees: posts of one author are not those of two."""
    seen = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen).casefold().split())


def somebody(name: object) -> str | None:
    """A name of an author or a pair; None where there is none, or nothing that anybody sees: nobody, not one author."""
    return str(name) if name is not None and one_name(str(name)) else None


def comparable(text: str) -> str:
    """What two spellings of one label sentence share: no case, no width, no quotation marks around it, no punctuation
    behind it. Signs and marks stay: they may be all that tells two labels apart (-1 and 1, C and C++)."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(text)
    while end and (text[end - 1] == " " or unicodedata.category(text[end - 1]).startswith("P")):
        end -= 1
    while start < end and (text[start] in " \"'" or unicodedata.category(text[start]) in ("Pi", "Ps")):
        start += 1
    return text[start:end]


@dataclass(frozen=True)
class Segment(_Record):
    """One named stretch of the full text: ``name`` is template | border | post | reasoning | label | explanation |
    other. ``reasoning`` is what a model thinks between its marks before it answers (``<think> ... </think>``).

    ``tok`` is its token range, ``char`` its characters in ``Example.text``. The token range of the post holds every
    token wholly inside the post (a space before the first word may be in it: word tokens carry one); a ``border`` token
    holds characters of the post and of the template. An output token belongs to the segment its first byte is in.
    """

    name: str
    tok: Span
    char: Span


@dataclass(frozen=True, eq=False)
class Example(_Record):
    """One generated row: the exact ids, and what each of them is.

    Attributes:
        ids: prompt and output ids as the generator saw and wrote them, stop token included.
        prompt_len: the first ``prompt_len`` ids are the prompt.
        byte_spans: for each token its bytes in the full decoded byte string (an id without text has an empty span).
        char_bytes: byte offset of every character of ``text``, and the end: ``len(text) + 1`` numbers.
        segments: in order, covering all tokens.
        post_char: the post's characters in ``text``.
        text: the decoded byte string, special tokens spelled out; each run of bytes that is not UTF-8 is one U+FFFD.
        label: the parsed label key (several joined by ``,``), empty if the output held none.
        label_text: the label sentence as generated, empty if none.
        candidates: label key -> label sentence: what the label is contrasted with.
        explanation: the parsed explanation, or None.
        cues, decoys: known spans in the post (character offsets in ``post``), or None if the row has none.
        rationales: spans of the post that people marked as the reason, or None.
        user: author of the post, if known: posts of one author are not independent.
        pair: rows of one pair differ in one phrase of the post (``probes.checks.swaps``), or None.
        hint: characters of ``text`` in the prompt that suggest a label, or None (``probes.checks.chain``).
        cut: clause | word: what the post is erased by, one for a data set (``citations.clauses.choose_cut``); None: as
            this post alone would be.
    """

    _nested: ClassVar[dict[str, type[_Record]]] = {"segments": Segment}

    id: str
    task: str
    post: str
    ids: tuple[int, ...]
    prompt_len: int
    byte_spans: tuple[Span, ...]
    char_bytes: tuple[int, ...]
    segments: tuple[Segment, ...]
    post_char: Span
    text: str
    label: str
    label_text: str
    candidates: dict[str, str]
    explanation: str | None
    cues: tuple[Span, ...] | None
    decoys: tuple[Span, ...] | None
    rationales: tuple[Span, ...] | None = None
    user: str | None = None
    pair: str | None = None
    cut: str | None = None
    hint: Span | None = None

    @property
    def rivals(self) -> tuple[str, ...]:
        """What the label's sentence is compared with, each once: the other candidates, in the words of the answer
        (``probes.wording``) where those are not its candidate's."""
        return self._compared[1]

    @property
    def contrast(self) -> str:
        """What the label's score is.

        * ``log-odds``: against the other candidates.
        * ``reworded``: the same, but the answer states its label in other words than its candidate, and the others are
          compared in those words.
        * ``unlisted``: log-odds, but the generated sentence is none of the candidates (several labels, other words).
        * ``log p``: there is no other candidate. Not a contrast: it rises with everything that makes the answer likely.
        """
        return self._compared[0]

    @functools.cached_property
    def _compared(self) -> tuple[str, tuple[str, ...]]:
        own = comparable(self.label_text)
        others = [text for key, text in self.candidates.items() if key != self.label and comparable(text) != own]
        if not others:
            return "log p", ()
        listed = own in map(comparable, self.candidates.values())
        if self.label_text not in self.candidates.values() and self.label in self.candidates:
            found = reworded(self.label_text, self.candidates[self.label], others)
            if found is not None:
                rivals = tuple(dict.fromkeys(text for text in found if comparable(text) != own))
                return ("log-odds" if listed else "reworded"), rivals
        return ("log-odds" if listed else "unlisted"), tuple(dict.fromkeys(others))

    def segment(self, name: str) -> Segment | None:
        """The first segment of that name, or None."""
        return next((segment for segment in self.segments if segment.name == name), None)

    @property
    def chain(self) -> Segment | None:
        """What stands before the label and may have decided it: the reasoning, else an explanation that comes first."""
        label = self.segment("label")
        found = (self.segment(name) for name in ("reasoning", "explanation"))
        return next((s for s in found if s is not None and label is not None and s.tok[1] <= label.tok[0]), None)

    def asked(self, what: str) -> Example:
        """The same row, where ``what`` is asked: every check that asks about the explanation asks it of that.

        Args:
            what: explanation | reasoning. Where an explanation comes first it is the reasoning.
        Raises:
            ProbeInputError: the row has no reasoning.
        """
        if what not in ASKED:
            raise ProbeInputError(f"ask {what!r}: not one of {', '.join(ASKED)}")
        chain = self.chain
        if what == "explanation" or (chain is not None and chain.name == "explanation"):
            return self
        if chain is None:
            raise ProbeInputError(f"{self.id}: the row has no reasoning before its label")
        renamed = {"explanation": "other", "reasoning": "explanation"}
        segments = tuple(dataclasses.replace(s, name=renamed.get(s.name, s.name)) for s in self.segments)
        return dataclasses.replace(self, segments=segments, explanation=self.text[slice(*chain.char)])

    @property
    def post_tok(self) -> Span:
        """Token range of the post: every token wholly inside it. Attribution varies exactly these."""
        segment = self.segment("post")
        assert segment is not None
        return segment.tok

    @property
    def border(self) -> tuple[int, ...]:
        """Tokens that hold characters of the post and of the template (``."``), at most one at each end.

        To take such a token away is to take away the template's quotation mark, and what that does is no saliency of
        the post. They stay as they are in every eraser, baseline and path; the characters of the post in them have the
        value 0 in every map, which means "not varied" (``varied``) and not "without effect".
        """
        return tuple(at for s in self.segments if s.name == "border" for at in range(*s.tok))

    @functools.cached_property
    def varied(self) -> np.ndarray:
        """bool ``[len(post)]``: characters that attribution can vary; False for those in ``border`` tokens only."""
        found = np.zeros(len(self.post), dtype=bool)
        found[self.post_shares[1]] = True
        return found

    @functools.cached_property
    def post_shares(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every (post token, byte of it inside the post): token index in ``post_tok``, character, share."""
        start, end = self.post_char
        first, last = self.post_tok
        begin, stop = self.char_bytes[start], self.char_bytes[end]
        char_of_byte = np.repeat(np.arange(end - start), np.diff(self.char_bytes[start : end + 1]))
        tokens, chars, shares = [], [], []
        for index, (a, b) in enumerate(self.byte_spans[first:last]):
            # a token without bytes between two post tokens (an id without text) hands its value to its neighbour
            inside = (
                char_of_byte[max(a, begin) - begin : min(b, stop) - begin] if b > a else char_of_byte[a - begin :][:1]
            )
            tokens.append(np.full(len(inside), index))
            chars.append(inside)
            shares.append(np.full(len(inside), 1.0 / len(inside)))
        return np.concatenate(tokens), np.concatenate(chars), np.concatenate(shares)

    def touched(self, spans: Sequence[Span]) -> np.ndarray:
        """bool ``[post tokens]``: which of ``post_tok`` hold a character of ``spans`` (characters of the post)."""
        marked = np.zeros(len(self.post), dtype=bool)
        for a, b in spans:
            marked[a:b] = True
        tokens, chars, _ = self.post_shares
        found = np.zeros(self.post_tok[1] - self.post_tok[0], dtype=bool)
        found[tokens[marked[chars]]] = True
        return found

    def post_chars(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Spreads token values over the characters of the post; the sum is conserved.

        A token's value goes in equal parts to its bytes inside the post, and a character's value is the sum over its
        bytes. Characters that no token of ``post_tok`` holds (``varied``) get 0.

        Args:
            values: one number per token of ``post_tok``, in any unit.
        Returns:
            float64 ``[len(post)]``.
        """
        values = np.asarray(values, dtype=np.float64)
        first, last = self.post_tok
        if values.shape != (last - first,):
            raise ProbeError(f"{self.id}: got values of shape {values.shape} for {last - first} post tokens")
        tokens, chars, shares = self.post_shares
        return np.bincount(chars, weights=values[tokens] * shares, minlength=len(self.post))

    def tokens_of(self, char: Span, within: Span | None = None) -> Span:
        """Token range overlapping the characters ``char`` of ``text``, cut to the token range ``within``.

        Raises:
            ProbeError: no token overlaps.
        """
        begin, stop = self.char_bytes[char[0]], self.char_bytes[char[1]]
        low, high = within or (0, len(self.ids))
        hits = [i for i in range(low, high) if self.byte_spans[i][0] < stop and self.byte_spans[i][1] > begin]
        if not hits:
            raise ProbeError(f"{self.id}: no token covers characters {char[0]}:{char[1]}")
        return hits[0], hits[-1] + 1


@dataclass(frozen=True)
class Citation(_Record):
    """One place of the explanation that cites the post; ``post_char`` is empty if the post does not hold it.

    ``kind``: quote | cue | lcs.
    """

    id: str
    expl_char: Span
    post_char: tuple[Span, ...]
    kind: str
    score: float
    text_hash: str


@dataclass(frozen=True, eq=False)
class Attribution(Shown, _Record):
    """One saliency map over one post.

    Attributes:
        method: a name of ``probes.saliency.settings.METHODS`` (ig, erase, shap ...).
        target: label | explanation | ``explanation[a:b]`` (characters of the explanation). Scores are in nats.
        unit: char | word | clause: what ``values`` and ``unit_spans`` (characters of the post) count.
        char_values: float64 ``[len(post)]``; sums to ``values.sum()``.
        f_input, f_baseline: the target score of the row as it is, and with the whole post replaced by the baseline.
        delta: sum of values minus ``f_input - f_baseline``, for the methods that promise it is 0 (ig), else None.
        rel_delta: ``abs(delta) / max(abs(f_input - f_baseline), 0.1 nats)``, else None.
        converged: whether the method met its own error bound; None for methods without one.
        n_fwd, n_bwd: model evaluations, counted in sequences, and ``seconds``: what this map added. Passes that serve
            several targets are booked once, with the first map that needed them, so that sums are what was run.
        params: what else the numbers depend on (steps, tolerance, eraser ...).
    """

    _arrays: ClassVar[tuple[str, ...]] = ("values", "char_values")

    example_id: str
    method: str
    target: str
    unit: str
    values: np.ndarray
    unit_spans: tuple[Span, ...]
    char_values: np.ndarray
    baseline: str
    f_input: float
    f_baseline: float
    delta: float | None
    rel_delta: float | None
    converged: bool | None
    n_fwd: int
    n_bwd: int
    seconds: float
    dtype: str
    seed: int
    model_fp: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Check(_Record):
    """One cross-check of one post or of a data set. ``status``: ok | abstain | failed_gate.

    ``draws``: values under the null, kept where the data-set test needs them (checks that ran the model).
    """

    name: str
    method: str
    value: float | None
    null_mean: float | None
    null_q05: float | None
    null_q95: float | None
    p: float | None
    ci: tuple[float, float] | None
    n: int
    status: str
    inputs: tuple[str, ...]
    draws: tuple[float, ...] = ()


@dataclass(frozen=True)
class Report(Shown, _Record):
    """All checks of one post. ``verdict``: supported | contradicted | inconclusive."""

    _nested: ClassVar[dict[str, type[_Record]]] = {"checks": Check}

    example_id: str
    checks: tuple[Check, ...]
    verdict: str
    notes: tuple[str, ...]
