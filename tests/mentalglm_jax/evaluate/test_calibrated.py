"""Temperatures: fitted on development records, kept beside the weights, said wherever probabilities are."""

import csv
import json
import math

import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.data.posts import read_posts
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import evaluate
from mentalglm_jax.evaluate.answers import scored, softmax
from mentalglm_jax.evaluate.calibrated import (
    LEAST,
    Scaling,
    fit_scalings,
    read_scalings,
    scaling_for,
    scalings_of,
    write_scalings,
)
from mentalglm_jax.evaluate.development import fit_on_development
from mentalglm_jax.evaluate.posts import answer_posts
from mentalglm_jax.evaluate.readings import label_f1, score_records
from mentalglm_jax.evaluate.tables import format_table
from mentalglm_jax.inference.calibration import fit_pairs, log_odds
from mentalglm_jax.inference.generate import generation_row
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

TASK = tasks.TASKS["suicide_risk"]


def rows(count: int, temperature: float, seed: int, **more) -> list[dict]:
    """Scores of a model whose log-probabilities are ``temperature`` times too far apart for how often it is right."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        honest = rng.normal(0, 1.5, 2)
        label = TASK.keys[int(rng.random() < softmax(honest)[1])]
        record = Record(f"r{number}", TASK.name, "en", f"post {number} {seed}", TASK.question("en"), label)
        scores = dict(zip(TASK.keys, (temperature * honest - 9).tolist(), strict=True))
        found.append(record.to_dict() | {"label_logprobs": scores, "answer_order": "label_first"} | more)
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_temperature_undoes_over_and_under_confidence(temperature):
    found = fit_scalings(rows(2000, temperature, 0))[TASK.name]
    assert found["temperature"] == pytest.approx(temperature, rel=0.12) and found["records"] == 2000
    told = [row | {"temperature": found["temperature"]} for row in rows(2000, temperature, 1)]
    reading = evaluate([], label_scores=told, draws=10)[TASK.name]["label_reading"]
    before, after = reading["calibration"], reading["calibrated"]
    assert after["ece"] < 0.03 and after["auroc"] == pytest.approx(before["auroc"])
    if temperature != 1:
        assert before["ece"] > 2 * after["ece"] and after["brier"] < before["brier"]
    plain = evaluate([], label_scores=rows(2000, temperature, 1), draws=10)[TASK.name]["label_reading"]
    assert plain["calibrated"] is None and plain["calibration"] == before
    assert {key: value for key, value in plain.items() if key != "calibrated"} == {
        key: value for key, value in reading.items() if key != "calibrated"
    }  # no label is another


def test_the_table_says_before_and_after():
    told = [row | {"temperature": 4.0} for row in rows(200, 4.0, 1)]
    table = format_table(evaluate([], label_scores=told, draws=10))
    (column,) = (one for one in table.columns if one.header == "ECE")
    assert " → " in "".join(map(str, column._cells)) and "before → after" in str(table.caption)


def test_what_is_not_fitted():
    assert fit_scalings(rows(LEAST - 1, 2.0, 0)) == {}
    assert set(fit_scalings(rows(LEAST, 2.0, 0))) == {TASK.name}
    assert fit_scalings([]) == {}


def least_nll(given: list[dict]) -> float:
    """The temperature with the least negative log-likelihood of all, of a fine grid."""
    scores = np.asarray([[row["label_logprobs"][key] for key in TASK.keys] for row in given])
    truth = [TASK.keys.index(row["label"]) for row in given]
    gap = scores[np.arange(len(truth)), 1 - np.asarray(truth)] - scores[np.arange(len(truth)), truth]
    return min(np.geomspace(0.05, 50, 4000), key=lambda t: np.logaddexp(0, gap / t).sum())


def test_it_is_a_temperature_and_nothing_else():
    """A bias beside it would be fitted to these: one sentence is worth 3 nats more than the other without the post."""
    given = rows(60, 2.0, 0)
    for row in given:
        row["label_logprobs"][TASK.keys[0]] += 3.0
    found = fit_scalings(given)[TASK.name]
    assert found["temperature"] == pytest.approx(least_nll(given), rel=0.01)
    assert found == {"temperature": found["temperature"], "answer_order": "label_first", "records": 60}


SEVERAL = tasks.TASKS["cognitive_distortion"]


def pairs(count: int, temperature: float, bias: float, seed: int) -> list[dict]:
    """Scores whose log-odds, divided by ``temperature`` and moved by ``bias``, are those of each label being there."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        values = rng.normal(0, 2.0, len(SEVERAL.keys))
        chances = 1 / (1 + np.exp(-(log_odds(values[None])[0] / temperature + bias)))
        if labels := [key for key, p in zip(SEVERAL.keys, chances, strict=True) if rng.random() < p]:
            record = Record(f"r{len(found)}", SEVERAL.name, "zh", f"帖子 {len(found)} {seed}", SEVERAL.question("zh"),
                            labels=tuple(labels))  # fmt: skip
            scores = dict(zip(SEVERAL.keys, values.tolist(), strict=True))
            found.append(record.to_dict() | {"label_logprobs": scores, "answer_order": "label_first"})
    return found


