"""``evaluate`` and ``compare``: from rows of answers to everything that is reported about them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import THRESHOLD, Answer, by_task, expected_records, generated, scored
from mentalglm_jax.evaluate.explanations import explanation_scores, reference_overlap
from mentalglm_jax.evaluate.metrics import confusion, indicator, per_class, positive_place, task_scores
from mentalglm_jax.evaluate.published import data_set
from mentalglm_jax.evaluate.readings import calibration
from mentalglm_jax.evaluate.statistics import DRAWS, bootstrap, holm, mcnemar, paired_bootstrap
from mentalglm_jax.text import tasks

Rows = Iterable[Mapping[str, Any]]


def evaluate(
    rows: Rows,
    records: Iterable[Record] | None = None,
    *,
    label_scores: Rows = (),
    threshold: float = THRESHOLD,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores per task, ready for JSON.

    F1 per class is 2 TP / (predicted + gold), 0 where both are 0. ``weighted_f1`` weights classes by gold count;
    ``macro_f1`` averages the classes that occur in gold (so that every system is averaged over the same ones);
    ``micro_f1`` pools: for single-label tasks it is the accuracy, an unread answer counting as one wrong prediction;
    for multi-label tasks an unread answer predicts nothing. ``ci95`` is the percentile bootstrap interval of
    ``weighted_f1`` over posts (Efron 1979): all rows of one post are drawn together.

    Args:
        rows: rows of ``generations.jsonl``, any tasks and languages: the parsed text reading.
        records: what should have been answered; records without a row then count as wrong, in both readings. Default:
            those answered in either reading.
        label_scores: rows of ``label_scores.jsonl``: the label log-probability reading.
        threshold: of that reading, see ``answers.scored``.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        Task name to: n; weighted_f1, micro_f1, macro_f1; accuracy (single) or exact_match and samples_f1 (multi);
        positive_class, positive_f1 (of tasks that have such a class); levels (a hierarchy: micro scores of parents,
        children, both); mae, within_one, quadratic_weighted_kappa (ordered levels, ``metrics.ordinal``);
        ci95, ci95_by_metric; parse_failure_rate, parse_status (counts); per_class; confusion; by_language; explanation
        (``explanation_scores``, and ``overlap`` with reference explanations); cut_off (answers that the token limit
        ended, by their ``finish``); data_set (``published.data_set``); floors (empty: see ``floors``). All of these
        are the parsed text reading's. ``label_reading`` has the same scores without explanation and floors, and
        ``calibration``, of the label log-probabilities, ``calibrated``, the same with the rows' temperature (None
        where they say none), and the number of labels scored ``after_explanation``; None without them. Without any
        row of ``generations.jsonl`` n = 0 and there are no parsed text scores.

    Raises:
        InputError: a row is not of the format, has an unknown label, or an id occurs twice or is not asked for.
    """
    rows, label_scores = list(rows), list(label_scores)
    cut = Counter(row["task"] for row in rows if row.get("finish") == "length")
    texts, values = [generated(row) for row in rows], [scored(row, threshold) for row in label_scores]
    records = expected_records(texts, values) if records is None else list(records)
    by_text = by_task(texts, records if texts else None)
    by_value = by_task(values, records if values else None)
    explained = Counter(row["task"] for row in label_scores if row.get("answer_order") == "explanation_first")
    result = {}
    for name in (name for name in tasks.TASKS if name in by_text or name in by_value):
        entry: dict[str, Any] = {"n": 0}
        if name in by_text:
            entry = _scores(tasks.get_task(name), by_text[name], draws, seed)
            overlap = reference_overlap(by_text[name])
            entry["cut_off"] = cut[name]
            entry["explanation"] = {**explanation_scores(by_text[name]), "overlap": overlap}
        entry["data_set"] = data_set(name, records)
        entry["floors"] = {}
        entry["label_reading"] = None
        if name in by_value:
            entry["label_reading"] = _scores(tasks.get_task(name), by_value[name], draws, seed)
            entry["label_reading"]["calibration"] = calibration(tasks.get_task(name), by_value[name])
            after = calibration(tasks.get_task(name), by_value[name], calibrated=True)
            entry["label_reading"]["calibrated"] = after if after["n"] else None
            entry["label_reading"]["after_explanation"] = explained[name]
        result[name] = entry
    return result


