"""The second reading of a model: how probable it finds each label sentence, and whether those probabilities can be
believed."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.data.records import Post, Record
from mentalglm_jax.devices.together import on_primary, stopping_together
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer, by_task, scored
from mentalglm_jax.evaluate.calibrated import Scaling, scaling_for
from mentalglm_jax.evaluate.metrics import indicator, task_scores
from mentalglm_jax.files import write_text
from mentalglm_jax.inference.generate import explanation_ids, label_ids, score_labels
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer

BINS = 10


def score_records(
    model: Glm,
    tokenizer: GlmTokenizer,
    records: Sequence[Post],
    *,
    written: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    scalings: Mapping[str, Scaling] | None = None,
    out_path: str | Path | None = None,
    batch_size: int = 32,
    fingerprint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of ``label_scores.jsonl``: each record with ``label_logprobs``, label key to the log-probability of the
    sentence that states this label alone (natural logarithm, summed over its tokens), in the order of ``records``.

    The sentence is scored where an answer has it: right after the prompt; or, for a model that explains first, after
    the explanation that it wrote itself. Then the probability is that of the label given the post and that one
    explanation: what the model has already argued for. An answer that does not begin with an explanation is scored
    after the prompt, as such answers are trained; ``answer_order`` says which it was.

    Args:
        written: rows of ``generations.jsonl`` for the same records, of a model that explains first.
        system: a system turn before every post; None is the one of its task, if it has one.
        scalings: of tasks (``read_scalings``); a row whose label is scored where its task's was fitted says that one
            as ``temperature`` and, for several labels, ``bias``.
        out_path: also written there.
        fingerprint: of ``model``, which rows then name in ``answered_by`` (``generate_records``).
        progress: called with the numbers of records done and in all.

    Raises:
        InputError: two records with one id, a record that ``written`` lacks or that another model than
            ``fingerprint`` answered there, or a prompt beyond the model's context.
        RunError: ``out_path`` cannot be written.
        Interrupted, Preempted: in a run of several processes, a signal arrived at one of them.
    """
    if len({record.id for record in records}) != len(records):
        ids = [record.id for record in records]
        raise InputError(f"record {next(i for i in ids if ids.count(i) > 1)!r} is given twice; ids must differ")
    said = {row["id"]: row["parsed_explanation"] for row in written or ()
            if tasks.explains_first(row["task"], row["language"], row["output_text"])}  # fmt: skip
    answered = {row["id"] for row in written or ()}
    if written is not None and (missing := [record.id for record in records if record.id not in answered]):
        raise InputError(f"record {missing[0]!r}: no answer to score the label after; generate answers to all records")
    others = [row for row in written or () if (row.get("answered_by") or fingerprint) != fingerprint]
    if others and fingerprint:
        raise InputError(f"record {others[0]['id']!r}: answered by another model than the one that labels are scored "
                         f"with ({others[0]['answered_by']} and {fingerprint}); generate answers with "
                         "this one")  # fmt: skip
    groups: dict[tuple[str, str, tasks.Order], list[int]] = {}
    for number, record in enumerate(records):
        order: tasks.Order = "explanation_first" if said.get(record.id) else "label_first"
        groups.setdefault((record.task, record.language, order), []).append(number)
    rows: dict[int, dict[str, Any]] = {}
    for (task, language, order), numbers in groups.items():
        candidates = label_ids(tokenizer, task, language, order)
        scaling = scaling_for(scalings, tasks.get_task(task), order)
        prompts = [tokenizer.prompt_ids(records[number].prompt, system or records[number].system) for number in numbers]
        if order == "explanation_first":
            prompts = [[*prompt, *explanation_ids(tokenizer, task, said[records[number].id], language)]
                       for prompt, number in zip(prompts, numbers, strict=True)]  # fmt: skip
        with stopping_together("scoring labels") as check:
            scores = score_labels(model, prompts, list(candidates.values()), batch_size=batch_size,
                                  progress=lambda done, total: check())  # fmt: skip
        for number, values in zip(numbers, scores, strict=True):
            logprobs = {key: float(value) for key, value in zip(candidates, values, strict=True)}
            rows[number] = records[number].to_dict() | tasks.row_definition(task) | {
                "label_logprobs": logprobs, "answer_order": order}  # fmt: skip
            if fingerprint is not None:
                rows[number]["answered_by"] = fingerprint
            if scaling is not None:
                rows[number] |= scaling.to_dict()
        if progress is not None:
            progress(len(rows), len(records))
    ordered = [rows[number] for number in range(len(records))]
    if out_path is not None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        on_primary(lambda: write_text(out_path, text, private=True))
    return ordered


