"""Which records a run takes: at most so many of each kind, each data set and label as often as its weight says."""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks


def limited(records: Sequence[Record], limit: int | Mapping[str, int] | None) -> list[Record]:
    """At most ``limit`` records (one number, or one per task) of each task, language and split, by ``evenly``. Which
    ones does not depend on the other tasks, languages and splits that are there."""
    places: dict[tuple[str, str, str], list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault((record.task, record.language, record.split), []).append(place)
    kept: list[int] = []
    for (task, *_), those in places.items():
        most = limit.get(task) if isinstance(limit, Mapping) else limit
        kept += those if most is None else [those[i] for i in evenly(len(those), most)]
    return [records[place] for place in sorted(kept)]


def evenly(count: int, most: int) -> list[int]:
    """``most`` of the numbers below ``count``, in their order: one of each of so many equal parts; all where there are
    no more. Published files are often sorted by label, and their first records all have the same. In others labels, or
    the questions about a post, take turns, and every n-th record has the same; so which one of a part is drawn."""
    if count <= most:
        return list(range(count))
    ends = [part * count // most for part in range(most + 1)]
    return np.random.default_rng(0).integers(ends[:-1], ends[1:]).tolist()


Weight = float | Mapping[str, float] | str  # of a data set: one number, one per label, or "balanced"


def weighted(records: Sequence[Record], weights: Mapping[str, Weight], seed: int) -> list[Record]:
    """Every data set as often as its weight says: 2 is each record twice, 0.5 half of them and 2.5 both, drawn by
    ``seed``; 0 is none. Without weight a data set counts once. The order stays, copies stand together.

    Args:
        weights: a data set is named by ``source`` or by ``task``; the name of the source goes first. A mapping weighs
            its records by their label, once where it names none; "balanced" gives every label as many records as the
            most frequent one has. Of several labels the one with the largest weight counts, of equals the first.

    Raises:
        InputError: a name that no record has, or a label that is none of its tasks'.
    """
    names = [next((name for name in (r.source, r.task) if name in weights), None) for r in records]
    if unknown := [name for name in weights if name not in names]:
        known = sorted({name for record in records for name in (record.source, record.task) if name})
        raise InputError(f"weights: no record of data set {unknown[0]!r}; there are: {', '.join(known) or 'none'}")
    times, rng = np.ones(len(records), int), np.random.default_rng(seed)
    for name in sorted(weights):
        places = np.flatnonzero([other == name for other in names])
        for factor, part in _parts(name, [records[int(place)] for place in places], weights[name]):
            _repeat(times, places[part], factor, rng)
    return [record for record, count in zip(records, times, strict=True) for _ in range(count)]


def _parts(name: str, records: Sequence[Record], weight: Weight) -> Iterator[tuple[float, list[int]]]:
    """Which of ``records`` have which factor, in the order in which they are drawn."""
    if isinstance(weight, int | float):
        yield weight, list(range(len(records)))
        return
    keys = list(dict.fromkeys(key for record in records for key in tasks.get_task(record.task).keys))
    counts = Counter(key for record in records for key in record.gold)
    if isinstance(weight, str):
        weight = {key: max(counts.values()) / count for key, count in counts.items()}
    elif unknown := [label for label in weight if label not in keys]:
        close = difflib.get_close_matches(unknown[0], keys, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise InputError(f"weights.{name}: {unknown[0]!r} is no label of it{meant}; its labels: {', '.join(keys)}")
    factors = {key: weight.get(key, 1.0) for key in keys}
    deciding = [max(record.gold, key=lambda key: factors[key]) for record in records]
    for key in keys:
        if part := [place for place, other in enumerate(deciding) if other == key]:
            yield factors[key], part


def _repeat(times: np.ndarray, places: np.ndarray, factor: float, rng: np.random.Generator) -> None:
    whole = int(factor)
    times[places] = whole
    times[rng.permutation(places)[: round((factor - whole) * len(places))]] += 1


def mixture(chosen: Sequence[Record], drawn: Sequence[Record]) -> list[str]:
    """What weights made of the records, one line per task: how many an epoch has of every label, and of how many."""
    lines = []
    for task in dict.fromkeys(record.task for record in chosen):
        before, after = (Counter(key for r in side if r.task == task for key in r.gold) for side in (chosen, drawn))
        total = sum(record.task == task for record in drawn)
        labels = [f"{key} {after[key]:,} ({before[key]:,} different)" if after[key] > before[key] else
                  f"{key} {after[key]:,} of {before[key]:,}"
                  for key in tasks.get_task(task).keys if before[key]]  # fmt: skip
        lines.append(f"an epoch has {total:,} records of {task}: {', '.join(labels)}")
    return lines
