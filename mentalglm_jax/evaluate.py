"""Scores of generated answers: task metrics with confidence intervals, baselines to beat, cheap checks of explanations.

Works on rows of ``generations.jsonl``. Gold label and answer stand in one row and rows are told apart by id, so the two
can never lose alignment; an answer that could not be read, or is not there, is a wrong answer, never a dropped one.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.table import Table

from mentalglm_jax import tasks
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError

METRICS = ("weighted_f1", "micro_f1", "macro_f1")
DRAWS = 1000
# What explanations put between quotation marks; ASCII apostrophes are no quotes ("don't ... can't").
_QUOTE = re.compile(r'"([^"]+)"|“([^”]+)”|‘([^’]+)’|「([^」]+)」|『([^』]+)』')
_EDGE = " \t\n,.;:!?，。；：！？、…"


@dataclass(frozen=True)
class Answer:
    """One row as far as scores need it. ``labels`` is None when the answer could not be read or is missing."""

    record: Record
    labels: tuple[str, ...] | None
    explanation: str | None
    status: str


def read_generations(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``generations.jsonl``; blank lines are skipped.

    Raises:
        InputError: the file is missing, not UTF-8, empty, or a line is not a row; the message names file and line.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); is this a generations.jsonl?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror}); make it with `mentalglm generate`") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(f"expected a JSON object, got {type(row).__name__}")
            _answer(row)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); delete the line"
            ) from None
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no row; make it with `mentalglm generate`")
    return rows


def _answer(row: Mapping[str, Any]) -> Answer:
    record = Record.from_dict(row, allow_extra=True)
    if "parsed_label" not in row:
        raise InputError(
            f"record {record.id!r}: field 'parsed_label' is missing; make the file with `mentalglm generate`"
        )
    label, task = row["parsed_label"], tasks.get_task(record.task)
    if label is not None and not isinstance(label, str if task.kind == "single" else list):
        wanted = "one label or null" if task.kind == "single" else "a list of labels or null"
        raise InputError(f"record {record.id!r}: parsed_label {label!r} is not {wanted}")
    try:
        labels = None if label is None else task.ordered([label] if isinstance(label, str) else label)
    except InputError as error:
        raise InputError(f"record {record.id!r}: parsed_label: {error}") from None
    return Answer(record, labels, row.get("parsed_explanation"), str(row.get("parse_status", "")))


def _answers(rows: Iterable[Mapping[str, Any]], records: Iterable[Record] | None) -> dict[str, list[Answer]]:
    """Answers by task, one per record: ids met twice or not asked for are refused, records without row are failures."""
    found: dict[str, Answer] = {}
    for row in rows:
        answer = _answer(row)
        if answer.record.id in found:
            raise InputError(f"record {answer.record.id!r} is answered twice; ids must differ")
        found[answer.record.id] = answer
    if records is not None:
        expected: dict[str, Record] = {}
        for record in records:
            if expected.setdefault(record.id, record) is not record:
                raise InputError(f"record {record.id!r} is given twice; ids must differ")
        if extra := [i for i in found if i not in expected]:
            raise InputError(f"record {extra[0]!r} is answered but not among the records to evaluate on")
        found = {
            i: Answer(record, found[i].labels, found[i].explanation, found[i].status)
            if i in found
            else Answer(record, None, None, "missing")
            for i, record in expected.items()
        }
    by_task: dict[str, list[Answer]] = {}
    for answer in found.values():
        by_task.setdefault(answer.record.task, []).append(answer)
    return {name: by_task[name] for name in tasks.TASKS if name in by_task}


def evaluate(
    rows: Iterable[Mapping[str, Any]],
    records: Iterable[Record] | None = None,
    *,
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
        rows: rows of ``generations.jsonl``, any tasks and languages.
        records: what should have been answered; records without a row then count as wrong. Default: the rows' own.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        Task name to: n; weighted_f1, micro_f1, macro_f1; accuracy (single) or exact_match and samples_f1 (multi);
        positive_class, positive_f1 (suicide risk, yes/no); levels (pathways: micro scores of parents, children, both);
        ci95, ci95_by_metric; parse_failure_rate, parse_status (counts); per_class; by_language; explanation
        (``explanation_scores``); floors (empty: see ``floors``).

    Raises:
        InputError: a row is not of the format, has an unknown label, or an id occurs twice or is not asked for.
    """
    return {name: _evaluate_task(name, answers, draws, seed) for name, answers in _answers(rows, records).items()}


def _evaluate_task(name: str, answers: list[Answer], draws: int, seed: int) -> dict[str, Any]:
    task = tasks.get_task(name)
    gold, predicted = (
        _indicator(task, labels) for labels in ([a.record.gold for a in answers], [a.labels for a in answers])
    )
    intervals = _bootstrap(task.kind, [a.record.post for a in answers], gold, predicted, draws, seed)
    languages = [answer.record.language for answer in answers]

    def rates(chosen: Bool[np.ndarray, " N"]) -> dict[str, Any]:
        failed = [a.labels is None for a, used in zip(answers, chosen, strict=True) if used]
        return task_scores(task, gold[chosen], predicted[chosen]) | {"parse_failure_rate": sum(failed) / len(failed)}

    return {
        **rates(np.ones(len(answers), bool)),
        "ci95": intervals["weighted_f1"],
        "ci95_by_metric": intervals,
        "parse_status": dict(Counter(answer.status for answer in answers)),
        "per_class": _per_class(task, gold, predicted),
        "by_language": {lang: rates(np.asarray([x == lang for x in languages])) for lang in sorted(set(languages))},
        "explanation": explanation_scores(answers),
        "floors": {},
    }


