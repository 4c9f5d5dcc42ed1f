"""Whether the numbers of a summary are those of its posts.

A digest tells that a summary was not edited since its manifest was written; whoever writes both can write any verdict.
The posts say what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from probes.checks.crosscheck import Evidence
from probes.foreign import plain
from probes.results.posts import PostResult
from probes.results.summary import concluded, methods_of, summarise

N_BOOT = 2000  # of a run whose manifest does not say
MOST_BOOT, MOST_SEED = 100_000, 1 << 63  # that a manifest may ask for
_P = frozenset(("p", "p_holm", "p_position", "cosine_p"))  # keys of p-values


def drawn_by(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Seed and number of bootstrap draws of a run; 0 where the manifest has no such number."""
    settings = manifest.get("settings")
    seed, n_boot = settings.get("seed", 0) if isinstance(settings, Mapping) else 0, manifest.get("n_boot", N_BOOT)
    return (
        seed if type(seed) is int and 0 <= seed < MOST_SEED else 0,
        n_boot if type(n_boot) is int and 0 <= n_boot <= MOST_BOOT else 0,
    )


def unborne(
    summary: Mapping[str, Any], manifest: Mapping[str, Any], evidence: Sequence[Evidence], results: Sequence[PostResult]
) -> str | None:
    """What of a summary its posts do not bear, in words; None where they bear all of it. Only what was found of swap
    pairs is taken as stated: their maps are not kept with the posts. Its p-values count in Holm's correction.

    Args:
        results: the posts that ``evidence`` was made of.
    Raises:
        KeyError, TypeError, AttributeError: the summary is none.
    """
    seed, n_boot = drawn_by(manifest)
    found = summarise(results, evidence, n_boot, seed=seed)
    found |= concluded(found | {"swaps": summary["swaps"]}, methods_of(results))
    for name, value in found.items():
        if name != "swaps" and not _same(name, summary[name], value):
            return f"{name} is {plain(summary[name], 120)}, and its posts give {plain(value, 120)}"
    return None


def _same(name: str, stated: Any, found: Any) -> bool:
    """Whether ``stated`` is ``found`` as JSON would have it. ``name``: the key it stands under."""
    if isinstance(found, Mapping):
        inner = isinstance(stated, Mapping) and stated.keys() == found.keys()
        own = name if name in _P else ""  # p-values by method
        return inner and all(_same(own or str(key), stated[key], value) for key, value in found.items())
    if isinstance(found, (list, tuple)):
        both = isinstance(stated, list) and len(stated) == len(found)
        return both and all(_same(name, one, other) for one, other in zip(stated, found, strict=True))
    if found is None or isinstance(found, (str, bool)):
        return type(stated) is type(found) and stated == found
    if type(stated) not in (int, float):
        return False
    if name in _P:  # on another machine a sum in another order may decide a tie
        return 0 < stated <= 1 and math.isclose(stated, found, rel_tol=0.05)
    return math.isclose(stated, found, rel_tol=1e-6, abs_tol=1e-6)
