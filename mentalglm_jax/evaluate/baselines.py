"""What any system should beat: the most frequent label, and logistic regression on TF-IDF."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.metrics import averages, indicator, positive_place, task_scores
from mentalglm_jax.evaluate.statistics import bootstrap
from mentalglm_jax.text import tasks

Predictions = dict[str, Bool[np.ndarray, "N C"]]


def floor_predictions(
    train: Sequence[Record], test: Sequence[Record]
) -> dict[str, tuple[list[Record], Predictions]]:  # fmt: skip
    """What the floors answer, for every task of ``test``: its records, and floor to a row of labels for each of them.

    ``majority`` always answers the most frequent training label. ``tfidf_logreg`` is logistic regression, one
    classifier per label, on TF-IDF n-grams (characters 1-3; for English also words 1-2), its C and, for multi-label
    tasks, its threshold chosen by cross-validation on ``train``. Each language, and each question where a task asks
    several about the same posts, has its own baseline when ``train`` has records for it.

    Raises:
        InputError: no training record for a task of ``test``.
    """
    result = {}
    for name in (name for name in tasks.TASKS if any(record.task == name for record in test)):
        task = tasks.get_task(name)
        train_of, test_of = ([record for record in part if record.task == name] for part in (train, test))
        if not train_of:
            raise InputError(f"task {name}: no training record to fit baselines on; add some or leave the task out")
        predictions: dict[str, Bool[np.ndarray, "N C"]] = {
            floor: np.zeros((len(test_of), len(task.keys)), bool) for floor in ("majority", "tfidf_logreg")
        }
        groups: dict[tuple[str, str], list[int]] = {}
        for number, record in enumerate(test_of):
            groups.setdefault(_group(task, record), []).append(number)
        for group, numbers in groups.items():
            known = [r for r in train_of if _group(task, r) == group]
            known = known or [r for r in train_of if r.language == group[0]] or train_of
            gold = indicator(task, [record.gold for record in known])
            predictions["majority"][numbers, gold.sum(0).argmax()] = True
            texts, unseen = [record.post for record in known], [test_of[number].post for number in numbers]
            predictions["tfidf_logreg"][numbers] = tfidf_logreg(task.arity, group[0], texts, gold, unseen)
        result[name] = test_of, predictions
    return result


def floors(train: Sequence[Record], test: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """What any system should beat, for every task of ``test``, scored as ``evaluate`` scores a model: task name to
    {"majority": scores, "tfidf_logreg": scores}. Raises: InputError as ``floor_predictions``."""
    return {name: floor_scores(name, *found) for name, found in floor_predictions(train, test).items()}


def floor_scores(name: str, test: Sequence[Record], predictions: Predictions) -> dict[str, dict[str, Any]]:
    """Of each floor the scores of ``task_scores``, ``ci95`` of the weighted F1 and ``ci95_by_metric``."""
    task = tasks.get_task(name)
    gold, posts = indicator(task, [record.gold for record in test]), [record.post for record in test]
    result = {}
    for floor, said in predictions.items():
        intervals = bootstrap(task.arity, posts, gold, said, positive=positive_place(task))
        result[floor] = task_scores(task, gold, said) | {"ci95": intervals["weighted_f1"], "ci95_by_metric": intervals}
    return result


def _group(task: tasks.Task, record: Record) -> tuple[str, str]:
    return record.language, record.question if task.variants.get(record.language) else ""


def tfidf_logreg(
    kind: str, language: str, texts: list[str], gold: Bool[np.ndarray, "N C"], unseen: list[str], tune: bool = True
) -> Bool[np.ndarray, "M C"]:
    """Labels of ``unseen`` texts by logistic regression learned from ``texts``; see ``floors``.

    Args:
        kind: "single" or "multi".
        tune: choose C and threshold by cross-validation; otherwise they are 4 and 0.5.
    """
    best, (cost, threshold) = -1.0, (4.0, 0.5)
    folds = min(3, len(texts)) if tune else 1
    if folds > 1:
        fold_of = np.random.default_rng(0).permutation(np.arange(len(texts)) % folds)
        costs = (1.0, 4.0, 16.0)
        scores = {c: np.zeros(gold.shape) for c in costs}
        for fold in range(folds):
            inside, outside = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            seen, held_out = _features(language, [texts[i] for i in inside], [texts[i] for i in outside])
            for c in costs:
                scores[c][outside] = _probabilities(seen, gold[inside], held_out, c)
        for c in costs:
            for cut in np.arange(0.1, 0.7, 0.05) if kind == "multi" else (0.5,):
                guess = _decide(kind, scores[c], cut)
                scores_of = averages(kind, (gold & guess).sum(0), guess.sum(0), gold.sum(0))
                value = float(scores_of["weighted_f1" if kind == "single" else "micro_f1"])
                if value > best:
                    best, (cost, threshold) = value, (c, float(cut))
    seen, new = _features(language, texts, unseen)
    return _decide(kind, _probabilities(seen, gold, new, cost), threshold)


def _features(language: str, texts: list[str], unseen: list[str]) -> tuple[Any, Any]:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizers = [TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)]
    if language == "en":
        vectorizers.append(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"))
    pairs = [(v.fit_transform(texts), v.transform(unseen)) for v in vectorizers]
    seen, new = zip(*pairs, strict=True)
    return hstack(seen).tocsr(), hstack(new).tocsr()


def _probabilities(seen: Any, gold: Bool[np.ndarray, "N C"], new: Any, cost: float) -> Float[np.ndarray, "M C"]:
    from sklearn.linear_model import LogisticRegression

    result = np.zeros((new.shape[0], gold.shape[1]))
    for column, present in enumerate(gold.T):
        if present.all() or not present.any():
            result[:, column] = present[0]
        else:
            model = LogisticRegression(C=cost, solver="liblinear", random_state=0).fit(seen, present)
            result[:, column] = model.predict_proba(new)[:, 1]
    return result


def _decide(kind: str, probabilities: Float[np.ndarray, "N C"], threshold: float) -> Bool[np.ndarray, "N C"]:
    """The most probable label; for multi-label tasks also all others from ``threshold`` on (every post has a label)."""
    best = probabilities.argmax(axis=1)[:, None] == np.arange(probabilities.shape[1])
    return best if kind == "single" else best | (probabilities >= threshold)
