"""The label log-probability reading: decisions, calibration by hand, and the way from a model to a score."""

import json
import math
import random
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import evaluate, read_label_scores, score_records
from mentalglm_jax.evaluate.answers import Answer, scored
from mentalglm_jax.evaluate.readings import calibration
from mentalglm_jax.inference.generate import explanation_ids, label_ids
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer, train_bpe


def scored_row(number: int, task: str, gold, p: dict[str, float], language="zh", shift=-7.0) -> dict:
    """A row whose label probabilities are ``p`` (others share what is left); log-probabilities are shifted alike."""
    kind, keys = tasks.TASKS[task].arity, tasks.TASKS[task].keys
    rest = max((1 - sum(p.values())) / max(1, len(keys) - len(p)), 1e-30)
    record = Record(f"r{number}", task, language, f"post {number}", tasks.TASKS[task].question(language),
                    label=gold if kind == "single" else None,
                    labels=None if kind == "single" else tuple(gold))  # fmt: skip
    return record.to_dict() | {"label_logprobs": {key: math.log(p.get(key, rest)) + shift for key in keys}}


def test_decisions():
    answer = scored(scored_row(0, "suicide_risk", "high", {"high": 0.2, "low": 0.8}))
    assert answer.labels == ("low",)
    assert answer.probabilities == pytest.approx((0.2, 0.8))
    row = scored_row(
        0, "cognitive_distortion", ["labeling"], {"labeling": 0.5, "mental_filter": 0.3, "magnification": 0.1}
    )
    assert scored(row).labels == ("mental_filter", "labeling")  # in label-table order
    assert scored(row, threshold=0.31).labels == ("labeling",)
    assert scored(row, threshold=0.1).labels == ("mental_filter", "magnification", "labeling")


def test_calibration_by_hand():
    task = tasks.TASKS["suicide_risk"]
    rows = [("high", 0.95), ("high", 0.92), ("low", 0.91), ("low", 0.4), ("high", 0.3), ("low", 0.05)]
    answers = [scored(scored_row(i, "suicide_risk", g, {"high": p, "low": 1 - p})) for i, (g, p) in enumerate(rows)]
    found = calibration(task, answers)
    # Confidence of the answer: .95 .92 .91 (one wrong), .6 right, .7 wrong, .95 right.
    bins = {round(b["low"], 1): (b["n"], b["confidence"], b["accuracy"]) for b in found["reliability"]}
    assert bins == {0.6: pytest.approx((1, 0.6, 1)), 0.7: pytest.approx((1, 0.7, 0)),
                    0.9: pytest.approx((4, 0.9325, 0.75))}  # fmt: skip
    assert found["ece"] == pytest.approx((0.4 + 0.7 + 4 * 0.1825) / 6)
    assert found["brier"] == pytest.approx(2 * sum((p - (g == "high")) ** 2 for g, p in rows) / 6)
    assert found["auroc"] == pytest.approx(7 / 9)  # of 9 pairs (high, low), .95 and .92 win 3 each, .3 wins 1
    assert found["n"] == 6


def test_calibration_of_several_labels():
    task = tasks.TASKS["cognitive_distortion"]
    rows = [
        scored_row(0, task.name, ["labeling"], {"labeling": 0.6, "mental_filter": 0.4}),
        scored_row(1, task.name, ["mental_filter"], {"labeling": 0.3, "mental_filter": 0.7}),
    ]
    found = calibration(task, [scored(row) for row in rows])
    assert found["auroc"] == found["auroc_by_class"]["labeling"] == found["auroc_by_class"]["mental_filter"] == 1.0
    assert found["auroc_by_class"]["magnification"] is None
    assert found["brier"] == pytest.approx((0.4**2 + 0.4**2 + 0.3**2 + 0.3**2) / 24)
    assert sum(b["n"] for b in found["reliability"]) == 24
    json.dumps(found, allow_nan=False)


def drawn(confidence: list[float], rng: random.Random) -> list[Answer]:
    """Answers whose posts are "high" as often as they say, in the form that ``scored`` gives them."""
    of = {gold: scored(scored_row(0, "suicide_risk", gold, {"high": 0.5, "low": 0.5})) for gold in ("high", "low")}
    return [replace(of["high" if rng.random() < p else "low"], probabilities=(p, 1 - p)) for p in confidence]