def against_floor(
    answers: Sequence[Answer], test: Sequence[Record], floor: Bool[np.ndarray, "N C"], *, draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One reading of a task minus a floor that answered the same records: ``metrics`` and ``mcnemar`` as ``compare``.

    Args:
        answers: of one task.
        test: the records the floor answered, in the order of the rows of ``floor`` (``floor_predictions``).
    """
    task, place = tasks.get_task(answers[0].record.task), {record.id: row for row, record in enumerate(test)}
    gold, predicted = _sides(task, answers)
    other = floor[[place[answer.record.id] for answer in answers]]
    posts = [answer.record.post for answer in answers]
    return {
        "metrics": paired_bootstrap(task.arity, posts, gold, predicted, other, draws, seed, positive_place(task)),
        "mcnemar": mcnemar((gold == predicted).all(axis=1), (gold == other).all(axis=1), posts),
    }


def _sides(task: tasks.Task, answers: Sequence[Answer]) -> tuple[Bool[np.ndarray, "N C"], Bool[np.ndarray, "N C"]]:
    """Gold and predicted labels of the same rows."""
    return indicator(task, [a.record.gold for a in answers]), indicator(task, [a.labels for a in answers])


def _scores(task: tasks.Task, answers: list[Answer], draws: int, seed: int) -> dict[str, Any]:
    gold, predicted = _sides(task, answers)
    posts = [a.record.post for a in answers]
    intervals = bootstrap(task.arity, posts, gold, predicted, draws, seed, positive_place(task))
    languages = [answer.record.language for answer in answers]

    def rates(chosen: Bool[np.ndarray, " N"]) -> dict[str, Any]:
        failed = [a.labels is None for a, used in zip(answers, chosen, strict=True) if used]
        return task_scores(task, gold[chosen], predicted[chosen]) | {"parse_failure_rate": sum(failed) / len(failed)}

    return {
        **rates(np.ones(len(answers), bool)),
        "ci95": intervals["weighted_f1"],
        "ci95_by_metric": intervals,
        "parse_status": dict(Counter(answer.status for answer in answers)),
        "per_class": per_class(task, gold, predicted),
        "confusion": confusion(task, gold, predicted),
        "by_language": {lang: rates(np.asarray([x == lang for x in languages])) for lang in sorted(set(languages))},
    }


def compare(
    first: tuple[Rows, Rows], second: tuple[Rows, Rows], *, threshold: float = THRESHOLD, draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Two systems on the same records: differences with intervals and tests, per task and reading.

    Args:
        first, second: each (rows of ``generations.jsonl``, rows of ``label_scores.jsonl``), either may be empty; what
            is in one of the two only is a wrong answer in the other.
        threshold: of the label log-probability reading.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        Task to reading ("text", "label") to n, ``metrics`` (``paired_bootstrap``, first minus second) and ``mcnemar``
        on answers that are exactly right; each ``p_holm`` beside a ``p`` is corrected over all tests of the same kind
        and metric in the result (tasks and readings).

    Raises:
        InputError: the two do not answer the same records, gold labels differ, or nothing is there for both.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    systems: list[list[dict[str, list[Answer]]]] = []
    for rows, label_scores in (first, second):
        answered = [generated(row) for row in rows], [scored(row, threshold) for row in label_scores]
        expected = expected_records(*answered)
        systems.append([by_task(answers, expected if answers else None) for answers in answered])
    for reading, *sides in zip(("text", "label"), *systems, strict=True):
        for name in (name for name in tasks.TASKS if name in sides[0] and name in sides[1]):
            task, (left, right) = tasks.get_task(name), aligned(sides[0][name], sides[1][name])
            gold, predicted = _sides(task, left)
            other = indicator(task, [a.labels for a in right])
            posts, positive = [a.record.post for a in left], positive_place(task)
            found.setdefault(name, {})[reading] = {
                "n": len(left),
                "metrics": paired_bootstrap(task.arity, posts, gold, predicted, other, draws, seed, positive),
                "mcnemar": mcnemar((gold == predicted).all(axis=1), (gold == other).all(axis=1), posts),
            }
    if not found:
        raise InputError("nothing to compare: the two runs share no task in the same reading")
    entries = [entry for readings in found.values() for entry in readings.values()]
    names = list(dict.fromkeys(name for e in entries for name in e["metrics"]))
    by_metric = [[e["metrics"][name] for e in entries if name in e["metrics"]] for name in names]
    for tests in ([e["mcnemar"] for e in entries], *by_metric):
        for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = adjusted
    return found


def aligned(first: list[Answer], second: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Both in the order of ``first``. Raises: InputError unless they answer the same records with the same gold."""
    others = {a.record.id: a for a in second}
    mine = {a.record.id for a in first}
    for here, there, where in ((mine, others.keys(), "second"), (others.keys(), mine, "first")):
        if missing := sorted(set(here) - set(there)):
            raise InputError(
                f"record {missing[0]!r} ({len(missing)} in all) has no row in the {where} run; "
                "compare runs on the same records"
            )
    pairs = [(a, others[a.record.id]) for a in first]
    for a, b in pairs:
        if (a.record.gold, a.record.post) != (b.record.gold, b.record.post):
            raise InputError(f"record {a.record.id!r}: post or gold label differ between the two runs")
    return first, [b for _, b in pairs]
