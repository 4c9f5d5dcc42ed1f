"""Which posts are the same or nearly so, and the development split that keeps such posts together."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mentalglm_jax.data.near import NearIndex, signature
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError

NEAR = 0.8
# Letters and digits from which two posts can be near: in a shorter one the similarity hangs on one or two characters,
# and "Day 11: tired" would be near "Day 12: tired". Shorter posts are compared whole.
NEAR_FROM = 24


def normalize_post(text: str) -> str:
    """One spelling for posts that differ only in width, case or white space (NFKC, casefold, single spaces)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bare_post(text: str) -> str:
    """Letters and digits of the normalised post: what two copies share that differ in punctuation or emoji. A post
    without any is kept as it is."""
    text = normalize_post(text)
    return "".join(character for character in text if character.isalnum()) or text


def one_name(name: str) -> str:
    """One spelling for names of people (authors, raters) that differ in width, case, white space, in how accents are
    put together, or in characters nobody sees: one person is not two."""
    seen = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return normalize_post(seen)


def clusters(records: Sequence[Record]) -> list[int]:
    """For each record the number of its cluster: posts with the same letters and digits, posts that are near
    (``NEAR``, MinHash), and what these join. The order of the records does not change who stands together."""
    languages: dict[str, str] = {}
    texts = [bare_post(record.post) for record in records]
    for text, record in zip(texts, records, strict=True):
        languages[text] = min(languages.get(text, record.language), record.language)
    ordered = sorted(languages)  # not as they come: of very many that are alike, not all are compared
    numbers = {text: number for number, text in enumerate(ordered)}
    index, parents, indexed = NearIndex(NEAR), list(range(len(ordered))), list[int]()
    for number, text in enumerate(ordered):
        if len(text) < NEAR_FROM:
            continue
        signed = signature(text, languages[text])
        for other in index.near(signed):
            parents[_root(parents, number)] = _root(parents, indexed[other])
        index.add(signed)
        indexed.append(number)
    return [_root(parents, numbers[text]) for text in texts]


def dev_split(records: Iterable[Record], fraction: float = 0.2) -> list[Record]:
    """Moves about ``fraction`` of the training records to "dev", by a hash of the normalised post; the order stays.

    Posts of one cluster (``clusters``) go to one side, by the hash of one of them. So the same post falls on the same
    side in every file, run and version that holds the same near copies of it. A training post of whose cluster a post
    stands in a published dev or test part goes to "dev" whatever its hash, so that it is never trained on.

    Raises: InputError if ``fraction`` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise InputError(f"development fraction: {fraction} is not in [0, 1); try 0.2")
    records = list(records)
    numbers = clusters(records)
    published = {number for number, record in zip(numbers, records, strict=True) if record.split != "train"}
    chosen: dict[int, tuple[int, str]] = {}  # cluster -> the post that decides: the first by a hash of its own
    for number, record in zip(numbers, records, strict=True):
        text = normalize_post(record.post)
        chosen[number] = min(chosen.get(number, (1 << 64, "")), (_hash(text, b"decides"), text))
    sides = {number: "dev" if number in published or _hash(text) < fraction * 2**64 else "train"
             for number, (_, text) in chosen.items()}  # fmt: skip
    return [replace(record, split=sides[number]) if record.split == "train" else record
            for number, record in zip(numbers, records, strict=True)]  # fmt: skip


def grouped_split(
    groups: Sequence[int], strata: Sequence[Iterable[str]], shares: Mapping[str, float], keys: Sequence[str], seed: int
) -> list[str]:
    """Sides for rows, each group whole on one side, every stratum as nearly in the wanted shares as groups allow.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011) over groups in place of rows: the group with the
    rarest stratum goes first, to the side that lacks most of it.

    Args:
        groups: the group of each row.
        strata: the strata of each row, one or more (its labels).
        shares: of each side, together 1; a side of 0 gets nothing.
        keys: of each row, by which, with ``seed``, equals are ordered: not by their place in the table.
    """
    sides = [side for side, share in shares.items() if share > 0]
    members, counts, totals = dict[int, list[int]](), dict[int, Counter[str]](), Counter[str]()
    for row, (group, names) in enumerate(zip(groups, strata, strict=True)):
        members.setdefault(group, []).append(row)
        counts.setdefault(group, Counter()).update(names)
        totals.update(names)
    lacking = {side: Counter({name: shares[side] * total for name, total in totals.items()}) for side in sides}
    room = {side: shares[side] * len(groups) for side in sides}
    drawn = {group: min(_hash(f"{seed} {keys[row]}", b"split") for row in rows) for group, rows in members.items()}
    rarest = {group: min(counts[group], key=lambda name: (totals[name], name)) for group in members}
    found = [""] * len(groups)
    for group in sorted(members, key=lambda one: (totals[rarest[one]], rarest[one], -len(members[one]), drawn[one])):
        side = max(sides, key=lambda one: (lacking[one][rarest[group]], room[one], shares[one]))
        lacking[side].subtract(counts[group])
        room[side] -= len(members[group])
        for row in members[group]:
            found[row] = side
    return found


def joined(*partitions: Sequence[object]) -> list[int]:
    """The finest partition of rows that joins what any of ``partitions`` joins: the number of its part for each row. A
    row without a part of its own in one of them (None) is joined with nothing by it."""
    parents = list(range(len(partitions[0])))
    for partition in partitions:
        first: dict[object, int] = {}
        for row, part in enumerate(partition):
            if part is not None:
                parents[_root(parents, row)] = _root(parents, first.setdefault(part, row))
    return [_root(parents, row) for row in range(len(parents))]


def _root(parents: list[int], number: int) -> int:
    """What stands for the part that ``number`` is in; the way to it is shortened."""
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def _hash(text: str, person: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=person).digest(), "big")


def without_held_out(
    records: Sequence[Record], held_out: Sequence[Record] = (), splits: Sequence[str] = ("test",)
) -> tuple[list[Record], Counter[str]]:
    """``records`` without the training records whose cluster has a post of the other ``splits``, there or in
    ``held_out``.

    Returns:
        The records that stay, in order, and how many went: "exact" (the same letters and digits), "near" (the rest).
    """
    everything = [*records, *held_out]
    numbers = clusters(everything)
    kept_apart = {n for n, record in zip(numbers, everything, strict=True) if record.split in splits}
    texts = {bare_post(record.post) for record in everything if record.split in splits}
    stay, gone = [], Counter[str]()
    for number, record in zip(numbers, records, strict=False):
        if record.split == "train" and number in kept_apart:
            gone["exact" if bare_post(record.post) in texts else "near"] += 1
        else:
            stay.append(record)
    return stay, gone