def _indicator(task: tasks.Task, labels: Sequence[Sequence[str] | None]) -> Bool[np.ndarray, "N C"]:
    """Row i is True for the labels of answer i; all False for None."""
    return np.asarray([[key in (row or ()) for key in task.keys] for row in labels], bool).reshape(-1, len(task.keys))


def task_scores(task: tasks.Task, gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"]) -> dict[str, Any]:
    """n and the scores of ``evaluate`` that are one number for all classes; the same for a model and for a baseline."""
    hits = gold & predicted
    scores: dict[str, Any] = {"n": len(gold)}
    scores |= {k: float(v) for k, v in _averages(task.kind, hits.sum(0), predicted.sum(0), gold.sum(0)).items()}
    exact = float((gold == predicted).all(axis=1).mean())
    if task.kind == "single":
        scores["accuracy"] = exact
    else:
        scores["exact_match"] = exact
        scores["samples_f1"] = float(_f1(hits.sum(1), predicted.sum(1), gold.sum(1)).mean())
    positive = {"suicide_risk": "high"}.get(task.name, "yes" if task.keys == ("yes", "no") else None)
    if positive is not None:
        of_class = task.keys.index(positive)
        scores["positive_class"] = positive
        scores["positive_f1"] = float(_f1(hits.sum(0), predicted.sum(0), gold.sum(0))[of_class])
    if any(label.parent for label in task.labels):
        scores["levels"] = _levels(task, gold, predicted)
    return scores


def _f1(hits: Any, predicted: Any, gold: Any) -> Float[np.ndarray, "..."]:
    both = np.asarray(predicted + gold, float)
    return np.divide(2.0 * hits, both, out=np.zeros_like(both), where=both > 0)


def _averages(kind: str, hits: Any, predicted: Any, gold: Any) -> dict[str, Any]:
    """The averages over classes of counts ``[..., C]``."""
    f1, supported, total = _f1(hits, predicted, gold), gold > 0, gold.sum(-1)
    # A single-label row predicts exactly one class; the unread answers' class is not among the C.
    answered = total if kind == "single" else predicted.sum(-1)
    return {
        "weighted_f1": (f1 * gold).sum(-1) / total,
        "micro_f1": _f1(hits.sum(-1), answered, total),
        "macro_f1": (f1 * supported).sum(-1) / supported.sum(-1),
    }


def _per_class(
    task: tasks.Task, gold: Bool[np.ndarray, "N C"], predicted: Bool[np.ndarray, "N C"]
) -> dict[str, dict[str, float]]:
    counts = zip(task.keys, (gold & predicted).sum(0), predicted.sum(0), gold.sum(0), strict=True)
    return {
        key: {
            "precision": float(hits / said) if said else 0.0,
            "recall": float(hits / true) if true else 0.0,
            "f1": float(_f1(hits, said, true)),
            "support": int(true),
            "predicted": int(said),
        }
        for key, hits, said, true in counts
    }


def _levels(task: tasks.Task, gold: np.ndarray, predicted: np.ndarray) -> dict[str, dict[str, float]]:
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
            "f1": float(_f1(hits, said.sum(), true.sum())),
        }
    return {name: {key: float(value) for key, value in scores.items()} for name, scores in levels.items()}


