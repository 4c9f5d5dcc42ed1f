"""Texts that are nearly the same: MinHash over character shingles (Broder 1997; ``datasketch`` makes the signatures),
candidates by locality-sensitive hashing.

Time grows with the number of texts and with their length, whatever they say: of texts that all resemble one another,
ten thousand posts that differ in a number, each is compared with a bounded number of others (``MOST``).
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt32

from mentalglm_jax.errors import InputError

PERMUTATIONS = 64
MOST = 64  # texts of one bucket with which another is compared: the first half and the last half of those in it
_SHINGLE = {"zh": 3, "en": 5}  # characters
_AT_ONCE = 8192  # shingles: those of a long text would be large arrays
Signature = UInt32[np.ndarray, "64"]


def shingles(text: str, language: str) -> set[bytes]:
    """All pieces of 3 (Chinese) or 5 (English) characters, of a shorter text the text itself."""
    size = _SHINGLE.get(language, 5)
    return {text[at : at + size].encode() for at in range(max(1, len(text) - size + 1))}


def signature(text: str, language: str) -> Signature:
    """64 numbers; of two texts as many agree as their shingle sets overlap (Jaccard), with a standard error of 0.05 at
    0.8."""
    made, pieces = _blank().copy(), list(shingles(text, language))
    for start in range(0, len(pieces), _AT_ONCE):
        made.update_batch(pieces[start : start + _AT_ONCE])
    return made.hashvalues


@functools.cache  # the permutations are drawn once
def _blank() -> Any:
    import datasketch  # with it comes SciPy, which commands without data do not need

    return datasketch.MinHash(num_perm=PERMUTATIONS)


@functools.cache
def _bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many numbers. A candidate too many costs a comparison, a missed one is a leak: with the
    library's own weights two texts just above 0.8 would meet in 4 of 10 cases, with these in 19 of 20."""
    import datasketch

    found: Any = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.02, 0.98))
    return found.b, found.r


class NearIndex:
    """Signatures added one by one; asking for those that are near finds those added so far.

    Two that are near share a band of their signatures in 19 of 20 cases or more. Where more than ``MOST`` texts share a
    band, those between the first and the last half of ``MOST`` are not looked at: then a text is found to be near some
    of what it resembles, not all.

    Args:
        threshold: share of a signature's numbers that agree from which two texts count as near.

    Raises: InputError if the threshold is not in (0, 1).
    """

    def __init__(self, threshold: float = 0.8):
        if not 0 < threshold < 1:
            raise InputError(f"near-duplicate threshold: {threshold} is not between 0 and 1; try 0.8")
        self._threshold = threshold
        self._count, self._rows = _bands(threshold)
        self._signatures = np.empty((16, PERMUTATIONS), np.uint32)
        self._added = 0
        self._buckets: dict[bytes, int | list[int]] = {}  # a text, or how many there are and then at most MOST of them

    def add(self, signed: Signature) -> int:
        """Takes a signature in; returns its number, counted from 0."""
        number = self._added
        if number == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[number] = signed
        self._added += 1
        for key in self._keys(signed):
            there = self._buckets.get(key)
            if there is None:
                self._buckets[key] = number
            elif isinstance(there, int):
                self._buckets[key] = [2, there, number]
            else:
                if there[0] < MOST:
                    there.append(number)
                else:  # the oldest of the last half goes
                    there[1 + MOST // 2 + there[0] % (MOST // 2)] = number
                there[0] += 1
        return number

    def near(self, signed: Signature) -> list[int]:
        """The numbers of the signatures that are near one, in their order."""
        found = set[int]()
        for key in self._keys(signed):
            there = self._buckets.get(key)
            if isinstance(there, int):
                found.add(there)
            elif there is not None:
                found.update(there[1:])
        if not found:
            return []
        others = np.sort(np.fromiter(found, np.int64, len(found)))
        return others[agreement(self._signatures[others], signed) >= self._threshold].tolist()

    def _keys(self, signed: Signature) -> Iterator[bytes]:
        data, size = signed.tobytes(), 4 * self._rows
        for band in range(self._count):
            yield band.to_bytes(1, "big") + data[band * size : (band + 1) * size]


def agreement(signatures: UInt32[np.ndarray, "n 64"], signed: Signature) -> np.ndarray:
    """The share of numbers in which each of some signatures agrees with one."""
    return np.count_nonzero(signatures == signed, axis=1) / PERMUTATIONS


def near_duplicates(texts: Iterable[tuple[str, str]], threshold: float) -> Iterator[int | None]:
    """For each (text, language) the number of the first earlier text that it nearly repeats, or None. Compared are
    only texts that repeat none themselves: what resembles a repeat, and nothing else, is left."""
    index, kept = NearIndex(threshold), []
    for number, (text, language) in enumerate(texts):
        signed = signature(text, language)
        earlier = index.near(signed)
        if not earlier:
            index.add(signed)
            kept.append(number)
        yield kept[earlier[0]] if earlier else None
