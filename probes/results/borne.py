"""Whether the numbers of a summary are those of its posts.

A digest tells that a summary was not edited since its manifest was written; whoever writes both can write any verdict.
The posts say what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from probes import stats
from probes.checks.crosscheck import Evidence
from probes.checks.verdict import FAMILIES
from probes.foreign import plain
from probes.results.summary import conclusion, mass, methods_of, verdicts

N_BOOT = 2000  # of a run whose manifest does not say
MOST_BOOT = 100_000  # that a manifest may ask for
_CLOSE = {"p": 0.01}  # sums in another order may decide a tie
_NAMES = ("n_used", "mass_ratio", "mass_ratio_null", "excess", "p")


def drawn_by(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Seed and number of bootstrap draws of a run; 0 where the manifest has no such number."""
    settings = manifest.get("settings")
    seed, n_boot = settings.get("seed", 0) if isinstance(settings, Mapping) else 0, manifest.get("n_boot", N_BOOT)
    return (
        seed if type(seed) is int and 0 <= seed < 1 << 63 else 0,
        n_boot if type(n_boot) is int and 0 <= n_boot <= MOST_BOOT else 0,
    )


def unborne(
    summary: Mapping[str, Any], manifest: Mapping[str, Any], evidence: Sequence[Evidence], maps: Sequence[Any]
) -> str | None:
    """What of a summary its posts do not bear, in words; None where they bear what verdict and headline rest on.

    Args:
        maps: the posts (``results.store.PostResult``) that ``evidence`` was made of.
    Raises:
        KeyError, TypeError, AttributeError: the summary is none.
    """
    seed, n_boot = drawn_by(manifest)
    methods = methods_of(maps)
    found = mass(evidence, methods, n_boot, 9999, seed) | verdicts(evidence)
    intervals = ("mass_ratio_ci", "excess_ci") if "n_boot" in manifest else ()
    if found["p"].keys() == summary["p"].keys():  # of few posts there is none; an earlier version gave one
        found["p"] = {m: summary["p"][m] if p is None else p for m, p in found["p"].items()}
    for name in (*_NAMES, *intervals, "verdicts", "verdicts_by_chance"):
        if not _same(summary[name], found[name], _CLOSE.get(name, 1e-6)):
            return f"{name} is {plain(summary[name], 120)}, and its posts give {plain(found[name], 120)}"
    rest = [row["p"] for row in summary["tests"] if row["check"] != "excess"]
    voting = [method for method in methods if method in FAMILIES]
    p = [*(found["p"][method] for method in voting), *rest]
    adjusted = stats.holm([math.nan if one is None else float(one) for one in p])
    held = {m: None if math.isnan(one) else one for m, one in zip(voting, adjusted, strict=False)}
    said, borne = summary["conclusion"], conclusion(found | {"p_holm": held})
    if said not in ("inconclusive", borne):
        return f"conclusion is {plain(said, 40)}, and its posts give {borne}"
    return None


def _same(stated: Any, found: Any, close: float) -> bool:
    if isinstance(found, Mapping):
        both = isinstance(stated, Mapping) and stated.keys() == found.keys()
        return both and all(_same(stated[key], value, close) for key, value in found.items())
    if isinstance(found, (list, tuple)):
        both = isinstance(stated, list) and len(stated) == len(found)
        return both and all(_same(one, other, close) for one, other in zip(stated, found, strict=True))
    if found is None or stated is None:
        return stated is found
    return type(stated) in (int, float) and math.isclose(stated, found, rel_tol=1e-6, abs_tol=close)
