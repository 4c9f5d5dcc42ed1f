"""Several answers to a post: drawn from one prefill, seeded by their ids, resumable, with one label where that is
asked."""

import dataclasses
import importlib
import json
import zlib

import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.batches import encode_records
from mentalglm_jax.data.records import Post, Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference import samples
from mentalglm_jax.inference.decode import Sampling, batches
from mentalglm_jax.inference.generate import answer_text, generation_row, model_fingerprint
from mentalglm_jax.inference.samples import generate_samples, kept_ids
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.loop import train
from mentalglm_jax.train.recipe import TrainConfig

MODULE = importlib.import_module("mentalglm_jax.inference.decode")
QUESTION = tasks.TASKS["suicide_risk"].question("en")
RECORDS = [
    Record(f"r{n}", "suicide_risk", "en", f"Today {post}.", QUESTION, label, explanation=f'It says "{post}".')
    for n, (post, label) in enumerate([("rain", "low"), ("a long walk in the wind", "high"), ("soup", "low")])
]
POSTS = [Post(r.id, r.task, r.language, r.post, r.question) for r in RECORDS]


@pytest.fixture(scope="module")
def tokenizer() -> GlmTokenizer:
    return GlmTokenizer.load(BUILTIN)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Glm:
    """Knows the answers to three posts by heart, roughly."""
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       head_dim=16, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    learns = TrainConfig(steps=60, rows=3, sequence_length=128, learning_rate=2e-2, save_every=1000, warmup_ratio=0.1)
    train(model, encode_records(RECORDS, tokenizer, 128)[0], learns, tmp_path_factory.mktemp("learnt"),
          trainable="all", seed=0)  # fmt: skip
    return model


def draw(model, tokenizer, out, **changes):
    options = {"samples": 4, "temperature": 1.8, "max_new_tokens": 40, "batch_size": 8}
    return generate_samples(model, tokenizer, POSTS, out_path=out, **(options | changes))


def test_one_prefill_serves_all_answers_of_a_post(model, tokenizer, monkeypatch):
    """The same draws as of as many prompts, each run by itself."""
    seen = []
    prefill = MODULE.prefill
    monkeypatch.setattr(MODULE, "prefill", lambda g, s, tokens, *more: (seen.append(tokens.shape[0]),
                                                                        prefill(g, s, tokens, *more))[1])  # fmt: skip
    prompts = [tokenizer.prompt_ids(record.prompt) for record in RECORDS]
    common = {"max_new_tokens": 12, "eos_ids": tokenizer.eos_ids, "sampling": Sampling(temperature=3.0), "seed": 3,
              "vocab_limit": None}  # fmt: skip
    salts = list(range(100, 109))
    together = dict(pair for batch in batches(model, prompts, ["a"] * 3, salts, answers=3, batch_size=6, **common)
                    for pair in batch)  # fmt: skip
    assert seen == [2, 2] and sorted(together) == list(range(9))
    alone = dict(pair for batch in batches(model, [p for p in prompts for _ in range(3)], ["a"] * 9, salts,
                                           batch_size=16, **common) for pair in batch)  # fmt: skip
    assert together == alone and len({tuple(x) for x in alone.values()}) == 9


def test_rows_of_samples(model, tokenizer, tmp_path):
    rows, counts = draw(model, tokenizer, tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()] == rows
    assert counts.posts == 3 and counts.rows == len(rows) == 12 - counts.duplicates and counts.other_label == 0
    assert all(row["id"] == f"{row['id'].split('#')[0]}#{row['sample']}" for row in rows)
    assert len({(row["post"], row["output_text"]) for row in rows}) == len(rows)
    prompts = {post.id: tokenizer.prompt_ids(post.prompt) for post in POSTS}
    for row in rows[:2]:  # an answer's draws are keyed by its id alone
        post = next(post for post in POSTS if post.id == row["id"].split("#")[0])
        ids = next(iter(batches(model, [prompts[post.id]], ["a"], [zlib.crc32(row["id"].encode())], max_new_tokens=40,
                                eos_ids=tokenizer.eos_ids, sampling=Sampling(temperature=1.8), seed=0, batch_size=1,
                                vocab_limit=tokenizer.vocab_size)))[0][1]  # fmt: skip
        assert row == {**generation_row(dataclasses.replace(post, id=row["id"]), tokenizer, prompts[post.id], ids),
                       "sample": row["sample"], "drawn": row["drawn"],
                       "answered_by": model_fingerprint(model)}  # fmt: skip
    assert draw(model, tokenizer, tmp_path / "again.jsonl", seed=1)[0] != rows
    cold, found = draw(model, tokenizer, tmp_path / "cold.jsonl", temperature=0.01)
    assert found.duplicates == 9 and len(cold) == 3  # nearly greedy: all answers of a post are one
    assert [row["drawn"] for row in cold] == [4, 4, 4] and sum(row["drawn"] for row in rows) == 12
    hot = draw(model, tokenizer, tmp_path / "hot.jsonl", temperature=5.0)[0]
    near, _ = draw(model, tokenizer, tmp_path / "near.jsonl", temperature=5.0, min_p=0.999)  # greedy but for ties
    assert len(near) == 3 < len(hot) and {row["output_text"] for row in near} == {row["output_text"] for row in cold}


