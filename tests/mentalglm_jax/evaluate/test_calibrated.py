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
    fit_temperatures,
    read_temperatures,
    temperatures_of,
    write_temperatures,
)
from mentalglm_jax.evaluate.posts import answer_posts
from mentalglm_jax.evaluate.readings import label_f1, score_records
from mentalglm_jax.evaluate.tables import format_table
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
    found = fit_temperatures(rows(2000, temperature, 0))[TASK.name]
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
    assert fit_temperatures(rows(LEAST - 1, 2.0, 0)) == {}
    assert set(fit_temperatures(rows(LEAST, 2.0, 0))) == {TASK.name}
    assert fit_temperatures(rows(100, 2.0, 0, answer_order="explanation_first")) == {}
    several = tasks.TASKS["cognitive_distortion"]
    record = Record("a", several.name, "zh", "一个帖子", several.question("zh"), labels=("labeling",))
    row = record.to_dict() | {"label_logprobs": dict.fromkeys(several.keys, -1.0), "answer_order": "label_first"}
    assert fit_temperatures([row | {"id": f"r{n}"} for n in range(50)]) == {}


def test_beside_the_weights(tmp_path):
    write_temperatures(tmp_path, {})
    assert list(tmp_path.iterdir()) == [] and read_temperatures(tmp_path) == {}
    found = fit_temperatures(rows(100, 2.0, 0)) | {"a_task_of_yours": {"temperature": 3, "records": 40}}
    write_temperatures(tmp_path, found)
    expected = {TASK.name: found[TASK.name]["temperature"], "a_task_of_yours": 3.0}
    assert read_temperatures(tmp_path) == temperatures_of(str(tmp_path), None) == expected
    other = tmp_path / "adapter"
    other.mkdir()
    assert temperatures_of(str(tmp_path), str(other)) == {}  # another model's
    assert temperatures_of(str(other), str(tmp_path)) == expected


BAD = ["[]", "{", '{"a": 5}', '{"a": {}}', '{"a": {"temperature": 0}}', '{"a": {"temperature": "2"}}',
       '{"a": {"temperature": 1e9}}', '{"a": {"temperature": NaN}}']  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(InputError, match=r"calibration\.json") as error:
        read_temperatures(tmp_path)
    assert "\n" not in str(error.value)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    (tmp_path / "elsewhere.json").write_text('{"a": {"temperature": 2}}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "calibration.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="link to a file outside"):
        read_temperatures(tmp_path / "model")


@pytest.mark.parametrize("bad", [0, -1, "2", True, math.inf, []])
def test_a_row_with_a_temperature_that_is_none(bad):
    (row,) = rows(1, 1.0, 0)
    with pytest.raises(InputError, match="record 'r0': temperature must be a number"):
        scored(row | {"temperature": bad})


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
    told = answer_posts(*speaker, posts, tmp_path / "told.jsonl", temperatures={TASK.name: 3.0}, **options)
    other = answer_posts(*speaker, posts, tmp_path / "o.csv", temperatures={"suicide_level": 3.0}, **options)
    for before, after, same in zip(plain, told, other, strict=True):
        assert (before["probabilities_calibrated"], after["probabilities_calibrated"]) == (False, True)
        assert same["probabilities_calibrated"] is False
        p, q = (np.asarray([row["label_probabilities"][key] for key in TASK.keys]) for row in (before, after))
        assert q == pytest.approx(softmax(np.log(p) / 3.0)) and q.sum() == pytest.approx(1)
        assert same["label_probabilities"] == before["label_probabilities"]
    assert json.loads((tmp_path / "told.jsonl").read_text().splitlines()[0])["probabilities_calibrated"] is True
    answer_posts(*speaker, posts, tmp_path / "told.csv", temperatures={TASK.name: 3.0}, **options)
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
