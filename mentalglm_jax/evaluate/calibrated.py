"""Label probabilities that can be believed: one scaling per task, fitted on development records, kept in
``calibration.json`` beside the weights it was fitted for.

For a task with one label a temperature divides the log-probabilities of the label sentences before their softmax (Guo
et al. 2017, arXiv 1706.04599). The labels of a task with several do not exclude each other: there each label's
log-odds are divided by the temperature and moved by a bias, the same for all labels, and its probability is for itself
(Platt 1999). Neither changes an order, and thus no label. A scaling holds for labels scored where those were that it
was fitted on: right after the post, or after the explanation that a model gave first.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mentalglm_jax.checkpoints.hf_files import ADAPTER_FILES, CALIBRATION, MODEL_FILES, is_hub_id, locate
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import Fields, at_home, inside, read_json
from mentalglm_jax.inference.calibration import Calibration, fit_calibration, fit_pairs, log_odds
from mentalglm_jax.text import tasks

LEAST = 20  # development records of a task, from which a scaling is fitted
_LOW, _HIGH, _FAR = 1e-3, 1e3, 50.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    """From log-probabilities of label sentences to probabilities. ``bias`` is None for a task with one label;
    ``order`` is that of the answers which it was fitted on."""

    temperature: float
    bias: float | None = None
    order: tasks.Order = "label_first"

    def probabilities(self, logprobs: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
        """Of the labels: they add up to 1 where ``bias`` is None, else each is for itself."""
        if self.bias is None:
            return Calibration(self.temperature).probabilities(logprobs[None])[0]
        return np.exp(-np.logaddexp(0.0, -(log_odds(logprobs[None])[0] / self.temperature + self.bias)))

    def to_dict(self) -> dict[str, Any]:
        """The keys of a row that is scaled by it; with ``answer_order``, of ``calibration.json``."""
        return {"temperature": self.temperature} | ({} if self.bias is None else {"bias": self.bias})


def fit_scalings(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What stands in ``calibration.json``: task to its scaling and the number of ``records`` that said it. Of a task
    whose labels were scored in both places, the place with more records counts.

    Args:
        rows: of ``label_scores.jsonl``, of development records.
    """
    groups: dict[tuple[str, tasks.Order], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["answer_order"]), []).append(row)
    found: dict[str, dict[str, Any]] = {}
    for (name, order), known in groups.items():
        if len(known) < max(LEAST, found.get(name, {"records": -1})["records"] + 1):
            continue
        task = tasks.get_task(name)
        keys = list(task.keys)
        scores = np.asarray([[row["label_logprobs"][key] for key in keys] for row in known], float)
        if task.arity == "single":
            truth = np.asarray([keys.index(row["label"]) for row in known], np.int64)
            scaling = Scaling(_within(fit_calibration(scores, truth, bias=False).temperature), order=order)
        else:
            present = np.asarray([[key in row["labels"] for key in keys] for row in known])
            temperature, bias = fit_pairs(log_odds(scores), present)
            scaling = Scaling(_within(temperature), bias, order)
        found[name] = {**scaling.to_dict(), "answer_order": order, "records": len(known)}
    return found


def _within(temperature: float) -> float:
    return min(max(temperature, _LOW), _HIGH)


def write_scalings(directory: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes ``fit_scalings``'s result beside the weights; nothing where it is empty."""
    if found:
        write_json(directory / CALIBRATION, found)


def read_scalings(directory: Path) -> dict[str, Scaling]:
    """Task to scaling, of a directory of weights or a run; empty where none were fitted. Tasks that are not known are
    left alone: they may be somebody's own.

    Raises:
        InputError: the file is damaged, or a link that leads out of ``directory``.
    """
    if not os.path.lexists(path := directory / CALIBRATION):
        return {}
    raw = read_json(inside(directory, CALIBRATION))
    entries = {name: Fields(Fields(raw, str(path)).mapping(name), f"{path}: {name}") for name in raw}
    return {name: _scaling(entry) for name, entry in entries.items()}


def _scaling(entry: Fields) -> Scaling:
    """Raises: InputError."""
    order = entry.text("answer_order", "label_first")
    if order not in ("label_first", "explanation_first"):
        raise entry.wrong("answer_order", "label_first or explanation_first")
    return Scaling(entry.number("temperature", _LOW, _HIGH), entry.number("bias", -_FAR, _FAR, None), order)


def scalings_of(model: str, adapter: str | None) -> dict[str, Scaling]:
    """Those that travel with a model, or with the adapter over it: directories or Hub ids.

    Raises: InputError as ``read_scalings``.
    """
    place, files = (model, MODEL_FILES) if adapter is None else (adapter, ADAPTER_FILES)
    local = at_home(place).is_dir() or is_hub_id(place)
    return read_scalings(locate(place, files)) if local else {}


def scaling_for(scalings: Mapping[str, Scaling] | None, task: tasks.Task, order: tasks.Order) -> Scaling | None:
    """The one for labels of ``task`` scored as ``order`` says.

    Raises:
        InputError: it is one for a task of another kind with this name.
    """
    found = (scalings or {}).get(task.name)
    if found is None or found.order != order:
        return None
    if (found.bias is None) != (task.arity == "single"):
        kind = "several labels" if found.bias is not None else "one label"
        raise InputError(f"{CALIBRATION}: {task.name!r} was fitted for a task with {kind}, which this one is not; take "
                         "the file away")  # fmt: skip
    return found


def scaling_of(row: Mapping[str, Any]) -> Scaling | None:
    """What a row of ``label_scores.jsonl`` says of its own. Raises: InputError: it is none for its task."""
    if row.get("temperature") is None:
        return None
    entry, single = Fields(row, f"record {row.get('id')!r}"), tasks.get_task(row["task"]).arity == "single"
    if single and row.get("bias") is not None:
        raise entry.wrong("bias", "left out, as the task has one label")
    bias = None if single else entry.number("bias", -_FAR, _FAR)
    return Scaling(entry.number("temperature", _LOW, _HIGH), bias)
