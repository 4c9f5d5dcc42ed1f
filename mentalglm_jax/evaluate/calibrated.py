"""Label probabilities that can be believed: one temperature per task, fitted on development records, kept in
``calibration.json`` beside the weights it was fitted for.

A temperature divides the log-probabilities of the label sentences before their softmax (Guo et al. 2017, arXiv
1706.04599); it changes no order and thus no label. It is fitted for tasks with one label, scored right after the post:
the labels of a task with several do not exclude each other, and after an explanation a model has made up its mind.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.checkpoints.hf_files import ADAPTER_FILES, CALIBRATION, MODEL_FILES, is_hub_id, locate
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import Fields, at_home, inside, read_json
from mentalglm_jax.text import tasks

LEAST = 20  # development records of a task, from which a temperature is fitted
_LOW, _HIGH = 1e-3, 1e3


def fit_temperatures(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What stands in ``calibration.json``: task to its ``temperature`` and the number of ``records`` that said it.

    Args:
        rows: of ``label_scores.jsonl``, of development records.
    """
    from mentalglm_jax.inference.scoring import fit_calibration  # JAX, which reading answers does without

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if tasks.get_task(row["task"]).arity == "single" and row["answer_order"] == "label_first":
            groups.setdefault(row["task"], []).append(row)
    found = {}
    for name, known in groups.items():
        keys = list(tasks.get_task(name).keys)
        if len(known) < LEAST or len(keys) < 2:
            continue
        scores = np.asarray([[row["label_logprobs"][key] for key in keys] for row in known], float)
        truth = np.asarray([keys.index(row["label"]) for row in known], np.int64)
        temperature = fit_calibration(scores, truth, bias=False).temperature
        found[name] = {"temperature": min(max(temperature, _LOW), _HIGH), "records": len(known)}
    return found


def write_temperatures(directory: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes ``fit_temperatures``'s result beside the weights; nothing where it is empty."""
    if found:
        write_json(directory / CALIBRATION, found)


def read_temperatures(directory: Path) -> dict[str, float]:
    """Task to temperature, of a directory of weights or a run; empty where none were fitted. Tasks that are not known
    are left alone: they may be somebody's own.

    Raises:
        InputError: the file is damaged, or a link that leads out of ``directory``.
    """
    if not os.path.lexists(path := directory / CALIBRATION):
        return {}
    raw = read_json(inside(directory, CALIBRATION))
    entries = {name: Fields(raw, str(path)).mapping(name) for name in raw}
    return {name: Fields(entry, f"{path}: {name}").number("temperature", _LOW, _HIGH)
            for name, entry in entries.items()}  # fmt: skip


def temperatures_of(model: str, adapter: str | None) -> dict[str, float]:
    """Those that travel with a model, or with the adapter over it: directories or Hub ids.

    Raises: InputError as ``read_temperatures``.
    """
    place, files = (model, MODEL_FILES) if adapter is None else (adapter, ADAPTER_FILES)
    local = at_home(place).is_dir() or is_hub_id(place)
    return read_temperatures(locate(place, files)) if local else {}


def temperature_of(row: Mapping[str, Any]) -> float | None:
    """What a row of ``label_scores.jsonl`` says of its own. Raises: InputError: it is no temperature."""
    value = row.get("temperature")
    if value is None:
        return None
    if type(value) not in (int, float) or not _LOW <= value <= _HIGH:
        raise InputError(f"record {row.get('id')!r}: temperature must be a number from {_LOW:g} to {_HIGH:g}")
    return float(value)