def test_labels_that_do_not_exclude_each_other_are_calibrated_each_for_itself():
    found = fit_scalings(pairs(800, 3.0, 1.0, 0))[SEVERAL.name]
    assert found["temperature"] == pytest.approx(3.0, rel=0.15) and found["bias"] == pytest.approx(1.0, abs=0.15)
    said = {key: found[key] for key in ("temperature", "bias")}
    fresh = pairs(800, 3.0, 1.0, 1)
    plain, told = (evaluate([], label_scores=[row | more for row in fresh], draws=10)[SEVERAL.name]["label_reading"]
                   for more in ({}, said))  # fmt: skip
    before, after = told["calibration"], told["calibrated"]
    assert after["ece"] < 0.02 < before["ece"] and after["brier"] < before["brier"] and plain["calibrated"] is None
    assert told["micro_f1"] == plain["micro_f1"]  # no label is another
    p = scored(fresh[0] | said).calibrated
    assert sum(p) > 1.2 and np.argmax(p) == np.argmax(scored(fresh[0]).probabilities)


@pytest.mark.parametrize("present", [True, False])
def test_pairs_that_all_turn_out_alike_keep_a_finite_scaling(present):
    rng = np.random.default_rng(0)
    temperature, bias = fit_pairs(rng.normal(0, 1, (30, 3)), np.full((30, 3), present))
    assert np.isfinite(temperature) and (bias > 1 if present else bias < -1) and abs(bias) < 10
    with pytest.raises(InputError, match="no pair"):
        fit_pairs(np.zeros((0, 3)), np.zeros((0, 3), bool))


def test_labels_after_explanations_have_a_scaling_of_their_own():
    first = rows(30, 2.0, 0, answer_order="explanation_first")
    found = fit_scalings([*rows(25, 2.0, 1), *first])  # the place with more records counts
    assert found == fit_scalings(first) and found[TASK.name]["answer_order"] == "explanation_first"
    assert found[TASK.name]["records"] == 30
    scalings = {TASK.name: Scaling(2.0, order="explanation_first")}
    assert scaling_for(scalings, TASK, "explanation_first") == scalings[TASK.name]
    assert scaling_for(scalings, TASK, "label_first") is None is scaling_for(None, TASK, "label_first")
    with pytest.raises(
        InputError, match=r"calibration\.json: 'cognitive_distortion' was fitted for a task with one label"
    ):
        scaling_for({SEVERAL.name: Scaling(2.0)}, SEVERAL, "label_first")


def test_beside_the_weights(tmp_path):
    write_scalings(tmp_path, {})
    assert list(tmp_path.iterdir()) == [] and read_scalings(tmp_path) == {}
    found = fit_scalings(rows(100, 2.0, 0)) | {"a_task_of_yours": {"temperature": 3, "records": 40}}
    found |= fit_scalings(pairs(30, 3.0, 1.0, 0)) | {"c": {"temperature": 1, "answer_order": "explanation_first"}}
    write_scalings(tmp_path, found)
    expected = {name: Scaling(float(one["temperature"]), one.get("bias"), one.get("answer_order", "label_first"))
                for name, one in found.items()}  # fmt: skip
    assert expected[SEVERAL.name].bias is not None
    assert read_scalings(tmp_path) == scalings_of(str(tmp_path), None) == expected
    other = tmp_path / "adapter"
    other.mkdir()
    assert scalings_of(str(tmp_path), str(other)) == {}  # another model's
    assert scalings_of(str(other), str(tmp_path)) == expected


