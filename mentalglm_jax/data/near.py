"""Texts that are nearly the same: MinHash over character shingles (Broder 1997), candidates by locality-sensitive
hashing (``datasketch``)."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from mentalglm_jax.errors import InputError

PERMUTATIONS = 64
_SHINGLE = {"zh": 3, "en": 5}  # characters


def shingles(text: str, language: str) -> set[bytes]:
    """All pieces of 3 (Chinese) or 5 (English) characters, of a shorter text the text itself."""
    size = _SHINGLE.get(language, 5)
    return {text[at : at + size].encode() for at in range(max(1, len(text) - size + 1))}


class NearIndex:
    """Texts added one by one; asking for neighbours finds those added before.

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

    def neighbours(self, text: str, language: str, *, add: bool = True) -> list[tuple[int, float]]:
        """(number, estimated similarity) of the near texts, numbers counting the texts added; then adds this one."""
        signature: Any = self._hash()
        signature.update_batch(shingles(text, language))
        found = [(number, float(signature.jaccard(self._signatures[number]))) for number in self._lsh.query(signature)]
        if add:
            number = len(self._signatures)
            self._lsh.insert(number, signature, check_duplication=False)
            self._signatures[number] = signature
        return sorted((number, close) for number, close in found if close >= self._threshold)


def near_duplicates(texts: Iterable[tuple[str, str]], threshold: float) -> Iterator[int | None]:
    """For each (text, language) the number of the first earlier text that it nearly repeats, or None. Compared are
    only texts that repeat none themselves: what resembles a repeat, and nothing else, is left."""
    index, kept = NearIndex(threshold), []
    for number, (text, language) in enumerate(texts):
        found = index.neighbours(text, language, add=False)
        if not found:
            index.neighbours(text, language)
            kept.append(number)
        yield kept[found[0][0]] if found else None
