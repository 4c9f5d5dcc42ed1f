"""Which records a run takes: at most so many of each kind, each data set as often as its weight says."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError


def limited(records: Sequence[Record], limit: int | Mapping[str, int] | None) -> list[Record]:
    """At most ``limit`` records (one number, or one per task) of each task, language and split, spread evenly over
    their order: published files are often sorted by label, and their first records all have the same."""
    keys = [(record.task, record.language, record.split) for record in records]
    total, seen, kept = Counter(keys), Counter(), []
    for key, record in zip(keys, records, strict=True):
        number, count = seen[key], total[key]
        seen[key] += 1
        most = limit.get(record.task) if isinstance(limit, Mapping) else limit
        if most is None or number * most // count != (number - 1) * most // count:  # a new one of `most` equal parts
            kept.append(record)
    return kept


def weighted(records: Sequence[Record], weights: Mapping[str, float], seed: int) -> list[Record]:
    """Every data set as often as its weight says: 2 is each record twice, 0.5 half of them and 2.5 both, drawn by
    ``seed``; 0 is none. Without weight a data set counts once. The order stays, copies stand together.

    Args:
        weights: a data set is named by ``source`` or by ``task``; the name of the source goes first.

    Raises:
        InputError: a name that no record has.
    """
    names = [next((name for name in (r.source, r.task) if name in weights), None) for r in records]
    if unknown := [name for name in weights if name not in names]:
        known = sorted({name for record in records for name in (record.source, record.task) if name})
        raise InputError(f"weights: no record of data set {unknown[0]!r}; there are: {', '.join(known) or 'none'}")
    times, rng = np.ones(len(records), int), np.random.default_rng(seed)
    for name in sorted(weights):
        places = np.flatnonzero([other == name for other in names])
        whole = int(weights[name])
        times[places] = whole
        times[rng.permutation(places)[: round((weights[name] - whole) * len(places))]] += 1
    return [record for record, count in zip(records, times, strict=True) for _ in range(count)]