def test_perfectly_calibrated_answers_have_little_error():
    rng = random.Random(0)
    answers = drawn([rng.random() for _ in range(4000)], rng)
    assert calibration(tasks.TASKS["suicide_risk"], answers)["ece"] < 0.02
    sure = [replace(answer, probabilities=(0.99, 0.01)) for answer in answers]
    assert calibration(tasks.TASKS["suicide_risk"], sure)["ece"] > 0.4


@pytest.mark.parametrize("size", [40, 400])
def test_few_answers_look_badly_calibrated(size: int) -> None:
    """``ece_if_right`` is the mean error of labels that are drawn by the very probabilities."""
    rng, task, errors, said = random.Random(1), tasks.TASKS["suicide_risk"], [], []
    for _ in range(60):
        found = calibration(task, drawn([rng.uniform(0.5, 1) for _ in range(size)], rng))
        errors.append(found["ece"])
        said.append(found["ece_if_right"])
    assert sum(said) / 60 == pytest.approx(sum(errors) / 60, rel=0.1) and sum(errors) / 60 > 0.6 / size**0.5
    assert calibration(task, [])["ece_if_right"] is None


def test_both_readings_stand_side_by_side():
    gold = ["high", "low", "high", "low"]
    values = [scored_row(i, "suicide_risk", g, {"high": 0.9, "low": 0.1}) for i, g in enumerate(gold)]
    texts = [{k: v for k, v in row.items() if k != "label_logprobs"} | {"parsed_label": row["label"]} for row in values]
    entry = evaluate(texts, label_scores=values, draws=5)["suicide_risk"]
    assert (entry["accuracy"], entry["label_reading"]["accuracy"], entry["label_reading"]["n"]) == (1.0, 0.5, 4)
    assert entry["label_reading"]["calibration"]["ece"] == pytest.approx(0.4)
    alone = evaluate([], label_scores=values, draws=5)["suicide_risk"]
    assert (alone["n"], alone["label_reading"]) == (0, entry["label_reading"])
    records = [Record.from_dict(row, allow_extra=True) for row in values]
    short = evaluate([], records, label_scores=values[:2], draws=5)["suicide_risk"]["label_reading"]
    assert (short["n"], short["accuracy"], short["parse_failure_rate"]) == (4, 0.25, 0.5)  # what is missing is wrong
    with pytest.raises(InputError, match="answered twice"):
        evaluate([], label_scores=[values[0], values[0]])


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "must have one number for each of high, low"),
        ({"high": -1.0}, "must have one number for each"),
        ({"high": -1.0, "low": float("nan")}, "NaN is not a number in JSON"),
        ({"high": "-1", "low": -2.0}, "not a finite number"),
    ],
)
def test_damaged_label_scores_are_named(tmp_path, logprobs, message):
    good = scored_row(0, "suicide_risk", "high", {"high": 0.9, "low": 0.1})
    path = tmp_path / "label_scores.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | {'label_logprobs': logprobs})}\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"label_scores.jsonl:2: (record 'r0'.*|not JSON .){message}"):
        read_label_scores(path)


@pytest.fixture(scope="module")
def tokenizer():
    return GlmTokenizer.load(BUILTIN)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4)  # fmt: skip
    return Glm(config, rngs=nnx.Rngs(0))


def whole_logprob(model, prompt, said):
    """Log-probability of ``said`` after ``prompt`` from one pass over both."""
    logits = np.asarray(model(jnp.asarray([[*prompt, *said]])), np.float64)[0]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(said))