def _bootstrap(
    kind: str, posts: Sequence[str], gold: np.ndarray, predicted: np.ndarray, draws: int, seed: int
) -> dict[str, list[float]]:
    """95 % percentile intervals of ``METRICS`` over resampled posts."""
    _, post_of = np.unique(np.asarray(posts, dtype=object), return_inverse=True)
    size = int(post_of.max()) + 1
    sums = np.zeros((size, 3, gold.shape[1]))
    np.add.at(sums, post_of, np.stack([gold & predicted, predicted, gold], axis=1))
    rng = np.random.default_rng(seed)
    parts = []
    step = max(1, 4_000_000 // size)  # bounds memory: draws at once * posts
    for start in range(0, draws, step):
        times = rng.multinomial(size, np.full(size, 1 / size), size=min(step, draws - start))
        hits, said, true = np.moveaxis(np.tensordot(times.astype(float), sums, axes=1), 1, 0)
        parts.append(_averages(kind, hits, said, true))
    values = {name: np.concatenate([part[name] for part in parts]) for name in METRICS}
    return {name: np.percentile(value, [2.5, 97.5]).tolist() for name, value in values.items()}


def quotes(explanation: str) -> list[str]:
    """What stands between quotation marks, without white space and punctuation at its ends."""
    found = (next(group for group in match.groups() if group) for match in _QUOTE.finditer(explanation))
    return [quote for text in found if (quote := text.strip(_EDGE))]


def explanation_scores(answers: Sequence[Answer]) -> dict[str, float | int | None]:
    """How explanations treat the post; None where there is nothing to count.

    Returns:
        n: answers that have an explanation, rate: their share of all answers.
        with_quote_rate: explanations that quote anything.
        quotes_verbatim_rate: quotes that occur word for word in the post.
        verbatim_rate: quoting explanations all of whose quotes do.
        cue_n: answers to posts whose cues are known; the rates below are over these, no explanation being a miss.
        cue_recall: distinct cue texts that the explanation contains.
        cue_citation_accuracy: answers that contain every cue text and no decoy text.
        decoy_rate: answers, of those to posts with decoys, that contain a decoy text.
    """
    explained = [(a.record.post, a.explanation) for a in answers if a.explanation is not None]
    verbatim = [[quote in post for quote in found] for post, text in explained if (found := quotes(text))]
    recalls, right, decoyed = [], [], []
    for answer in answers:
        if answer.record.cues:
            text = answer.explanation or ""
            cues, decoys = (
                {answer.record.post[start:end] for start, end in spans or ()}
                for spans in (answer.record.cues, answer.record.decoys)
            )
            cited, misled = [cue in text for cue in cues], [decoy in text for decoy in decoys - cues]
            recalls += cited
            right.append(all(cited) and not any(misled))
            decoyed += [any(misled)] if misled else []
    return {
        "n": len(explained),
        "rate": len(explained) / len(answers),
        "with_quote_rate": _mean([bool(quotes(text)) for _, text in explained]),
        "quotes_verbatim_rate": _mean([hit for hits in verbatim for hit in hits]),
        "verbatim_rate": _mean([all(hits) for hits in verbatim]),
        "cue_n": len(right),
        "cue_recall": _mean(recalls),
        "cue_citation_accuracy": _mean(right),
        "decoy_rate": _mean(decoyed),
    }


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def floors(train: Sequence[Record], test: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """What any system should beat, for every task of ``test``, scored as ``evaluate`` scores a model.

    ``majority`` always answers the most frequent training label. ``tfidf_logreg`` is logistic regression, one
    classifier per label, on TF-IDF n-grams (characters 1-3; for English also words 1-2), its C and, for multi-label
    tasks, its threshold chosen by cross-validation on ``train``. Each language, and each question where a task asks
    several about the same posts, has its own baseline when ``train`` has records for it.

    Returns:
        Task name to {"majority": scores, "tfidf_logreg": scores}, scores being those of ``task_scores``.

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
            gold = _indicator(task, [record.gold for record in known])
            predictions["majority"][numbers, gold.sum(0).argmax()] = True
            texts, unseen = [record.post for record in known], [test_of[number].post for number in numbers]
            predictions["tfidf_logreg"][numbers] = _tfidf_logreg(task.kind, group[0], texts, gold, unseen)
        gold = _indicator(task, [record.gold for record in test_of])
        result[name] = {floor: task_scores(task, gold, predicted) for floor, predicted in predictions.items()}
    return result


def _group(task: tasks.Task, record: Record) -> tuple[str, str]:
    return record.language, record.question if task.variants.get(record.language) else ""


def _tfidf_logreg(
    kind: str, language: str, texts: list[str], gold: Bool[np.ndarray, "N C"], unseen: list[str]
) -> Bool[np.ndarray, "M C"]:
    best, (cost, threshold) = -1.0, (4.0, 0.5)
    folds = min(3, len(texts))
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
                averages = _averages(kind, (gold & guess).sum(0), guess.sum(0), gold.sum(0))
                value = float(averages["weighted_f1" if kind == "single" else "micro_f1"])
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


def format_table(result: Mapping[str, Mapping[str, Any]]) -> Table:
    """``evaluate``'s result for people: a row per task, and per language where there are several, beside the floors."""
    table = Table(title="Evaluation", title_justify="left", show_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for entry in result.values() for name in entry["floors"]))
    table.add_column("task")
    for column in ("n", "weighted F1", "95 % CI", "micro F1", "macro F1", "unread", *names):
        table.add_column(column, justify="right")

    def add(title: str, scores: Mapping[str, Any], interval: str, beside: Sequence[str]) -> None:
        numbers = [f"{scores[metric]:.3f}" for metric in METRICS]
        unread = f"{scores['parse_failure_rate']:.1%}"
        table.add_row(title, str(scores["n"]), numbers[0], interval, *numbers[1:], unread, *beside)

    for task, entry in result.items():
        beside = [f"{entry['floors'][name]['weighted_f1']:.3f}" if name in entry["floors"] else "" for name in names]
        add(task, entry, "{:.3f}–{:.3f}".format(*entry["ci95"]), beside)
        for language, scores in entry["by_language"].items() if len(entry["by_language"]) > 1 else ():
            add(f"  {language}", scores, "", [""] * len(names))
    if names:
        table.caption = "floors: weighted F1"
    return table
