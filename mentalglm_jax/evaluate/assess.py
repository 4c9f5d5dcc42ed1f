"""Everything there is to say about one system's answers: scores, floors, explanations, and another system beside it."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.splits import bare_post
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer, by_task, expected_records, generated, scored
from mentalglm_jax.evaluate.bartscore import Bart, bart_score
from mentalglm_jax.evaluate.baselines import floor_predictions, floor_scores
from mentalglm_jax.evaluate.bertscore import Encoder, reference_bert_score
from mentalglm_jax.evaluate.explanations import consistency
from mentalglm_jax.evaluate.human import human_ratings
from mentalglm_jax.evaluate.inputs import Answers
from mentalglm_jax.evaluate.scores import against_floor, compare, evaluate
from mentalglm_jax.foreign import read_json


def assess(
    answers: Answers, records: Sequence[Record] | None = None, *, train: Sequence[Record] = (),
    against: Answers | None = None, encoder: Path | None = None, ratings: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:  # fmt: skip
    """Scores of ``answers``, and their comparison with ``against`` (None without it).

    Args:
        records: what should have been answered. Default: what is answered in either reading.
        train: training records: adds ``floors``, to each reading its difference from TF-IDF (``against_tfidf``), and
            to ``explanation`` its ``consistency``. Those whose post is evaluated are left out, with a warning.
        against: another system's answers to the same records.
        encoder: a BERT or BART directory: adds ``bert_score`` or ``bart_score`` to ``explanation``.
        ratings: a folder of `mentalglm data review`: adds ``human`` to ``explanation``.

    Returns:
        ``evaluate``'s result with these additions, and ``compare``'s.

    Raises:
        InputError: all training records of a task are left out; or as ``evaluate``, ``floor_predictions``, ``compare``,
            ``Encoder``, ``Bart`` and ``human_ratings``.
    """
    said_texts, said_values = list(map(generated, answers.generations)), list(map(scored, answers.label_scores))
    if records is None:
        records = expected_records(said_texts, said_values)
    result = evaluate(answers.generations, records, label_scores=answers.label_scores)
    texts = by_task(said_texts, records if said_texts else None)
    if train:
        train = _apart(train, records)
        values = by_task(said_values, records if said_values else None)
        for task, (asked, predictions) in floor_predictions(train, records).items():
            result[task]["floors"] = floor_scores(task, asked, predictions)
            for said, entry in ((texts, result[task]), (values, result[task]["label_reading"])):
                if task in said:
                    entry["against_tfidf"] = against_floor(said[task], asked, predictions["tfidf_logreg"])
        for task, said in texts.items():
            result[task]["explanation"]["consistency"] = consistency(said, train)
    if encoder is not None:
        name, score = _encoder_score(encoder)
        for task, said in texts.items():
            result[task]["explanation"][name] = score(said)
    if ratings is not None:
        for task, found in human_ratings(ratings, [answer for said in texts.values() for answer in said]).items():
            result[task]["explanation"]["human"] = found
    if against is None:
        return result, None
    return result, compare((answers.generations, answers.label_scores), (against.generations, against.label_scores))


def _apart(train: Sequence[Record], evaluated: Sequence[Record]) -> list[Record]:
    """The training records whose post is not evaluated for the same task: a floor that has seen the answers is none."""
    asked = {(record.task, bare_post(record.post)) for record in evaluated}
    kept = [record for record in train if (record.task, bare_post(record.post)) not in asked]
    if len(kept) < len(train):
        for task in {task for task, _ in asked} & {record.task for record in train}:
            if not any(record.task == task for record in kept):
                raise InputError(f"task {task}: all training records have posts that are evaluated, so nothing is left "
                                 "to fit baselines on; give other records to --train")  # fmt: skip
        warnings.warn(f"{len(train) - len(kept)} of {len(train)} training records have posts that are evaluated, and "
                      "are left out of the baselines", stacklevel=3)  # fmt: skip
    return kept


def _encoder_score(directory: Path) -> tuple[str, Callable[[Sequence[Answer]], Any]]:
    """The score that a directory's model gives: BERTScore, or BARTScore if its ``config.json`` says BART."""
    try:
        kind = read_json(directory / "config.json").get("model_type")
    except InputError:
        kind = None  # the encoder says what is wrong with the directory
    if kind == "bart":
        return "bart_score", functools.partial(bart_score, Bart(directory))
    return "bert_score", functools.partial(reference_bert_score, Encoder(directory))