def test_a_model_that_explains_first_is_scored_after_its_own_explanation(tmp_path, model, tokenizer):
    """The ids scored are those of the answer as it is trained, cut where its label begins."""
    task = tasks.TASKS["suicide_risk"]
    records = [Record(f"r{i}", task.name, "zh", "睡不着。", task.question("zh"), label="high") for i in range(3)]
    texts = [task.sentence(["low"], "zh"), tasks.answer(task, ["low"], "她写“睡不着”。", "zh", "explanation_first"),
             "推理：写到一半就"]  # fmt: skip
    written = [r.to_dict() | {"output_text": text, "parsed_explanation": tasks.parse(task, "zh", text).explanation}
               for r, text in zip(records, texts, strict=True)]  # fmt: skip
    rows = score_records(model, tokenizer, records, written=written)
    assert [row["answer_order"] for row in rows] == ["label_first", "explanation_first", "explanation_first"]
    assert rows[0]["label_logprobs"] == score_records(model, tokenizer, records[:1])[0]["label_logprobs"]
    prompt = tokenizer.prompt_ids(records[1].prompt)
    for row, reason in zip(rows[1:], ("她写“睡不着”。", "写到一半就"), strict=True):
        for key in task.keys:
            whole = tokenizer.encode("\n" + tasks.answer(task, [key], reason, "zh", "explanation_first"))
            context = tokenizer.encode("\n推理：" + reason + " 回答")
            assert whole[: len(context)] == context
            expected = whole_logprob(model, [*prompt, *context], whole[len(context) :])
            assert row["label_logprobs"][key] == pytest.approx(expected, abs=1e-3)
    entry = evaluate([], label_scores=rows, draws=2)["suicide_risk"]
    assert entry["label_reading"]["after_explanation"] == 2
    with pytest.raises(InputError, match="'r2': no answer to score the label after"):
        score_records(model, tokenizer, records, written=written[:2])


@pytest.mark.parametrize("size", [None, 700])
def test_explanation_and_label_are_tokenised_as_in_the_answer(tokenizer, size):
    """For every label of every task: what is scored is a split of what is trained."""
    texts = [tasks.answer(task, [key], "so 3 “x”。", language, "explanation_first")
             for task in tasks.TASKS.values() for language in task.languages for key in task.keys]  # fmt: skip
    chosen = tokenizer if size is None else train_bpe(texts * 3, size)
    for task in tasks.TASKS.values():
        for language in task.languages:
            labels = label_ids(chosen, task, language, "explanation_first")
            for reason in ("so 3 “x”。", "因为 7", "ends without a stop"):
                before = explanation_ids(chosen, task, reason, language)
                for key, ids in labels.items():
                    said = tasks.answer(task, [key], reason, language, "explanation_first")
                    assert before + ids == chosen.encode("\n" + said)


@pytest.mark.parametrize("order", ["label_first", "explanation_first"])
@pytest.mark.parametrize("end", ["", " here", "."])
def test_a_sentence_that_is_how_another_begins_is_refused(tokenizer, order, end):
    """Whatever the model, its probability is a factor of the other's."""
    labels = {key: {} for key in ("calm", "sad", "sad and tired")}
    task = tasks.task_of("mood", {"kind": "single", "question": {"en": "Which mood?"}, "labels": labels,
                                  "sentence": {"en": "Mood: {}" + end}}, "a test")  # fmt: skip
    if end:
        assert list(label_ids(tokenizer, task, "en", order)) == list(labels)
        return
    with pytest.raises(InputError, match=r"task mood, language en: .*'Mood: sad' is how 'Mood: sad and tired' begins, "
                                         r"so label 'sad and tired' .*; end the sentences"):  # fmt: skip
        label_ids(tokenizer, task, "en", order)


def test_label_log_probabilities_are_the_models_own(tmp_path, model, tokenizer):
    records = [
        Record(f"r{i}", "suicide_risk", language, post, tasks.TASKS["suicide_risk"].question(language), label="high")
        for i, (language, post) in enumerate((("en", "I can not sleep."), ("zh", "睡不着。"), ("en", "It rained.")))
    ]
    path, seen = tmp_path / "deep" / "label_scores.jsonl", []
    rows = score_records(
        model, tokenizer, records, out_path=path, progress=lambda done, total: seen.append((done, total))
    )
    assert read_label_scores(path) == rows
    assert [row["id"] for row in rows] == ["r0", "r1", "r2"]
    assert seen[-1] == (3, 3)
    row, sentence = rows[1], tasks.TASKS["suicide_risk"].sentence(["low"], "zh")
    prompt, said = tokenizer.prompt_ids(records[1].prompt), tokenizer.encode("\n" + sentence)
    assert row["label_logprobs"]["low"] == pytest.approx(whole_logprob(model, prompt, said), abs=1e-3)
    with pytest.raises(InputError, match="'r0' is given twice"):
        score_records(model, tokenizer, [records[0], records[0]])
