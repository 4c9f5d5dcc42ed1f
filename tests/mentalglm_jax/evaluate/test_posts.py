"""`mentalglm generate`: posts without labels in, answers with probabilities out, as rows or for a spreadsheet."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mentalglm_jax as mg
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.cli.main import main
from mentalglm_jax.data.posts import read_posts
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import posts as answering
from mentalglm_jax.evaluate.answers import read_generations
from mentalglm_jax.evaluate.posts import answer_posts
from mentalglm_jax.inference.decode import generate_ids
from mentalglm_jax.inference.generate import generation_row, partial_file, write_rows
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from tests.checked import unchecked
from tests.mentalglm_jax.own_tasks import definitions


@pytest.fixture(scope="module")
def tokenizer():
    return GlmTokenizer.load(BUILTIN)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4,
                       max_position_embeddings=2048)  # fmt: skip
    return Glm(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model_dir(model, tokenizer, tmp_path_factory):
    """A model directory with which a task of its own travels."""
    directory = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(model, directory, tokenizer=tokenizer)
    tasks.write_tasks(directory / "tasks.yaml", definitions("weather", "distorted"))
    return directory


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(one) for one in arguments])
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return run


def test_a_post_is_all_that_is_needed(call, model_dir, tmp_path):
    (tmp_path / "p.txt").write_text("I like rain.\nThe wind blows.\nSoup.\n")
    out = tmp_path / "out" / "answers.jsonl"
    options = ["--task", "weather", "--language", "en", "--limit", 2, "--max-new-tokens", 4, "--batch-size", 2]
    code, said, _ = call("generate", model_dir, "--in", tmp_path / "p.txt", "--out", out, *options, "--json")
    assert code == 0 and json.loads(said)["rows"] == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["p-00001", "p-00002"]
    for row in rows:
        assert not {"label", "labels"} & set(row) and row["finish"] in ("stop", "length") and row["post"]
        assert list(row["label_probabilities"]) == ["sun", "rain", "storm"]
        assert sum(row["label_probabilities"].values()) == pytest.approx(1)
        assert list(row["candidates"]) == ["sun", "rain", "storm"] and "task_definition" in row
    assert out.stat().st_mode & 0o077 == 0 and not partial_file(out).exists()
    tasks.forget_added()
    code, _, err = call("evaluate", out)  # there is nothing to compare with
    assert code == 2 and "label: no label; give 'label' from: sun, rain, storm" in err


def test_label_probabilities_are_those_of_the_sentences_after_the_prompt(model, tokenizer, tmp_path):
    (tmp_path / "p.csv").write_text("text,language\nI like rain.,en\n下雨。,zh\n", encoding="utf-8")
    posts = read_posts(tmp_path / "p.csv", task="suicide_risk")
    rows = answer_posts(model, tokenizer, posts, tmp_path / "a.jsonl", max_new_tokens=3, system="Be brief.")
    for post, row in zip(posts, rows, strict=True):
        assert row["prompt_ids"] == tokenizer.prompt_ids(post.prompt, "Be brief.")
        logs = []
        for sentence in row["candidates"].values():
            ids, start = tokenizer.encode("\n" + sentence), len(row["prompt_ids"])
            logits = model(jnp.asarray([[*row["prompt_ids"], *ids]]))[0, start - 1 : -1]
            spread = logits - np.logaddexp.reduce(np.asarray(logits), axis=-1, keepdims=True)
            logs.append(float(sum(spread[place, token] for place, token in enumerate(ids))))
        expected = np.exp(logs - np.logaddexp.reduce(logs))
        assert list(row["label_probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-3)


def test_an_interrupted_call_goes_on_and_scores_too(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("I like rain.\n")
    posts, out = read_posts(tmp_path / "p.txt", task="imhi_dr"), tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(answering, "score_records", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer_posts(model, tokenizer, posts, out, max_new_tokens=3)
    assert partial_file(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr("mentalglm_jax.inference.generate.batches", lambda *_, **__: iter(()))  # nothing is left to do
        rows = answer_posts(model, tokenizer, posts, out, max_new_tokens=3)
    assert rows[0]["label_probabilities"] and not partial_file(out).exists()


def test_a_table_for_a_spreadsheet(tokenizer, tmp_path):
    tasks.add_tasks(definitions("distorted"))
    (tmp_path / "p.jsonl").write_text(
        '{"id": "01", "text": "=1+1", "task": "distorted", "language": "en"}\n'
        '{"id": "b", "text": "“quoted”, two\\nlines", "task": "imhi_dr", "language": "en"}\n'
    )
    first, second = read_posts(tmp_path / "p.jsonl")
    said = tasks.answer("distorted", ["blame", "filter"], "-- he says so", "en")
    rows = [generation_row(post, tokenizer, [1], [*tokenizer.encode("\n" + text), tokenizer.stop_id])
            for post, text in ((first, said), (second, "I do not know."))]  # fmt: skip
    rows[0] |= {"label_probabilities": {"filter": 0.25, "blame": 0.75}, "probabilities_calibrated": True}
    write_rows(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert [*table[0]] == ["id", "task", "language", "post", "label", "explanation", "finish", "status", "p(filter)",
                           "p(blame)", "calibrated"]  # fmt: skip
    assert [row["calibrated"] for row in table] == ["yes", ""]
    assert table[0]["post"] == "'=1+1" and table[0]["id"] == "'01" and table[0]["label"] == "filter;blame"
    assert table[0]["explanation"] == "'-- he says so" and table[0]["p(blame)"] == "0.750000"
    assert table[1]["post"] == "“quoted”, two\nlines" and table[1]["label"] == "" and table[1]["p(blame)"] == ""
    assert table[1]["status"] == "unknown_label" and (tmp_path / "a.csv").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtype_auto_is_what_the_checkpoint_holds(model, tokenizer, tmp_path, stored):
    other = nnx.clone(model)
    nnx.update(other, nnx.map_state(lambda _, x: x.astype(stored), nnx.state(other)))
    other.dtype = jnp.dtype(stored)
    save_pretrained(other, tmp_path / "m", tokenizer=tokenizer)
    assert load(tmp_path / "m", dtype="auto").dtype == jnp.dtype(stored)


def test_evaluate_takes_the_same_options_of_a_model_only(call, tmp_path, model_dir):
    options = {"--system": "Be brief.", "--quantize": "int8", "--rope-theta": 5000.0, "--limit": 2}
    (tmp_path / "t.csv").write_text("post,label\nrain,rain\nwet,rain\nfog,rain\nsun,sun\nsky,sun\nday,sun\n")
    arguments = ["--data", tmp_path / "t.csv", "--task", "weather", "--language", "en", "--max-new-tokens", 2]
    given = [one for pair in options.items() for one in pair]
    code, out, err = call("evaluate", model_dir, *arguments, *given, "--out", tmp_path / "e", "--json")
    assert code == 0, err
    assert json.loads(out)["weather"]["n"] == 2 and json.loads(out)["weather"]["label_reading"]["n"] == 2
    rows = read_generations(tmp_path / "e" / "generations.jsonl")
    assert [row["label"] for row in rows] == ["rain", "sun"]  # of a sorted file, not its beginning
    assert "Be brief." in GlmTokenizer.load(BUILTIN).decode(rows[0]["prompt_ids"])
    for option, value in options.items():
        tasks.forget_added()
        code, _, err = call("evaluate", tmp_path / "e", option, value)
        assert code == 2 and f"holds finished answers; {option} goes with a model" in err
    assert call("evaluate", tmp_path / "e", "--json")[0] == 0, "the task travels with what was evaluated"


@pytest.fixture
def as_users_call_it():
    """Without the type checks of the tests, which would be faster than ours."""
    with unchecked():
        yield


def test_one_prompt_has_one_answer(model, tokenizer, as_users_call_it):
    one = mg.generate(model, tokenizer, "I like rain.", 4)
    assert isinstance(one, str) and mg.generate(model, tokenizer, ["I like rain."], 4) == [one]
    with pytest.raises(InputError, match="a prompt must be text, got list; token ids go to generate_ids"):
        mg.generate(model, tokenizer, [[1, 2]], 4)


def test_text_where_ids_are_expected_is_one_clear_line(model, tokenizer, as_users_call_it):
    ids = tokenizer.prompt_ids("I like rain.")
    for wrong in ("I like rain.", ["I", "like"]):
        with pytest.raises(
            InputError, match=r"prompt 0: is text where token ids are expected; give tokenizer.prompt_ids"
        ):
            generate_ids(model, [wrong], max_new_tokens=2, eos_ids=tokenizer.eos_ids)
        with pytest.raises(InputError, match="prompt 0: is text"):
            mg.score_labels(model, [wrong], [ids])
        with pytest.raises(InputError, match="candidate 1: is text"):
            mg.score_labels(model, [ids], [ids, wrong])
    labels = mg.label_ids(tokenizer, "suicide_risk", "en")
    assert mg.score_labels(model, [ids], list(labels.values())).shape == (1, 2)
