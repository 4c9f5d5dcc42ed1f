"""Figures that others published, and which of our results they may stand beside."""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mentalglm_jax.data.records import Record


@cache
def published() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Task to data set to figures: system, metric, value, seen (primary, secondary, derived), source.

    A data set is named as the readers of its files name the ``source`` of their records."""
    return yaml.safe_load((files("mentalglm_jax.evaluate") / "published.yaml").read_text(encoding="utf-8"))


def data_set(task: str, records: Iterable[Record]) -> str | None:
    """The data set of ``published`` that all of these records are from; None where any is from elsewhere."""
    sources = {record.source for record in records if record.task == task}
    return next(iter(sources)) if len(sources) == 1 and sources <= published().get(task, {}).keys() else None


def figures_beside(task: str, data_set: object) -> list[dict[str, Any]]:
    """What others published on the records that a result is on; nothing where these are not known (None)."""
    return published().get(task, {}).get(data_set, []) if isinstance(data_set, str) else []
