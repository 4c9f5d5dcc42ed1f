"""Which of several explanations of one label cites what the label was made from: pairs for preference training.

A post's answers that state the same label differ in what they cite. The label's saliency is measured once, each
answer's citations are laid over it, and a pair (chosen, rejected) is written where every family of methods prefers the
same one by a margin. What this optimises is agreement with saliency; ``docs/repair.md`` says what that can hide.

The score of an answer by one family is the share of the positive label saliency in the clauses it cites, less their
share of the length (0 for a citation at random, whatever it takes), less ``INVENTED`` times the share of its quotes
that are not in the post, and less ``EVERYTHING`` if it cites every clause. Only an answer that every family scores
above 0 is chosen, one that is merely less bad teaches to quote anything; and only one that came to its end and whose
quotes are in the post letter for letter, as the chosen words are what is learned. Of equally good ones the likeliest
(drawn most often) is chosen, whose words are least beside the point. Of the rejected answers the likeliest comes first,
as it is what the model says now; then those that quote the post too before those that invent: a model that is taught to
invent nothing has not learned what to cite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes.checks.crosscheck import label_maps, post_units, units_hit
from probes.checks.verdict import FAMILIES, Voice, voices
from probes.citations.align import align, fabricated_quotes, merge_spans
from probes.errors import ProbeError, ProbeInputError
from probes.files import write_jsonl
from probes.foreign import begins, plain
from probes.post import require_finite
from probes.probe import Probe
from probes.records import Attribution, Example, Span
from probes.results.cache import Cache
from probes.results.store import SCHEMA_VERSION
from probes.saliency.settings import NEED_FILLERS, Settings
from probes.suite import fillers_of, lay_out
from probes.workers import awaited, launched, shares

METHODS = ("ig", "erase", "erase_resample")  # what may vote of the budget "standard"
BY = {"both": ("gradient", "erasure"), "gradient": ("gradient",), "erasure": ("erasure",)}
INVENTED, EVERYTHING = 0.5, 0.5
NULL_DRAWS, LEVEL = 20, 0.05
MOST_ANSWERS = 256  # of one post with one label: each is compared with each, and again for every draw of the null
_PAIR = re.compile(rb'\A\{"id": [^\n]*"chosen_ids": \[')  # as ``_rows`` are written

# Why a post has no pair, in the order in which it is looked at.
ALONE = "one answer with this label"
SHUT = "no map of a family may speak"
UNGROUNDED = "no whole answer cites the post letter for letter"
CHANCE = "no answer cites more of the saliency than chance"
CLOSE = "no two answers differ by the margin"
DISAGREE = "the families do not agree"
UNEVEN = "lengths too different"

Progress = Callable[[float, int], None]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What makes a pair.

    Attributes:
        by: both | gradient | erasure: the families that must prefer the chosen answer.
        margin: by how much each of them, at least; a share of the label's saliency.
        length_ratio: tokens of the longer answer over those of the shorter, at most.
        per_post: pairs of one post and label, at most; each has another rejected answer.
    """

    by: str = "both"
    margin: float = 0.2
    length_ratio: float = 1.5
    per_post: int = 4

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ProbeInputError(f"by {self.by!r}: choose from {', '.join(BY)}")
        if not 0 < self.margin <= 2:
            raise ProbeInputError(f"margin {self.margin:g}: above 0 and at most 2")
        if not 1 <= self.length_ratio < 1000:
            raise ProbeInputError(f"length ratio {self.length_ratio:g}: from 1 on")
        if self.per_post < 1:
            raise ProbeInputError(f"per post {self.per_post}: at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """One answer of a post.

    Attributes:
        row: its row of the file.
        ids: its tokens.
        cited: bool [clauses]. invented: share of its quotes that are not in the post.
        quotes: how many it has. inexact: whether one of them is in the post with other letters.
        whole: whether it came to its end. drawn: how often it came among the samples.
    """

    row: Mapping[str, Any]
    ids: tuple[int, ...]
    cited: np.ndarray
    invented: float
    quotes: int
    inexact: bool = False
    whole: bool = True
    drawn: int = 1

    @property
    def choosable(self) -> bool:
        """Whether it may be preferred: whole, it cites something of the post, letter for letter, and nothing else."""
        exact = self.invented == 0 and not self.inexact
        return self.whole and exact and bool(self.cited.any()) and not self.cited.all()

    def score(self, voice: Voice, lengths: np.ndarray) -> float:
        """See the top of this file."""
        excess = float(voice.mass[self.cited].sum() / voice.mass.sum() - lengths[self.cited].sum() / lengths.sum())
        return excess - INVENTED * self.invented - EVERYTHING * bool(self.cited.all())


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The answers to one post with one label, and what each family says of each.

    Attributes:
        voices: by answer, as an answer that states its reasons first has maps of its own; empty where a family that is
            asked has none that may speak.
        lengths: float64 [clauses], characters.
    """

    post: str
    answers: tuple[Answer, ...]
    voices: tuple[tuple[Voice, ...], ...]
    lengths: np.ndarray

    def scores(self, answers: Sequence[Answer]) -> np.ndarray:
        """float64 [answers, families]."""
        both = zip(answers, self.voices, strict=True)
        return np.array([[answer.score(voice, self.lengths) for voice in own] for answer, own in both])


@dataclasses.dataclass(frozen=True)
class Found:
    """One pair: places of the chosen and the rejected answer, by how much each family prefers the first."""

    chosen: int
    rejected: int
    margins: tuple[float, ...]

    @property
    def margin(self) -> float:
        """The least of them."""
        return min(self.margins)


def comparable(answers: Sequence[Answer], rules: Rules) -> tuple[list[tuple[int, int]], str]:
    """Places of two answers of which the first could be chosen over the second, whatever a map says; and where there
    are none, why. Where in the post a citation is plays no part, so that it is the same under the null."""
    if len(answers) < 2:
        return [], ALONE
    able = [
        (i, j)
        for i, one in enumerate(answers)
        for j, other in enumerate(answers)
        # An answer that cites nothing at all is no worse explanation, it is none.
        if i != j and one.choosable and (other.quotes or other.cited.any())
    ]
    if not able:
        return [], CLOSE if any(answer.choosable for answer in answers) else UNGROUNDED
    sizes = [len(answer.ids) for answer in answers]
    even = [(i, j) for i, j in able if max(sizes[i], sizes[j]) <= rules.length_ratio * min(sizes[i], sizes[j])]
    return even, "" if even else UNEVEN


def pairs_of(group: Group, answers: Sequence[Answer], rules: Rules) -> tuple[list[Found], str]:
    """The pairs of a group whose answers cite what ``answers`` say (its own, or others for a null), in the order of the
    top of this file, then the widest margin first; and where there is none, why."""
    able, reason = comparable(answers, rules)
    if not able:
        return [], reason
    if not all(group.voices):
        return [], SHUT
    scores, reason = group.scores(answers), CLOSE
    able = [(i, j) for i, j in able if scores[i].min() > 0]
    if not able:
        return [], CHANCE
    found: list[Found] = []
    for i, j in able:
        margins = scores[i] - scores[j]
        if margins.min() >= rules.margin:
            found.append(Found(i, j, tuple(map(float, margins))))
        elif margins.max() >= rules.margin:
            reason = DISAGREE

    def order(pair: Found) -> tuple[int, bool, float, int, int, int]:
        one, other = answers[pair.chosen], answers[pair.rejected]
        return -other.drawn, other.invented > 0, -pair.margin, -one.drawn, pair.chosen, pair.rejected

    found.sort(key=order)
    kept: list[Found] = []
    for pair in found:
        if len(kept) < rules.per_post and all(pair.rejected != other.rejected for other in kept):
            kept.append(pair)
    return kept, reason if not kept else ""


def rank(
    probe: Probe,
    rows: Sequence[Mapping[str, Any]],
    out: str | Path,
    rules: Rules = Rules(),
    maps: str | Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    working: Callable[[int], bool] = lambda rank: True,
) -> dict[str, Any]:
    """Ranks the answers of every post, and writes the pairs.

    Args:
        rows: rows of generations.jsonl, several to a post (``mentalglm generate --samples``).
        out: the file to write: ``id, task, prompt_ids, chosen_ids, rejected_ids, scores`` (family: chosen, rejected),
            ``margin`` and ``cited`` (chosen and rejected: 0 or 1 for each clause).
        rules: what makes a pair.
        maps: a directory in which maps are kept, and found by a later call; None is ``out`` with ``.maps``, which goes
            when all is done.
        progress: called with (posts done, posts in all).
        seed: of fillers and of the null.
        working: of several processes (``probes.workers``), whether one of them is still at work.

    Returns:
        what was found, JSON-able: ``posts``, ``answers``, ``pairs``, ``posts_with_pairs``, ``margin`` (mean),
        ``no_pair`` (posts by reason), ``null`` (mean ``pairs`` and ``margin`` with a post's citations moved by a random
        number of clauses, ``p`` of as many pairs), ``skipped_by_reason`` (rows). Empty in all processes but the first.

    Raises:
        ProbeInputError: as ``lay_out``; or ``out`` holds anything but pairs, or a link stands in place of the maps.
        ProbeError: no pair at all, and then nothing is written; a file cannot be written.
    """
    out = Path(out)
    refuse_replacing(out)
    own = maps is None
    place = out.with_name(f"{out.name}.maps") if maps is None else Path(maps)
    if links := [one for one in (place, place / "cache") if one.is_symlink() and (own or one != place)]:
        raise ProbeInputError(f"{links[0]}: is a link; maps are kept, and deleted, in a directory itself; remove it")
    cache, process = Cache(place), launched()
    groups, skipped = grouped(probe, rows, rules, cache, progress, seed, process, working)
    if process[0] != 0:
        return {}
    found = [(group, *pairs_of(group, group.answers, rules)) for group in groups]
    summary = _summary(found, rules, seed) | {"answers": len(rows), "skipped_by_reason": skipped}
    if not summary["pairs"]:
        why = ", ".join(f"{count} {reason}" for reason, count in summary["no_pair"].items())
        raise ProbeError(f"no pair: of {summary['posts']} posts {why}; sample more answers, or hotter ones")
    write_jsonl(out, _rows(found, rules), private=True)
    if own:
        _forget(cache)
    return summary


def refuse_replacing(out: Path) -> None:
    """Raises ``ProbeInputError`` where pairs would be written over something else, say the answers they are made of."""
    if out.exists() and not _PAIR.search(begins(out, 1 << 20)):
        raise ProbeInputError(f"{out}: would be replaced, but holds no pairs of `probes rank`; give another --out")


def told(found: Mapping[str, Any]) -> str:
    """The summary of ``rank`` in one line."""
    null, without = found["null"], ", ".join(f"{count} of {reason}" for reason, count in found["no_pair"].items())
    beside = "" if null["margin"] is None else f", margin {null['margin']:.2f}"
    warned = "" if null["p"] <= LEVEL else "; NO MORE THAN BY CHANCE: such pairs say nothing of what the labels rest on"
    return (
        f"{found['pairs']} pairs of {found['posts_with_pairs']} posts, mean margin {found['margin']:.2f} (with "
        f"citations at random {null['pairs']:.1f} pairs{beside}); posts without a pair: {without or 'none'}{warned}"
    )


def grouped(
    probe: Probe,
    rows: Sequence[Mapping[str, Any]],
    rules: Rules,
    cache: Cache,
    progress: Progress | None,
    seed: int,
    place: tuple[int, int] = (0, 1),
    working: Callable[[int], bool] = lambda rank: True,
) -> tuple[list[Group], dict[str, int]]:
    """The answers by post and label, with their maps; and how many rows could not be read, by reason.

    Raises:
        ProbeInputError: as ``lay_out``; or too many answers to a post.
    """
    examples, left_out = lay_out(probe, rows)
    by_id = {str(row["id"]): row for row in rows}
    posts: dict[tuple[Any, ...], list[Example]] = {}
    for example in examples:
        posts.setdefault((example.ids[: example.prompt_len], example.post), []).append(example)
    for own in posts.values():
        if (most := max(Counter((e.label, e.label_text) for e in own).values())) > MOST_ANSWERS:
            raise ProbeInputError(f"{most} answers to the post of {plain(repr(own[0].id), 80)} have one label; at most "
                                  f"{MOST_ANSWERS} are compared, leave some out")  # fmt: skip
    fillers = fillers_of([own[0] for own in posts.values()], seed)
    probe.scorer.settle(examples)  # from here on the model is called in one way
    by_post, (rank, world) = list(posts.values()), place
    groups: dict[int, list[Group]] = {}
    for done, at in enumerate(shares(len(by_post), rank, world)):
        if progress:
            progress(done, len(posts))
        own, maker = by_post[at], at % world
        wait = None if maker == rank else functools.partial(working, maker)
        for label in dict.fromkeys((e.label, e.label_text) for e in own):
            said = [e for e in own if (e.label, e.label_text) == label]
            groups.setdefault(at, []).append(_group(probe, said, by_id, rules, cache, fillers[at], seed, wait))
    if progress:
        progress(len(posts), len(posts))
    return [group for at in sorted(groups) for group in groups[at]], dict(Counter(one["reason"] for one in left_out))


def _group(
    probe: Probe,
    examples: Sequence[Example],
    rows: Mapping[str, Mapping[str, Any]],
    rules: Rules,
    cache: Cache,
    fillers: tuple[str, ...],
    seed: int,
    wait: Callable[[], bool] | None,
) -> Group:
    """The maps are made only where they can matter: a real model takes minutes for them."""
    methods = [m for m in METHODS if FAMILIES[m] in BY[rules.by] and (fillers or m not in NEED_FILLERS)]
    said = [_Said.of(example) for example in examples]
    units = post_units((), examples[0].post, examples[0].cut)
    known: dict[tuple[int, ...], list[Attribution]] = {}  # what precedes the label, and the label: the same maps
    if comparable([one.answer(rows, units) for one in said], rules)[0]:
        for one in said:
            if one.until not in known:
                known[one.until] = _maps(probe, one.example, one.until, methods, cache, fillers, seed, wait)
        units = post_units([a for maps in known.values() for a in maps], examples[0].post, examples[0].cut)
    lengths = np.array([b - a for a, b in units], dtype=np.float64)
    answers = [one.answer(rows, units) for one in said]
    by_maps = {until: _heard(maps, units, rules) for until, maps in known.items()}
    heard = [by_maps.get(one.until, ()) for one in said]
    if any(heard):  # of answers that state their reasons first some may have maps that speak, and some none
        answers, heard = (
            list(x) for x in zip(*((a, v) for a, v in zip(answers, heard, strict=True) if v), strict=True)
        )
    return Group(examples[0].post, tuple(answers), tuple(heard), lengths)


@dataclasses.dataclass(frozen=True, eq=False)
class _Said:
    """An answer laid out, with what it cites; ``until`` are its ids up to the end of the label."""

    example: Example
    until: tuple[int, ...]
    spans: tuple[Span, ...]
    invented: float
    quotes: int
    inexact: bool

    @classmethod
    def of(cls, example: Example) -> _Said:
        citations, segment = align(example), example.segment("label")
        invented, quotes = fabricated_quotes(citations)
        until = example.ids[: segment.tok[1]] if segment is not None else example.ids
        spans = tuple(merge_spans(span for c in citations for span in c.post_char))
        inexact = any(c.kind == "quote" and c.post_char and c.score < 1 for c in citations)
        return cls(example, until, spans, invented / max(quotes, 1), quotes, inexact)

    def answer(self, rows: Mapping[str, Mapping[str, Any]], units: Sequence[Span]) -> Answer:
        """On these clauses."""
        row, ids = rows[self.example.id], tuple(self.example.ids[self.example.prompt_len :])
        return Answer(row, ids, units_hit(self.spans, units), self.invented, self.quotes, self.inexact,
                      whole=row.get("finish") != "length", drawn=row.get("drawn") or 1)  # fmt: skip


def _heard(maps: Sequence[Attribution], units: Sequence[Span], rules: Rules) -> tuple[Voice, ...]:
    """What each family that is asked says; nothing where one of them may not speak."""
    found, _ = label_maps(maps, units)
    speaking = tuple(voice for voice in voices(found.values()) if voice.mass.sum() > 0)
    return speaking if len(speaking) == len(BY[rules.by]) else ()


def _maps(
    probe: Probe,
    example: Example,
    until: tuple[int, ...],
    methods: Sequence[str],
    cache: Cache,
    fillers: tuple[str, ...],
    seed: int,
    wait: Callable[[], bool] | None,
) -> list[Attribution]:
    """The label's maps, each kept as soon as it is made. They do not depend on what follows the label.

    Args:
        wait: whether another process that makes them is still at work; None where this one does.
    """
    from probes.saliency.attribute import attribute

    settings, maps = Settings(seed=seed), []
    for method in methods:
        depends = [SCHEMA_VERSION, probe.fingerprint, method, dataclasses.asdict(settings), list(until), example.post]
        depends += [example.label_text, example.candidates, example.cut, list(example.post_char)]
        depends += [*([list(fillers)] if method in NEED_FILLERS else []), *probe.scorer.can.way]
        name = cache.name(depends)
        find = functools.partial(_kept, cache, name, example)
        kept = find() if wait is None else awaited(find, wait, cache.directory / name)
        if kept is None:
            kept = attribute(probe, example, (method,), ("label",), settings, fillers)
            require_finite(kept)
            cache.write(name, {"maps": [a.to_dict() for a in kept]})
        maps += kept
    return maps


def _kept(cache: Cache, name: str, example: Example) -> list[Attribution] | None:
    value = cache.read(name)
    try:
        found = None if value is None else [Attribution.from_dict(item) for item in value["maps"]]
    except (KeyError, TypeError, ValueError, ProbeInputError):
        return None
    if found is None or any(len(a.char_values) != len(example.post) for a in found):
        return None
    return found


def _moved(group: Group, rng: np.random.Generator) -> list[Answer]:
    """The answers with their citations turned by one random number of clauses: as long as they were, and as far from
    each other, so that answers that cite the same clause still do and make no pair by chance."""
    turn = int(rng.integers(len(group.lengths)))
    return [dataclasses.replace(answer, cited=np.roll(answer.cited, turn)) for answer in group.answers]


def _summary(found: Sequence[tuple[Group, list[Found], str]], rules: Rules, seed: int) -> dict[str, Any]:
    posts: dict[str, list[tuple[int, int, str]]] = {}  # (pairs, answers, reason) of the labels of each
    for group, pairs, reason in found:
        key = repr((group.answers[0].row["prompt_ids"], group.post))
        posts.setdefault(key, []).append((len(pairs), len(group.answers), reason))
    without = [max(labels, key=lambda one: one[1])[2] for labels in posts.values() if not sum(n for n, _, _ in labels)]
    margins = [pair.margin for _, pairs, _ in found for pair in pairs]
    draws = [_null_draw(found, rules, np.random.default_rng([seed, draw])) for draw in range(NULL_DRAWS)]
    null = [margin for draw in draws for margin in draw]
    return {
        "by": rules.by,
        "posts": len(posts),
        "posts_with_pairs": len(posts) - len(without),
        "pairs": len(margins),
        "margin": float(np.mean(margins)) if margins else None,
        "no_pair": dict(Counter(without).most_common()),
        "null": {
            "draws": NULL_DRAWS,
            "pairs": len(null) / NULL_DRAWS,
            "margin": float(np.mean(null)) if null else None,
            "p": (1 + sum(len(draw) >= len(margins) for draw in draws)) / (NULL_DRAWS + 1),
        },
    }


def _null_draw(found: Iterable[tuple[Group, list[Found], str]], rules: Rules, rng: np.random.Generator) -> list[float]:
    return [pair.margin for group, _, _ in found for pair in pairs_of(group, _moved(group, rng), rules)[0]]


def _rows(found: Sequence[tuple[Group, list[Found], str]], rules: Rules) -> list[dict[str, Any]]:
    rows = []
    for group, pairs, _ in found:
        scores = group.scores(group.answers) if pairs else np.empty((0, 0))
        for pair in pairs:
            one, other = group.answers[pair.chosen], group.answers[pair.rejected]
            by = {
                family: [float(scores[pair.chosen, at]), float(scores[pair.rejected, at])]
                for at, family in enumerate(BY[rules.by])
            }
            rows.append(
                {
                    "id": f"{one.row['id']} > {other.row['id']}",
                    "task": one.row.get("task") or "",
                    "prompt_ids": list(one.row["prompt_ids"]),
                    "chosen_ids": list(one.ids),
                    "rejected_ids": list(other.ids),
                    "scores": by,
                    "margin": pair.margin,
                    "cited": {
                        "chosen": one.cited.astype(int).tolist(),
                        "rejected": other.cited.astype(int).tolist(),
                    },
                }
            )
    return rows


def _forget(cache: Cache) -> None:
    """Removes the maps of a call that is done; what else is there stays."""
    cache.forget()
    for directory in (cache.directory, cache.directory.parent):
        with contextlib.suppress(OSError):
            directory.rmdir()
