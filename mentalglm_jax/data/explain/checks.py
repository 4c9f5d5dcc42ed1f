"""Automatic quality control of a teacher's explanations: one pure function per check, so that every refusal has a name.

Row checks look at one answer, corpus checks (near duplicates, consistency) at all of them. A check says True where the
answer passes. None of them replaces a person's reading (``review.py``); each rather refuses too much.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline

from mentalglm_jax.data.contacts import find_contacts
from mentalglm_jax.data.explain.quotes import quotes_occur, without_quotes
from mentalglm_jax.data.near import near_duplicates
from mentalglm_jax.data.records import Record
from mentalglm_jax.text import tasks

FOLDS = 5
_SENTENCES = re.compile(r"[。！？!?；;\n]|\.\s")
_CJK = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffd\ufffe\uffff]")
# Says that the label was given. The criteria's own words ("乱贴标签", labeling) are taken out before.
_LEAK = {
    "zh": re.compile(r"标签|标注|给定|示例|例子中|提示(?:词|中)|专家(?:认为|判断|给出)|根据要求"),
    "en": re.compile(
        r"\b(?:(?:given|provided|gold|assigned|expert) label|label sentence|annotat\w+|as labell?ed|the label|"
        r"example \d|instructions?|prompt)\b",
        re.IGNORECASE,
    ),
}


@dataclass(frozen=True)
class Limits:
    """Bounds of the length check: characters for Chinese, words for English."""

    zh_characters: tuple[int, int] = (20, 400)
    en_words: tuple[int, int] = (10, 300)


@dataclass(frozen=True)
class Candidate:
    """A record with gold label, what the teacher said about it, and why the teacher stopped."""

    record: Record
    text: str
    finish: str = "stop"

    @functools.cached_property
    def parsed(self) -> tasks.Parsed:
        return tasks.parse(self.record.task, self.record.language, self.text)

    @property
    def explanation(self) -> str:
        """What stands behind the label sentence; empty if there is nothing."""
        return self.parsed.explanation or ""

    @property
    def label_words(self) -> tuple[str, ...]:
        """Names and sentences of the task's labels, and names with the words that follow them in the sentence ("high
        suicide risk"): the explainer's vocabulary, also in quotation marks."""
        task, language = tasks.get_task(self.record.task), self.record.language
        tail = task.templates.get(language, "").partition("{}")[2].rstrip("。.")
        names = [label.name(language) for label in task.labels]
        return (*names, *(name + tail for name in names if tail), *task.candidates(language).values())


def states_gold_label(candidate: Candidate, limits: Limits) -> bool:
    """The answer begins with a sentence of the label set, and it is the gold label's."""
    gold = tasks.get_task(candidate.record.task).ordered(candidate.record.gold)
    return candidate.parsed.labels == gold


def quotes_the_post(candidate: Candidate, limits: Limits) -> bool:
    """At least one quote, and every quote stands in the post (``quotes.py``)."""
    return quotes_occur(candidate.explanation, candidate.record.post, candidate.label_words)


def right_language(candidate: Candidate, limits: Limits) -> bool:
    """At least 80 % of the letters outside quotes are of the record's script."""
    own = without_quotes(candidate.explanation)
    chinese, latin = len(_CJK.findall(own)), len(_LATIN.findall(own))
    wanted = chinese if candidate.record.language == "zh" else latin
    return wanted > 0.8 * (chinese + latin)


def right_length(candidate: Candidate, limits: Limits) -> bool:
    """Within the limits, and not cut off by the token limit or a content filter."""
    text = candidate.explanation
    low, high = limits.zh_characters if candidate.record.language == "zh" else limits.en_words
    size = len(text) if candidate.record.language == "zh" else len(text.split())
    return low <= size <= high and candidate.finish not in ("length", "content_filter")


def no_contacts(candidate: Candidate, limits: Limits) -> bool:
    """No contact detail anywhere in the answer, quotes included."""
    return not find_contacts(candidate.text)


def no_method_advice(candidate: Candidate, limits: Limits) -> bool:
    """No sentence outside quotes both advises and names a means of self-harm, and none of the phrases that are always
    refused (``assets/unsafe.yaml``)."""
    words = _unsafe()[candidate.record.language]
    if words["always"].search(candidate.text):
        return False
    sentences = _SENTENCES.split(without_quotes(candidate.explanation))
    return not any(words["advice"].search(one) and words["means"].search(one) for one in sentences)


def no_label_leak(candidate: Candidate, limits: Limits) -> bool:
    """The explanation does not say that a label, an annotation, an example or an instruction was given."""
    text = without_quotes(candidate.explanation)
    for word in sorted(candidate.label_words, key=len, reverse=True):
        text = text.replace(word, " ")
    return not _LEAK[candidate.record.language].search(text)


def whole_characters(candidate: Candidate, limits: Limits) -> bool:
    """Outside quotes no character that was broken on its way (U+FFFD), no control character, none that turns the
    direction of the text."""
    return not _BROKEN.search(without_quotes(candidate.explanation))


