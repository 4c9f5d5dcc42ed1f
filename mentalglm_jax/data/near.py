"""Texts that are nearly the same: MinHash over character shingles (Broder 1997), candidates by locality-sensitive
hashing (``datasketch``)."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mentalglm_jax.errors import InputError

PERMUTATIONS = 64
_SHINGLE = {"zh": 3, "en": 5}  # characters


def shingles(text: str, language: str) -> set[bytes]:
    """All pieces of 3 (Chinese) or 5 (English) characters, of a shorter text the text itself."""
    size = _SHINGLE.get(language, 5)
    return {text[at : at + size].encode() for at in range(max(1, len(text) - size + 1))}


class NearIndex:
    """Texts added one by one; asking for neighbours finds those added so far.

    Args:
        threshold: Jaccard similarity of the shingle sets from which two texts count as near, as MinHash estimates it
            (64 permutations: standard error about 0.05 at 0.8).

    Raises: InputError if the threshold is not in (0, 1).
    """

    def __init__(self, threshold: float = 0.8):
        if not 0 < threshold < 1:
            raise InputError(f"near-duplicate threshold: {threshold} is not between 0 and 1; try 0.8")
        import datasketch  # with it comes SciPy, which commands without data do not need

        self._threshold = threshold
        # A candidate too many costs a comparison, a missed one is a leak: with the library's own weights two texts just
        # above 0.8 would meet in 4 of 10 cases, with these in 19 of 20.
        self._lsh: Any = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.02, 0.98))
        first: Any = datasketch.MinHash(num_perm=PERMUTATIONS)  # the permutations are drawn once
        self._hash = functools.partial(
            datasketch.MinHash,
            num_perm=PERMUTATIONS,
            permutations=first.permutations,
            seed=first.seed,
            scheme=first.scheme,
        )
        self._signatures: dict[int, Any] = {}

    def add(self, text: str, language: str) -> int:
        """Takes a text in; returns its number, counted from 0."""
        number = len(self._signatures)
        self._signatures[number] = self._signature(text, language)
        self._lsh.insert(number, self._signatures[number], check_duplication=False)
        return number

    def first_near(self, text: str, language: str) -> int | None:
        """The first of the texts added that a text is near."""
        return next(self._near(self._signature(text, language), lambda _: True), None)

    def neighbours(self, number: int, wanted: Callable[[int], bool]) -> Iterator[int]:
        """The texts that are near text ``number``, in their order; ``wanted`` is asked before two are compared.

        Ten thousand posts that differ in a number are all near one another: who needs one of a kind only says so with
        ``wanted``, or stops.
        """
        return self._near(self._signatures[number], lambda other: other != number and wanted(other))

    def _near(self, signature: Any, wanted: Callable[[int], bool]) -> Iterator[int]:
        for other in sorted(self._lsh.query(signature)):
            if wanted(other) and signature.jaccard(self._signatures[other]) >= self._threshold:
                yield other

    def _signature(self, text: str, language: str) -> Any:
        signature: Any = self._hash()
        signature.update_batch(shingles(text, language))
        return signature


def near_duplicates(texts: Iterable[tuple[str, str]], threshold: float) -> Iterator[int | None]:
    """For each (text, language) the number of the first earlier text that it nearly repeats, or None. Compared are
    only texts that repeat none themselves: what resembles a repeat, and nothing else, is left."""
    index, kept = NearIndex(threshold), []
    for number, (text, language) in enumerate(texts):
        earlier = index.first_near(text, language)
        if earlier is None:
            index.add(text, language)
            kept.append(number)
        yield None if earlier is None else kept[earlier]