def label_f1(model: Glm, tokenizer: GlmTokenizer, records: Sequence[Record], batch_size: int = 32) -> float:
    """The label reading's weighted F1, the mean over the tasks of ``records``; labels are scored right after the post.

    Raises: InputError as ``score_records``.
    """
    answers = by_task(map(scored, score_records(model, tokenizer, records, batch_size=batch_size)))
    found = []
    for name, said in answers.items():
        task = tasks.get_task(name)
        gold, predicted = (indicator(task, labels) for labels in
                           ([a.record.gold for a in said], [a.labels for a in said]))  # fmt: skip
        found.append(task_scores(task, gold, predicted)["weighted_f1"])
    return float(np.mean(found))


def calibration(task: tasks.Task, answers: Sequence[Answer], calibrated: bool = False) -> dict[str, Any]:
    """Whether label probabilities can be believed, and how well they rank.

    Single-label tasks: an answer's confidence is the probability of its label, and it is right or wrong. Multi-label
    tasks: every (post, label) pair counts; its confidence is the label's probability and it is right when the label is
    there. Answers without probabilities (missing rows) are left to the scores, which count them as wrong.

    Args:
        calibrated: of the probabilities after their scaling.

    Returns:
        n (answers); ece: expected calibration error over 10 bins of equal width (Guo et al. 2017, arXiv 1706.04599);
        ece_if_right: what chance alone would make of it, were these very probabilities right. It is never below 0, so
        that few answers look badly calibrated; here each bin's error is normal, with the variance of its answers;
        brier: mean squared error of the probabilities, summed over the classes of a single-label task;
        reliability: for each bin that is not empty its low, high, n, confidence and accuracy;
        auroc: of the positive class where the task has one, else the mean over classes that are both present and
        absent; auroc_by_class (None where a class is always or never there).
    """
    of = "calibrated" if calibrated else "probabilities"
    known = [a for a in answers if getattr(a, of) is not None]
    if not known:
        return {
            "n": 0,
            "ece": None,
            "ece_if_right": None,
            "brier": None,
            "reliability": [],
            "auroc": None,
            "auroc_by_class": {},
        }
    p = np.asarray([getattr(a, of) for a in known], float)
    gold = indicator(task, [a.record.gold for a in known])
    if task.arity == "single":
        chosen = np.arange(len(p)), p.argmax(axis=1)
        confidence, right = p[chosen], gold[chosen]
        brier = float(((p - gold) ** 2).sum(axis=1).mean())
    else:
        confidence, right = p.ravel(), gold.ravel()
        brier = float(((confidence - right) ** 2).mean())
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, chance = [], 0.0
    for number in np.unique(place):
        inside = place == number
        chance += math.sqrt(float((confidence[inside] * (1 - confidence[inside])).sum()) * 2 / math.pi)
        bins.append({
            "low": float(number / BINS), "high": float((number + 1) / BINS), "n": int(inside.sum()),
            "confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean()),
        })  # fmt: skip
    ece = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(confidence)
    areas = {key: _auroc(gold[:, column], p[:, column]) for column, key in enumerate(task.keys)}
    present = [area for area in areas.values() if area is not None]
    auroc = areas[task.positive] if task.positive is not None else (float(np.mean(present)) if present else None)
    return {"n": len(known), "ece": float(ece), "ece_if_right": chance / len(confidence), "brier": brier,
            "reliability": bins, "auroc": auroc, "auroc_by_class": areas}  # fmt: skip


def _auroc(present: np.ndarray, score: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(present, score)) if 0 < present.sum() < len(present) else None