ROW_CHECKS: dict[str, Callable[[Candidate, Limits], bool]] = {
    check.__name__: check
    for check in (states_gold_label, quotes_the_post, right_language, right_length, no_contacts, no_method_advice,
                  no_label_leak, whole_characters)
}  # fmt: skip
CORPUS_CHECKS = ("not_near_duplicate", "label_recoverable")
CHECKS = (*ROW_CHECKS, *CORPUS_CHECKS)


def checked_languages() -> tuple[str, ...]:
    """Those for which there are all checks."""
    return tuple(language for language in _unsafe() if language in _LEAK)


@functools.cache
def _unsafe() -> dict[str, dict[str, re.Pattern[str]]]:
    raw = yaml.safe_load((resources.files("mentalglm_jax") / "assets" / "unsafe.yaml").read_text(encoding="utf-8"))

    def pattern(language: str, words: Sequence[str]) -> re.Pattern[str]:
        edge = r"\b" if language == "en" else ""
        return re.compile("|".join(f"{edge}{re.escape(word)}{edge}" for word in words), re.IGNORECASE)

    return {
        language: {kind: pattern(language, words) for kind, words in kinds.items()} for language, kinds in raw.items()
    }


def not_near_duplicate(candidates: Sequence[Candidate], threshold: float) -> list[bool]:
    """False for each explanation whose own words (quotes left out) nearly repeat those of an earlier one of the same
    task that passes."""
    kept = [True] * len(candidates)
    by_task: dict[str, list[int]] = {}
    for number, candidate in enumerate(candidates):
        by_task.setdefault(candidate.record.task, []).append(number)
    for numbers in by_task.values():
        texts = [(without_quotes(candidates[n].explanation), candidates[n].record.language) for n in numbers]
        for number, earlier in zip(numbers, near_duplicates(texts, threshold), strict=True):
            kept[number] = earlier is None
    return kept


@dataclass(frozen=True)
class Consistency:
    """Explanation -> label on one task, cross-validated. ``f1`` is weighted; ``f1_masked`` with the label names
    taken out of the explanations, so that it is their argument that is read. ``agrees`` per candidate (masked);
    None where a class has too few explanations to hold one out."""

    n: int
    f1: float | None
    f1_masked: float | None
    agrees: tuple[bool | None, ...]


def consistency(candidates: Sequence[Candidate], seed: int) -> Consistency:
    """Trains TF-IDF (characters) and logistic regression on the explanations of one task and predicts each label from
    its explanation alone, by a model that has not seen it. The candidates must be of one task and language."""
    golds = [candidate.record.gold for candidate in candidates]
    plain = [candidate.explanation for candidate in candidates]
    masked = [_masked(candidate) for candidate in candidates]
    if len(candidates) < 2 * FOLDS or len({key for gold in golds for key in gold}) < 2:
        return Consistency(len(candidates), None, None, (None,) * len(candidates))
    single = tasks.get_task(candidates[0].record.task).arity == "single"
    score, _ = _cross_validated(plain, golds, single, seed)
    score_masked, agrees = _cross_validated(masked, golds, single, seed)
    return Consistency(len(candidates), score, score_masked, agrees)


def _masked(candidate: Candidate) -> str:
    text = candidate.explanation
    for word in sorted(candidate.label_words, key=len, reverse=True):
        text = re.sub(re.escape(word), " ", text, flags=re.IGNORECASE) if len(word) > 1 else text
    return text


def _cross_validated(
    texts: Sequence[str], golds: Sequence[tuple[str, ...]], single: bool, seed: int
) -> tuple[float, tuple[bool | None, ...]]:
    keys = sorted({key for gold in golds for key in gold})
    matrix = np.array([[key in gold for key in keys] for gold in golds], int)
    often = np.minimum(matrix.sum(0), len(golds) - matrix.sum(0)) >= FOLDS
    model: Any = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True),
        LogisticRegression(max_iter=1000, class_weight="balanced"),
    )
    if single:
        wanted: Any = matrix.argmax(1)
        folds: Any = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        keep = often[wanted]
        if len(set(wanted[keep])) < 2:
            return 0.0, (None,) * len(golds)
        rows = np.flatnonzero(keep).tolist()
        chosen: Any = [texts[row] for row in rows]  # sklearn's types know no texts
        guessed = cross_val_predict(model, chosen, wanted[rows], cv=folds)
        score = float(f1_score(wanted[rows], guessed, average="weighted"))
        right = dict(zip(rows, (guessed == wanted[rows]).tolist(), strict=True))
        return score, tuple(right.get(row) for row in range(len(golds)))
    wanted = matrix[:, often]
    if not wanted.shape[1]:
        return 0.0, (None,) * len(golds)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(model.steps[0][1], OneVsRestClassifier(model.steps[1][1]))
    every: Any = texts
    guessed = cross_val_predict(model, every, wanted, cv=folds)
    score = float(f1_score(wanted, guessed, average="weighted", zero_division=0))
    # Of several labels one recovered is agreement: the explanation argues for what it says.
    agrees = [bool((g & w).any()) if w.any() else None for g, w in zip(guessed, wanted, strict=True)]
    return score, tuple(agrees)