BAD = ["[]", "{", '{"a": 5}', '{"a": {}}', '{"a": {"temperature": 0}}', '{"a": {"temperature": "2"}}',
       '{"a": {"temperature": 1e9}}', '{"a": {"temperature": NaN}}', '{"a": {"temperature": 1, "bias": "0"}}',
       '{"a": {"temperature": 1, "bias": 1e9}}', '{"a": {"temperature": 1, "answer_order": "x"}}']  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(InputError, match=r"calibration\.json") as error:
        read_scalings(tmp_path)
    assert "\n" not in str(error.value)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    (tmp_path / "elsewhere.json").write_text('{"a": {"temperature": 2}}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "calibration.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="link to a file outside"):
        read_scalings(tmp_path / "model")


@pytest.mark.parametrize("bad", [0, -1, "2", True, math.inf, []])
def test_a_row_with_a_temperature_that_is_none(bad):
    (row,) = rows(1, 1.0, 0)
    with pytest.raises(InputError, match="record 'r0': temperature must be a number"):
        scored(row | {"temperature": bad})


def test_a_row_with_a_bias_that_is_none():
    (single,), (several,) = rows(1, 1.0, 0), pairs(1, 1.0, 1.0, 0)
    with pytest.raises(InputError, match="record 'r0': bias must be left out"):
        scored(single | {"temperature": 1.0, "bias": 0.0})
    with pytest.raises(InputError, match="record 'r0': bias is missing"):
        scored(several | {"temperature": 1.0})
    for bad in ("0", True, math.nan, 1e9):
        with pytest.raises(InputError, match="record 'r0': bias must be a number"):
            scored(several | {"temperature": 1.0, "bias": bad})


def test_a_model_that_explains_first_answers_development_records_for_it(speaker, tmp_path, monkeypatch):
    """The answers are said here: a model without training explains nothing."""
    records = [Record(f"r{n}", TASK.name, "en", f"post {n}", TASK.question("en"), TASK.keys[n % 2]) for n in range(40)]
    monkeypatch.setattr("mentalglm_jax.evaluate.development.MOST_EXPLAINED", 22)

    def explained(model, tokenizer, asked, **options):
        text = [tasks.answer(TASK, [one.label], f"It says {one.post}.", "en", "explanation_first") for one in asked]
        wanted.append((len(asked), options["max_new_tokens"], options["fingerprint"]))
        return [generation_row(one, tokenizer, tokenizer.prompt_ids(one.prompt, None), tokenizer.encode(said))
                for one, said in zip(asked, text, strict=True)]  # fmt: skip

    wanted: list[tuple] = []
    monkeypatch.setattr("mentalglm_jax.evaluate.development.generate_records", explained)
    found = fit_on_development(*speaker, records, explains_first=True, out_path=tmp_path / "dev.jsonl",
                               max_new_tokens=7, fingerprint="f")[TASK.name]  # fmt: skip
    assert wanted == [(22, 7, "f")] and found["records"] == 22 and found["answer_order"] == "explanation_first"
    plain = fit_on_development(*speaker, records, explains_first=False, out_path=tmp_path / "no.jsonl")[TASK.name]
    assert len(wanted) == 1 and plain["records"] == 40 and plain["answer_order"] == "label_first"


@pytest.fixture(scope="module")
def speaker():
    tokenizer = GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4,
                       max_position_embeddings=2048)  # fmt: skip
    return Glm(config, rngs=nnx.Rngs(0)), tokenizer


def test_answers_say_whether_their_probabilities_are_calibrated(speaker, tmp_path):
    (tmp_path / "in.txt").write_text("I like rain.\nI like wind.\n")
    posts = read_posts(tmp_path / "in.txt", task=TASK.name, language="en")
    options = {"max_new_tokens": 2, "batch_size": 2}
    plain = answer_posts(*speaker, posts, tmp_path / "plain.jsonl", **options)
    scalings = {TASK.name: Scaling(3.0)}
    told = answer_posts(*speaker, posts, tmp_path / "told.jsonl", scalings=scalings, **options)
    other = answer_posts(*speaker, posts, tmp_path / "o.csv", scalings={"suicide_level": Scaling(3.0)}, **options)
    for before, after, same in zip(plain, told, other, strict=True):
        assert (before["probabilities_calibrated"], after["probabilities_calibrated"]) == (False, True)
        assert same["probabilities_calibrated"] is False
        p, q = (np.asarray([row["label_probabilities"][key] for key in TASK.keys]) for row in (before, after))
        assert q == pytest.approx(softmax(np.log(p) / 3.0)) and q.sum() == pytest.approx(1)
        assert same["label_probabilities"] == before["label_probabilities"]
    assert json.loads((tmp_path / "told.jsonl").read_text().splitlines()[0])["probabilities_calibrated"] is True
    answer_posts(*speaker, posts, tmp_path / "told.csv", scalings=scalings, **options)
    for name, said in (("told.csv", "yes"), ("o.csv", "no")):
        with (tmp_path / name).open(encoding="utf-8-sig", newline="") as file:
            assert [row["calibrated"] for row in csv.DictReader(file)] == [said, said]


def test_label_f1_is_the_weighted_f1_of_the_label_reading(speaker):
    records = [Record(f"r{n}", TASK.name, "en", f"post {n}", TASK.question("en"), TASK.keys[n % 3 == 0])
               for n in range(9)]  # fmt: skip
    level = tasks.TASKS["suicide_level"]
    records += [Record(f"s{n}", level.name, level.languages[0], f"帖子 {n}", level.question(level.languages[0]),
                       level.keys[n % 3]) for n in range(6)]  # fmt: skip
    expected = evaluate([], label_scores=score_records(*speaker, records), draws=10)
    scores = [entry["label_reading"]["weighted_f1"] for entry in expected.values()]
    assert len(scores) == 2 and label_f1(*speaker, records, 4) == pytest.approx(sum(scores) / 2)
