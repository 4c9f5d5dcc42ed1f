"""Scores of predicted label sets, per task, as one number, per class and per level."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mentalglm_jax.text import tasks

METRICS = ("weighted_f1", "micro_f1", "macro_f1")


def indicator(task: tasks.Task, labels: Sequence[Sequence[str] | None]) -> Bool[np.ndarray, "N C"]:
    """Row i is True for the labels of answer i; all False for None."""
    return np.asarray([[key in (row or ()) for key in task.keys] for row in labels], bool).reshape(-1, len(task.keys))


def positive_place(task: tasks.Task) -> int | None:
    """The place among the labels of the class whose F1 the field reports; None where the task has none."""
    return None if task.positive is None else task.keys.index(task.positive)


def task_scores(task: tasks.Task, gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"]) -> dict[str, Any]:
    """n and the scores of ``evaluate`` that are one number for all classes; the same for a model and for a baseline."""
    hits = gold & predicted
    scores: dict[str, Any] = {"n": len(gold)}
    scores |= {k: float(v) for k, v in averages(task.arity, hits.sum(0), predicted.sum(0), gold.sum(0)).items()}
    exact = float((gold == predicted).all(axis=1).mean())
    if task.arity == "single":
        scores["accuracy"] = exact
    else:
        scores["exact_match"] = exact
        scores["samples_f1"] = float(f1(hits.sum(1), predicted.sum(1), gold.sum(1)).mean())
    if (of_class := positive_place(task)) is not None:
        scores["positive_class"] = task.positive
        scores["positive_f1"] = float(f1(hits.sum(0), predicted.sum(0), gold.sum(0))[of_class])
    if task.kind == "hierarchy":
        scores["levels"] = levels(task, gold, predicted)
    if task.kind == "ordinal":
        scores |= ordinal(gold, predicted)
    return scores


def ordinal(gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"]) -> dict[str, float | None]:
    """How far off the levels are, columns being levels from the lowest to the highest.

    An unread answer counts as the level farthest from the true one.

    Returns:
        ``mae`` (mean absolute error, in levels), ``within_one`` (share of answers at most one level off) and
        ``quadratic_weighted_kappa`` (Cohen 1968; None where gold and answers are one and the same level throughout).
    """
    from sklearn.metrics import cohen_kappa_score, mean_absolute_error

    count = gold.shape[1]
    true = gold.argmax(axis=1)
    said = np.where(predicted.any(axis=1), predicted.argmax(axis=1), np.where(true < count / 2, count - 1, 0))
    varied = len({*true.tolist(), *said.tolist()}) > 1
    kappa = cohen_kappa_score(true, said, labels=list(range(count)), weights="quadratic") if varied else None
    return {
        "mae": float(mean_absolute_error(true, said)),
        "within_one": float((abs(true - said) <= 1).mean()),
        "quadratic_weighted_kappa": None if kappa is None else float(kappa),
    }


def f1(hits: Any, predicted: Any, gold: Any) -> Float[np.ndarray, "..."]:
    """2 hits / (predicted + gold), 0 where both are 0."""
    both = np.asarray(predicted + gold, float)
    return np.divide(2.0 * hits, both, out=np.zeros_like(both), where=both > 0)


def averages(kind: str, hits: Any, predicted: Any, gold: Any) -> dict[str, Any]:
    """The averages over classes of counts ``[..., C]``."""
    of_class, supported, total = f1(hits, predicted, gold), gold > 0, gold.sum(-1)
    # A single-label row predicts exactly one class; the unread answers' class is not among the C.
    answered = total if kind == "single" else predicted.sum(-1)
    return {
        "weighted_f1": (of_class * gold).sum(-1) / total,
        "micro_f1": f1(hits.sum(-1), answered, total),
        "macro_f1": (of_class * supported).sum(-1) / supported.sum(-1),
    }


def per_class(
    task: tasks.Task, gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"]
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1, support (gold) and predicted count of every class."""
    counts = zip(task.keys, (gold & predicted).sum(0), predicted.sum(0), gold.sum(0), strict=True)
    return {
        key: {
            "precision": float(hits / said) if said else 0.0,
            "recall": float(hits / true) if true else 0.0,
            "f1": float(f1(hits, said, true)),
            "support": int(true),
            "predicted": int(said),
        }
        for key, hits, said, true in counts
    }


def levels(task: tasks.Task, gold: np.ndarray, predicted: np.ndarray) -> dict[str, dict[str, float]]:
    """Micro scores over parents, children and both pooled; a parent is there when one of its children is."""
    parents = sorted({label.parent or "" for label in task.labels})
    belongs = np.asarray([[label.parent == parent for parent in parents] for label in task.labels])
    child = (gold, predicted)
    parent = tuple((x[:, :, None] & belongs).any(axis=1) for x in child)
    pooled = tuple(np.concatenate(pair, axis=1) for pair in zip(parent, child, strict=True))
    levels = {}
    for name, (true, said) in (("parent", parent), ("child", child), ("pooled", pooled)):
        hits = float((true & said).sum())
        levels[name] = {
            "precision": hits / said.sum() if said.any() else 0.0,
            "recall": hits / true.sum(),
            "f1": float(f1(hits, said.sum(), true.sum())),
        }
    return {name: {key: float(value) for key, value in scores.items()} for name, scores in levels.items()}


def confusion(
    task: tasks.Task, gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"]
) -> dict[str, dict[str, int]]:
    """Gold class to predicted class to number of rows.

    Single-label tasks have one more column, "unread". For multi-label tasks a cell counts the rows that have the gold
    label and were given the predicted one, and "unread" those that were given none: rows do not add up to the support.
    """
    counts = gold.T.astype(int) @ predicted.astype(int)
    unread = gold[~predicted.any(axis=1)].sum(axis=0)
    return {
        key: {other: int(n) for other, n in zip(task.keys, row, strict=True)} | {"unread": int(none)}
        for key, row, none in zip(task.keys, counts, unread, strict=True)
    }
