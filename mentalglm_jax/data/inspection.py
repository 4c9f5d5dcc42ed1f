"""What a data set holds, and what in it would spoil a result: duplicates, posts on both sides of a split, labels that
contradict each other, contact details. Reports ids and numbers, never a post."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Any

from mentalglm_jax.data.contacts import MENTION, find_contacts
from mentalglm_jax.data.near import NearIndex, Signature, signature
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.splits import bare_post

SHOWN = 20  # ids listed per finding; the counts are complete
HIGH_FROM = 6  # SOS-1K's levels from which SOS-HL-1K's "high" begins


class Inspection:
    """Fed record by record (``add``), asked once (``report``). Memory grows by some hundred bytes a record, by about
    one kilobyte with ``near``; posts are not kept.

    Args:
        near: also look for near duplicates (MinHash; the [data] extra).
        threshold: similarity from which two posts are near.
    """

    def __init__(self, near: bool = True, threshold: float = 0.8):
        self._threshold = threshold
        self._signatures: list[Signature] | None = None  # of the posts, by number
        if near:
            NearIndex(threshold)  # refuses a threshold that is none now, not after all records
            self._signatures = []
        self._posts: dict[tuple[str, bytes], int] = {}  # (language, digest) -> post number
        self._places: list[list[tuple[int, str]]] = []  # post number -> (group, id)
        self._gold: dict[tuple[int, str, str], dict[tuple[str, ...], str]] = {}
        self._groups: dict[tuple[str, str, str], int] = {}  # (task, source, split) -> group
        self._counts: list[dict[str, Any]] = []
        self._contacts: list[tuple[str, list[str]]] = []

    def add(self, record: Record) -> None:
        """Takes one record in."""
        key = (record.task, record.source, record.split)
        group = self._groups.setdefault(key, len(self._groups))
        if group == len(self._counts):
            self._counts.append({"records": 0, "labels": Counter(), "characters": Counter(), "words": Counter(),
                                 "explanation": Counter(), "duplicates": 0, "contacts": Counter(), "rows": 0,
                                 "mentions": 0, "asked": set(), "rationales": Counter()})  # fmt: skip
        counts = self._counts[group]
        counts["records"] += 1
        counts["labels"].update(record.gold)
        counts["characters"][len(record.post)] += 1
        counts["words"][len(record.post.split())] += record.language == "en"
        if record.rationales is not None:  # an empty list: somebody marked what is not in the post
            found = len(record.rationales)
            counts["rationales"].update({"records": 1, "spans": found, "not_found": int(not found)})
        if record.explanation is not None:
            counts["explanation"][len(record.explanation)] += 1
        self._look_for_contacts(record, counts)
        number = self._post_number(record)
        asked = (number, record.question)
        if asked in counts["asked"]:
            counts["duplicates"] += 1
        counts["asked"].add(asked)
        self._places[number].append((group, record.id))
        golds = self._gold.setdefault((number, record.task, record.question), {})
        golds.setdefault(tuple(sorted(record.gold)), record.id)

    def _look_for_contacts(self, record: Record, counts: dict[str, Any]) -> None:
        kinds = sorted({kind for text in (record.post, record.explanation or "") for kind, _ in find_contacts(text)})
        counts["contacts"].update(kinds)
        counts["rows"] += bool(kinds)
        counts["mentions"] += bool(MENTION.search(record.post))
        if kinds:
            self._contacts.append((record.id, kinds))

    def _post_number(self, record: Record) -> int:
        text = bare_post(record.post)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        number = self._posts.setdefault((record.language, digest), len(self._posts))
        if number == len(self._places):
            self._places.append([])
            if self._signatures is not None:
                self._signatures.append(signature(text, record.language))
        return number

    def report(self) -> dict[str, Any]:
        """JSON-ready: ``tasks`` (per task, source and split), ``overlap``, ``crossings``, ``conflicts``, ``contacts``.

        ``overlap`` are posts of one source on both sides, ``crossings`` those of two: in one's training part and the
        other's development or test part. Each with ``exact`` (letters and digits alike) and ``near``.
        """
        overlap, crossings = self._sides()
        return {
            "tasks": self._tasks(),
            "overlap": overlap,
            "crossings": crossings,
            "conflicts": self._conflicts(),
            "contacts": {"rows": len(self._contacts), "ids": [one for one, _ in self._contacts[:SHOWN]]},
        }

    def _tasks(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (task, source, split), group in self._groups.items():
            counts = self._counts[group]
            entry = {
                "records": counts["records"],
                "labels": dict(counts["labels"].most_common()),
                "characters": _lengths(counts["characters"]),
                "duplicates": counts["duplicates"],
                "contact_rows": counts["rows"],
                "contacts": dict(counts["contacts"].most_common()),
                "messenger_mentions": counts["mentions"],
            }
            if counts["rationales"]:
                entry["rationales"] = {name: counts["rationales"][name] for name in ("records", "spans", "not_found")}
            if words := +counts["words"]:
                entry["words"] = _lengths(words)
            if counts["explanation"]:
                entry["explanations"] = sum(counts["explanation"].values())
                entry["explanation_characters"] = _lengths(counts["explanation"])
            found.setdefault(task, {}).setdefault(source or "-", {})[split] = entry
        return found

    def _sides(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        names = list(self._groups)
        found: dict[tuple[int, int], dict[str, _Pairs]] = {}

        def note(kind: str, left: list[tuple[int, str]], right: list[tuple[int, str]]) -> None:
            trained, held = _by_group(left), _by_group(right)
            for one in trained:
                for other in held:
                    if names[one][2] == "train" and names[other][2] != "train":
                        pairs = found.setdefault((one, other), {"exact": _Pairs(), "near": _Pairs()})[kind]
                        pairs.add(trained[one], held[other])

        for places in self._places:
            if len(places) > 1:
                note("exact", places, places)
        for trained, held in self._near_sides():
            note("near", self._places[trained], self._places[held])
        overlap, crossings = [], []
        for (trained, held), kinds in sorted(found.items()):
            entry: dict[str, Any] = {"train": list(names[trained]), "held_out": list(names[held])}
            for kind, pairs in kinds.items():
                if kind == "exact" or self._signatures is not None:
                    # Of one post in several rows (one per question) each pair of posts counts once.
                    entry[kind] = len(pairs.held)
                    entry[f"{kind}_ids"] = pairs.shown
            (overlap if names[trained][1] == names[held][1] else crossings).append(entry)
        return overlap, crossings

    def _near_sides(self) -> Iterator[tuple[int, int]]:
        """(post of a training part, post of a held-out one that is near it), for each held-out post the first of every
        training part."""
        if self._signatures is None:
            return
        parts = [{group for group, _ in places} for places in self._places]
        names, firsts = list(self._groups), dict[int, set[int]]()
        held = [post for post, groups in enumerate(parts) if any(names[group][2] != "train" for group in groups)]
        for part, (*_, split) in enumerate(names):
            if split != "train":
                continue
            posts = [post for post, groups in enumerate(parts) if part in groups]
            index = NearIndex(self._threshold)
            for post in posts:
                index.add(self._signatures[post])
            for post in held:
                near = (posts[one] for one in index.near(self._signatures[post]))
                if (first := next((one for one in near if one != post), None)) is not None:
                    firsts.setdefault(post, set()).add(first)
        for post in sorted(firsts):
            yield from ((first, post) for first in sorted(firsts[post]))

    def _conflicts(self) -> dict[str, Any]:
        same = [list(golds.values())[:2] for golds in self._gold.values() if len(golds) > 1]
        levels: dict[int, tuple[str, str]] = {}
        risks: dict[int, tuple[str, str]] = {}
        for (number, task, _), golds in self._gold.items():
            gold, one = next(iter(golds.items()))
            if task == "suicide_level":
                levels[number] = ("high" if int(gold[0]) >= HIGH_FROM else "low", one)
            elif task == "suicide_risk":
                risks[number] = (gold[0], one)
        shared = levels.keys() & risks.keys()
        crossed = [[risks[n][1], levels[n][1]] for n in sorted(shared) if risks[n][0] != levels[n][0]]
        return {"same_task": len(same), "same_task_ids": same[:SHOWN], "level_posts_shared_with_risk": len(shared),
                "level_against_risk": len(crossed), "level_against_risk_ids": crossed[:SHOWN]}  # fmt: skip


class _Pairs:
    """Pairs of a training and a held-out row: the held-out ids, and the first pairs in full."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.shown: list[list[str]] = []

    def add(self, trained: Sequence[str], held: Sequence[str]) -> None:
        """Each of ``trained`` with each of ``held``."""
        self.held.update(held)
        self.shown += [list(pair) for pair in islice(product(trained, held), SHOWN - len(self.shown))]


def _by_group(places: Iterable[tuple[int, str]]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for group, one in places:
        found.setdefault(group, []).append(one)
    return found


def _lengths(lengths: Counter[int]) -> dict[str, float]:
    """Mean and quantiles of a length distribution, exact."""
    total = sum(lengths.values())
    found: dict[str, float] = {"mean": round(sum(n * count for n, count in lengths.items()) / total, 2)}
    for name, share in (("median", 0.5), ("p95", 0.95), ("max", 1.0)):
        seen = 0
        for length in sorted(lengths):
            seen += lengths[length]
            if seen >= share * total:
                found[name] = length
                break
    return found


def inspect_records(records: Iterable[Record], *, near: bool = True, threshold: float = 0.8) -> dict[str, Any]:
    """``Inspection`` of all the records; see ``Inspection.report``."""
    inspection = Inspection(near, threshold)
    for record in records:
        inspection.add(record)
    return inspection.report()