def test_samples_keep_the_greedy_label(model, tokenizer, tmp_path):
    rows, counts = draw(model, tokenizer, tmp_path / "out.jsonl", keep_label=True, temperature=1.3, samples=6)
    greedy = {row["post"]: row for row in rows if row["sample"] == 0}
    assert [row["parsed_label"] for row in greedy.values()] == [record.label for record in RECORDS]
    assert counts.unlabelled == 0 and counts.rows + counts.duplicates + counts.other_label == 3 * 7
    for row in rows:
        first = greedy[row["post"]]
        begun = kept_ids(tokenizer, first)
        assert begun and row["output_ids"][: len(begun)] == begun and row["parsed_label"] == first["parsed_label"]
        assert answer_text(tokenizer, begun).startswith(first["label_text"])
        assert not answer_text(tokenizer, begun[:-1]).startswith(first["label_text"])
        assert len(row["output_ids"]) <= 40
    assert len({len(kept_ids(tokenizer, row) or ()) for row in greedy.values()}) >= 1
    assert len(rows) > 6  # and they differ in what follows


def test_what_is_kept_of_an_answer(tokenizer):
    record, task = RECORDS[0], tasks.TASKS["suicide_risk"]

    def row(text: str) -> dict:
        return generation_row(record, tokenizer, [7], [*tokenizer.encode("\n" + text), tokenizer.stop_id])

    plain = row(record.answer())
    assert answer_text(tokenizer, kept_ids(tokenizer, plain) or ()) == task.sentence(["low"], "en")
    assert kept_ids(tokenizer, row(record.answer("explanation_first"))) == []
    assert kept_ids(tokenizer, row("I cannot say.")) is None


def test_an_answer_of_another_label_is_not_written(model, tokenizer, tmp_path, monkeypatch):
    """Where the explanation comes first nothing is kept; the label is looked at afterwards."""
    monkeypatch.setattr(samples, "kept_ids", lambda tokenizer, row: [])
    rows, counts = draw(model, tokenizer, tmp_path / "out.jsonl", keep_label=True, temperature=5.0, samples=6)
    assert counts.other_label > 0
    greedy = {row["post"]: row["parsed_label"] for row in rows if row["sample"] == 0}
    assert len(greedy) == 3 and all(row["parsed_label"] == greedy[row["post"]] for row in rows)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4])
def test_interrupted_samples_go_on_where_they_stopped(model, tokenizer, tmp_path, at):
    options = {"keep_label": True, "batch_size": 4, "temperature": 1.3}
    whole, counts = draw(model, tokenizer, tmp_path / "whole.jsonl", **options)
    out, calls = tmp_path / "out.jsonl", []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        draw(model, tokenizer, out, progress=progress, **options)
    assert not out.exists() and calls[-1][1] == 15
    partial = out.with_name("out.jsonl.partial")
    partial.write_bytes(partial.read_bytes()[:-20])  # a crash in the middle of a line
    rows, found = draw(model, tokenizer, out, **options)
    assert (rows, found) == (whole, counts) and not partial.exists()
    with pytest.raises(InputError, match="finished answers are not written over"):
        draw(model, tokenizer, out, **options)
    out.unlink()
    calls.clear()
    with pytest.raises(Interrupted):
        draw(model, tokenizer, out, progress=progress, **options)
    with pytest.raises(InputError, match="another model or other options"):
        draw(model, tokenizer, out, **(options | {"samples": 3}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--keep-label"], "--keep-label goes with --samples"),
        (["--samples", "2"], "--samples needs --temperature above 0"),
        (["--samples", "0"], "samples"),
        (["--min-p", "0.1"], "--min-p goes with --samples"),
        (["--samples", "2", "--temperature", "1", "--min-p", "nan"], "invalid value for --min-p"),
        (["--samples", "2", "--temperature", "1", "--label-probabilities"], "not with --samples"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_options_that_say_nothing_together_are_refused(capsys, tmp_path, given, says):
    with pytest.raises(SystemExit) as end:
        main(["generate", "nowhere", "--in", "nothing.jsonl", "--out", str(tmp_path / "out.jsonl"), *given])
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and len(err.splitlines()) == 1, err


def test_samples_from_the_command_line(model, tokenizer, tmp_path, capsys):
    from mentalglm_jax.checkpoints.directories import save_pretrained

    save_pretrained(model, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post.to_dict()) + "\n" for post in POSTS))
    command = ["generate", str(tmp_path / "model"), "--in", str(tmp_path / "posts.jsonl"), "--out",
               str(tmp_path / "out.jsonl"), "--samples", "4", "--temperature", "1.3", "--keep-label", "--seed", "5",
               "--max-new-tokens", "40", "--json"]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    wanted, counts = draw(model, tokenizer, tmp_path / "own.jsonl", keep_label=True, temperature=1.3, seed=5)
    assert [row["output_ids"] for row in rows] == [row["output_ids"] for row in wanted]
    assert {name: found[name] for name in ("posts", "rows", "duplicates", "other_label", "unlabelled")} == (
        dataclasses.asdict(counts)
    )
    assert np.all([row["sample"] >= 0 for row in rows])
