"""Decoding against transformers' ``generate``, scores against a plain forward pass, and the resumable output file."""

import collections
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mentalglm_jax.data.records import Record, read_records
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.inference.decode import advance, bucket, filter_logits, first_token, penalise, prefill
from mentalglm_jax.inference.generate import (
    Calibration,
    count_unread,
    fit_calibration,
    generate,
    generate_ids,
    generate_records,
    generation_row,
    label_ids,
    log_odds,
    model_fingerprint,
    score_labels,
)  # fmt: skip
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, LoraParam, add_lora, merge_lora
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

EOS = (1, 2, 3)
MODULE = importlib.import_module("mentalglm_jax.inference.decode")


def ragged(count: int, longest: int, vocab: int = 96, seed: int = 0) -> list[list[int]]:
    """Prompts of mixed lengths from 1 to ``longest``, free of stop tokens."""
    rng = np.random.default_rng(seed)
    lengths = [1, longest, *rng.integers(2, longest, count - 2)]
    return [rng.integers(4, vocab, int(length)).tolist() for length in rng.permutation(lengths)]


def hf_greedy(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers, left-padded in one batch, cut behind the first stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=list(EOS))
    rows = [row[width:].tolist() for row in out]
    return [row[: next((i + 1 for i, token in enumerate(row) if token in EOS), new)] for row in rows]


@pytest.mark.parametrize(("variant", "batch_size"), [("glm", 8), ("glm", 2), ("glm4", 8), ("edge", 8)])
def test_greedy_equals_transformers(hf, variant, batch_size):
    reference = hf.variant(variant)
    prompts = ragged(7, 40)
    expected = hf_greedy(reference, prompts, 30)
    assert {len(row) for row in expected} > {30}  # some stop early
    found = generate_ids(hf.to_jax(reference), prompts, max_new_tokens=30, eos_ids=EOS, batch_size=batch_size)
    assert found == expected


@pytest.fixture(scope="module")
def tiny(hf) -> Glm:
    return hf.to_jax(hf.model())


def test_answers_do_not_depend_on_the_batch(tiny):
    prompts = ragged(6, 60, seed=1)
    order = [4, 0, 5, 2, 1, 3]
    together = generate_ids(tiny, prompts, max_new_tokens=30, eos_ids=EOS, batch_size=8)
    assert together == generate_ids(tiny, prompts, max_new_tokens=30, eos_ids=EOS, batch_size=2)
    shuffled = generate_ids(tiny, [prompts[i] for i in order], max_new_tokens=30, eos_ids=EOS, batch_size=2)
    assert [together[i] for i in order] == shuffled


def test_draws_belong_to_the_prompt_not_to_the_batch(tiny):
    options = {"max_new_tokens": 30, "eos_ids": EOS, "temperature": 1.0, "top_p": 0.9}
    prompts = [[9, 8, 7]] * 3 + [row + [5] * 32 for row in ragged(3, 32, seed=2)]
    together = generate_ids(tiny, prompts, seed=5, batch_size=8, **options)
    assert together == generate_ids(tiny, prompts, seed=5, batch_size=2, **options)
    assert together != generate_ids(tiny, prompts, seed=6, batch_size=8, **options)
    assert together[0] != together[1] != together[2]  # equal prompts draw differently


def test_stop_token_ends_the_row_and_is_kept(tiny):
    prompts = ragged(8, 40, seed=3)
    free = generate_ids(tiny, prompts, max_new_tokens=16, eos_ids=())
    assert [len(row) for row in free] == [16] * 8
    stop = free[0][6]
    stopped = generate_ids(tiny, prompts, max_new_tokens=16, eos_ids=[stop])
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert generate_ids(tiny, prompts, max_new_tokens=1, eos_ids=[]) == [row[:1] for row in free]


def test_decoding_ends_when_every_row_has_stopped(monkeypatch):
    """The number of vocabulary projections run, counted on the device: one per token of the longest answer."""
    runs = []
    unembed = Glm.unembed

    def counted(self, hidden):
        jax.debug.callback(lambda: runs.append(1))
        return unembed(self, hidden)

    monkeypatch.setattr(Glm, "unembed", counted)
    model = Glm(GlmConfig(vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                          num_key_value_heads=1, head_dim=8), rngs=nnx.Rngs(0))  # fmt: skip
    prompts = ragged(5, 9, vocab=31)
    stop = [row[i % 4] for i, row in enumerate(generate_ids(model, prompts, max_new_tokens=4, eos_ids=[5] * 5))]
    jax.effects_barrier()
    runs.clear()
    rows = generate_ids(model, prompts, max_new_tokens=500, eos_ids=stop, batch_size=5)
    jax.effects_barrier()
    assert len(runs) == max(map(len, rows)) <= 4


def test_padding_rows_of_the_vocabulary_are_never_generated(hf):
    model = hf.to_jax(hf.model())
    model.lm_head.kernel.set_value(model.lm_head.kernel[...].at[:, 90:].mul(20.0))
    prompts = ragged(7, 40)
    tempted = generate_ids(model, prompts, max_new_tokens=8, eos_ids=[])
    assert max(map(max, tempted)) >= 90
    for temperature in (0.0, 5.0):
        limited = generate_ids(model, prompts, max_new_tokens=8, eos_ids=[], temperature=temperature, vocab_limit=90)
        assert max(map(max, limited)) < 90
    logits = hf.run(model, [prompts[0]])[0, -1, :90]
    greedy = generate_ids(model, prompts[:1], max_new_tokens=1, eos_ids=[], vocab_limit=90)
    assert greedy == [[int(logits.argmax())]]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(None, 0.7, None), (5, None, None), (7, 0.6, None), (1, 0.01, None), (500, 1.0, None), (None, 1e-6, None),
     (None, None, 0.05), (6, 0.9, 0.2), (None, None, 0.999)],
)  # fmt: skip
def test_filters_equal_transformers(top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(0, 3, (9, 40)).astype(np.float32)
    expected = TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
        expected = expected if value is None else warper(value)(None, expected)
    np.testing.assert_allclose(filter_logits(jnp.asarray(logits / 0.7), top_k, top_p, min_p), expected, rtol=1e-5)


def test_the_repetition_penalty_equals_transformers(hf, tiny):
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 3, (4, 40)).astype(np.float32), rng.integers(0, 40, (4, 12))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor(ids), torch.tensor(logits))
    seen = np.zeros((4, 40), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    np.testing.assert_allclose(penalise(jnp.asarray(logits), jnp.asarray(seen), 1.4), expected, rtol=1e-6)
    prompts = [row[:6] for row in ragged(9, 40, seed=8) if len(row) >= 6][:4]  # transformers penalises padding too
    with torch.no_grad():
        out = hf.model().generate(torch.tensor(prompts), do_sample=False, max_new_tokens=20, repetition_penalty=1.4,
                                  attention_mask=torch.ones(4, 6), eos_token_id=[0])  # fmt: skip
    rows = [row[6:].tolist() for row in out]
    expected = [row[: row.index(0) + 1] if 0 in row else row for row in rows]
    options = {"max_new_tokens": 20, "eos_ids": [0]}
    assert generate_ids(tiny, prompts, repetition_penalty=1.4, **options) == expected
    assert generate_ids(tiny, prompts, **options) != expected


def test_tokens_are_streamed_as_they_come(tiny):
    prompts, heard = ragged(5, 30, seed=9), []
    options = {"max_new_tokens": 12, "eos_ids": EOS, "batch_size": 4}
    found = generate_ids(tiny, prompts, stream=lambda number, token: heard.append((number, token)), **options)
    assert found == generate_ids(tiny, prompts, **options)
    assert [[token for i, token in heard if i == number] for number in range(5)] == found
    first = [number for number, _ in heard[:4]]
    assert len(set(first)) == 4  # a token of every row before the second of any


def test_a_shared_prefix_is_computed_once(tiny, monkeypatch):
    head = np.random.default_rng(5).integers(4, 96, 45).tolist()
    prompts = [head + row for row in ragged(5, 20, seed=10)]
    options = {"max_new_tokens": 12, "eos_ids": EOS, "batch_size": 2}
    expected, scores = generate_ids(tiny, prompts, **options), score_labels(tiny, prompts, [[5], [6, 7]])
    shapes = []
    monkeypatch.setattr(MODULE, "prefill", lambda g, s, t, *rest: shapes.append(t.shape) or prefill(g, s, t, *rest))
    assert generate_ids(tiny, prompts, share_prefix=True, **options) == expected
    assert shapes == [(1, 64), (2, 32), (2, 32), (2, 32)]
    shared = score_labels(tiny, prompts, [[5], [6, 7]], share_prefix=True)
    np.testing.assert_allclose(shared, scores, rtol=2e-5)
    for alone in ([head, [5, *head]], [head], [[*head[:20], 7], [*head[:20], 8]]):  # nothing worth a program
        assert MODULE.shared_prefix(*nnx.split(tiny), alone) == (0, None)
    assert MODULE.shared_prefix(*nnx.split(tiny), [head, head])[0] == 44  # the last token of each prompt stays


def test_draws_follow_the_filtered_distribution(tiny, hf):
    prompt, draws = [11, 12, 13], 4000
    options = {"max_new_tokens": 1, "eos_ids": [], "temperature": 2.0, "top_k": 6, "batch_size": 1024}
    counts = collections.Counter(row[0] for row in generate_ids(tiny, [prompt] * draws, **options))
    logits = np.sort(hf.run(tiny, [prompt])[0, -1])[::-1][:6] / 2.0
    order = np.argsort(hf.run(tiny, [prompt])[0, -1])[::-1][:6]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert set(counts) <= set(order.tolist())
    assert np.abs(np.array([counts[i] / draws for i in order.tolist()]) - expected).max() < 4 * 0.5 / draws**0.5
    between = float(np.exp((logits[2] + logits[3]) / 2 - logits[0]))
    probable = {row[0] for row in generate_ids(tiny, [prompt] * 1024, **options, min_p=between)}
    assert probable == set(order[:3].tolist())


def test_lengths_within_a_bucket_share_one_program(monkeypatch):
    traces = []
    hidden_states = Glm.hidden_states
    monkeypatch.setattr(Glm, "hidden_states", lambda *a, **k: traces.append(1) or hidden_states(*a, **k))
    model = Glm(GlmConfig(vocab_size=29, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                          num_key_value_heads=1, head_dim=8), rngs=nnx.Rngs(0))  # fmt: skip
    generate_ids(model, ragged(4, 33, vocab=29), max_new_tokens=9, eos_ids=[2], batch_size=4)
    first, programs = len(traces), [f._cache_size() for f in (prefill, first_token, advance)]
    for seed, longest, new in ((1, 64, 9), (2, 40, 20)):  # other lengths, room, weights: the same two programs
        prompts = ragged(8, longest, vocab=29, seed=seed)
        generate_ids(model, [p + [5] * 32 for p in prompts if len(p) <= 32][:4], max_new_tokens=new, eos_ids=[2],
                     batch_size=4)  # fmt: skip
        model.norm.weight.set_value(model.norm.weight[...] * 1.5)
    assert len(traces) == first > 0
    assert [f._cache_size() for f in (prefill, first_token, advance)] == programs
    assert [bucket(n) for n in (1, 32, 33, 65, 128, 129, 193, 257, 385, 513, 769)] == [
        32, 32, 64, 128, 128, 192, 256, 384, 512, 768, 1024
    ]  # fmt: skip


def test_unmerged_adapter_is_used(hf):
    model = hf.to_jax(hf.model())
    prompts = ragged(5, 40, seed=4)
    base = generate_ids(model, prompts, max_new_tokens=30, eos_ids=EOS)
    add_lora(model, LoraConfig(rank=2), nnx.Rngs(1))
    assert generate_ids(model, prompts, max_new_tokens=30, eos_ids=EOS) == base  # a fresh adapter changes nothing
    state = nnx.state(model, LoraParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1, state))
    adapted = generate_ids(model, prompts, max_new_tokens=30, eos_ids=EOS)
    assert adapted != base
    assert adapted == generate_ids(merge_lora(model), prompts, max_new_tokens=30, eos_ids=EOS)


def test_long_prompts_go_in_smaller_batches(tiny, monkeypatch):
    prompts = ragged(6, 40, seed=6)
    expected = generate_ids(tiny, prompts, max_new_tokens=30, eos_ids=EOS, batch_size=8)
    monkeypatch.setattr(MODULE, "BATCH_TOKENS", 128)
    shapes = []
    monkeypatch.setattr(MODULE, "prefill", lambda g, s, t, *rest: shapes.append(t.shape) or prefill(g, s, t, *rest))
    assert generate_ids(tiny, prompts, max_new_tokens=30, eos_ids=EOS, batch_size=8) == expected
    assert len(shapes) > 1
    assert all(rows * length <= 128 for rows, length in shapes)


def test_label_scores_equal_a_plain_forward_pass(hf):
    reference = hf.model()
    prompts, candidates = ragged(5, 40, seed=7), [[5], [5, 6, 7], [9] * 11, [1, 2]]
    found = score_labels(hf.to_jax(reference), prompts, candidates, batch_size=3)
    for prompt, row in zip(prompts, found, strict=True):
        for candidate, score in zip(candidates, row, strict=True):
            logits = torch.tensor(hf.logits(reference, [prompt + candidate]))[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(candidate) - 1)
            expected = sum(logits[i, t].item() for i, t in zip(places, candidate, strict=True))
            assert score == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[5], []]}, "prompt 1: is empty"),
        ({"prompts": [[5, 96]]}, "prompt 0: token ids must be in 0..95"),
        ({"prompts": [[5] * 4090]}, r"has 4090 tokens .* 8 more .* context is 4096; .* at most 4088"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"vocab_limit": 97}, "97 tokens, the model 96"),
    ],
)
def test_bad_input_is_refused(tiny, changes, message):
    with pytest.raises(InputError, match=message):
        generate_ids(tiny, **({"prompts": [[5]], "max_new_tokens": 8, "eos_ids": EOS} | changes))


def test_log_odds_and_calibrated_probabilities():
    rng = np.random.default_rng(0)
    truth_logits = rng.normal(0, 1.5, (4000, 3))
    shares = np.exp(truth_logits) / np.exp(truth_logits).sum(1, keepdims=True)
    truth = (rng.random(4000)[:, None] > shares.cumsum(1)).sum(1)
    scores = 3.0 * (truth_logits - np.array([0.5, -0.5, 0.0])) - 40  # three times too sure, and partial to one wording
    fitted = fit_calibration(scores, truth)
    found = fitted.probabilities(scores)
    np.testing.assert_allclose(found.sum(1), 1)
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    np.testing.assert_allclose(np.diff(fitted.bias), np.diff([0.5, -0.5, 0.0]), atol=0.15)
    assert np.abs(found - shares).mean() < 0.02 < np.abs(Calibration().probabilities(scores) - shares).mean()
    np.testing.assert_allclose(
        log_odds(scores), np.log(p := Calibration().probabilities(scores)) - np.log1p(-p), atol=1e-6
    )
    assert fit_calibration(scores, truth, bias=False).bias == ()
    assert np.isfinite(fit_calibration(scores[:5], np.zeros(5, int)).bias).all()
    with pytest.raises(InputError, match="fitted on 3 candidates, these scores have 2"):
        fitted.probabilities(scores[:, :2])
    with pytest.raises(InputError, match="one candidate alone"):
        log_odds(scores[:, :1])
    for rows, labels in ((scores[:0], truth[:0]), (scores[:2], np.array([0, 3])), (scores[:2], truth[:1])):
        with pytest.raises(InputError, match=r"needs one true candidate \(0..2\)"):
            fit_calibration(rows, labels)


def test_scores_refuse_bad_input(tiny):
    for prompts, candidates in (([[5]], []), ([[5]], [[]]), ([[]], [[5]]), ([[5]], [[96]]), ([[5] * 4095], [[5, 5]])):
        with pytest.raises(InputError):
            score_labels(tiny, prompts, candidates)
    assert generate_ids(tiny, [], max_new_tokens=3, eos_ids=EOS) == []


# --- text and records ---


@pytest.fixture(scope="module")
def tokenizer() -> GlmTokenizer:
    return GlmTokenizer.load(BUILTIN)


@pytest.fixture(scope="module")
def talker(hf, tokenizer) -> Glm:
    """Random words, in a vocabulary with padding rows."""
    return hf.to_jax(hf.model(vocab_size=tokenizer.vocab_size + 13, num_hidden_layers=1, max_position_embeddings=300))


def posts(count: int) -> list[Record]:
    risk, distortion = tasks.TASKS["suicide_risk"], tasks.TASKS["cognitive_distortion"]
    single = [Record(f"s{i}", "suicide_risk", "en", "a post " * (i % 5 + 1), risk.question("en"), label="low")
              for i in range(count // 2)]  # fmt: skip
    multi = [Record(f"m{i}", "cognitive_distortion", "zh", "帖子" * (i + 1), distortion.question("zh"),
                    labels=("labeling",)) for i in range(count - count // 2)]  # fmt: skip
    return [record for pair in zip(multi, single, strict=True) for record in pair]


def test_generate_speaks_the_chat_format(talker, tokenizer):
    prompts = ["How are you?", "你好，在吗？"]
    ids = generate_ids(talker, [tokenizer.prompt_ids(p, "Be kind.") for p in prompts], max_new_tokens=8,
                       eos_ids=tokenizer.eos_ids, vocab_limit=tokenizer.vocab_size)  # fmt: skip
    answers = generate(talker, tokenizer, prompts, max_new_tokens=8, system="Be kind.")
    assert answers == [tokenizer.decode(row).removeprefix("\n") for row in ids]
    assert answers != generate(talker, tokenizer, prompts, max_new_tokens=8)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny, tokenizer):
    with pytest.raises(InputError, match="do not belong together"):
        generate(tiny, tokenizer, ["How are you?"])


@pytest.mark.parametrize("record", posts(4)[:2], ids=["multi", "single"])
def test_a_row_says_what_the_answer_says(tokenizer, record):
    answer = tasks.answer(record.task, record.gold, "because", record.language)
    ids = [*tokenizer.encode("\n" + answer), tokenizer.stop_id]
    row = generation_row(record, tokenizer, [7, 8], ids)
    assert row["output_text"] == answer
    assert row["output_ids"] == ids
    assert row["prompt_ids"] == [7, 8]
    assert row["parsed_label"] == ("low" if record.label else ["labeling"])
    assert row["parsed_explanation"] == "because"
    assert row["parse_status"] == "ok"
    assert row["label_text"] == tasks.TASKS[record.task].sentence(record.gold, record.language)
    assert row["candidates"] == tasks.TASKS[record.task].candidates(record.language)
    assert Record.from_dict(row, allow_extra=True) == record
    lost = generation_row(record, tokenizer, [7, 8], tokenizer.encode("\nNo idea."))
    assert (lost["parsed_label"], lost["label_text"], lost["parse_status"]) == (None, None, "unknown_label")
    bare = generation_row(record, tokenizer, [7, 8], tokenizer.encode("\n" + row["label_text"]))
    assert count_unread([row, lost, bare, bare]) == {"rows": 4, "no_label": 1, "no_explanation": 2, "cut_off": 3}


def test_label_ids_begin_as_an_answer_does(tokenizer):
    ids = label_ids(tokenizer, "suicide_risk", "en")
    sentence = tasks.TASKS["suicide_risk"].sentence(["high"], "en")
    chat = tokenizer.chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": sentence}]).ids
    assert list(chat) == [*tokenizer.prompt_ids("x"), *ids["high"], tokenizer.stop_id]
    assert list(ids) == ["high", "low"]


class Interrupted(Exception):
    pass


def stop_after(batches: int):
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == batches:
            raise Interrupted

    return progress


def test_an_interrupted_run_goes_on_where_it_stopped(talker, tokenizer, tmp_path):
    records = posts(10)
    options = {"max_new_tokens": 8, "batch_size": 2, "temperature": 1.0, "seed": 3}
    whole = generate_records(talker, tokenizer, records, out_path=tmp_path / "whole.jsonl", **options)
    assert [row["id"] for row in whole] == [record.id for record in records]
    assert read_records(tmp_path / "whole.jsonl", allow_extra=True) == records
    assert [path.name for path in tmp_path.iterdir()] == ["whole.jsonl"]

    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(Interrupted):
        generate_records(talker, tokenizer, records, out_path=out, progress=stop_after(3), **options)
    assert not out.exists()
    *lines, end = partial.read_bytes().split(b"\n")
    assert (len(lines), end) == (1 + 6, b"")
    left = json.loads(lines[1])
    assert set(left) == {"id", "prompt_ids", "output_ids"}
    left["output_ids"] = left["output_ids"][:1]  # a mark that only an answer not generated again can carry
    lines[1] = json.dumps(left | {"output_text": "edited", "label": "high"}).encode()
    lines[-1] = lines[-1][:40]  # a crash in the middle of a line
    partial.write_bytes(b"\n".join(lines))

    seen = []
    rows = generate_records(talker, tokenizer, records, out_path=out, progress=lambda *n: seen.append(n), **options)
    assert seen[0] == (5, 10)
    assert seen[-1] == (10, 10)
    assert not partial.exists()
    record = next(record for record in records if record.id == left["id"])
    kept = generation_row(record, tokenizer, left["prompt_ids"], left["output_ids"])
    kept |= {"answered_by": model_fingerprint(talker)}
    assert rows == [kept if row["id"] == kept["id"] else row for row in whole]
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == rows


def test_a_record_draws_by_its_id(talker, tokenizer, tmp_path):
    records = posts(6)
    options = {"max_new_tokens": 8, "temperature": 1.0, "batch_size": 2, "out_path": tmp_path / "out.jsonl"}
    rows = generate_records(talker, tokenizer, records, **options)
    assert generate_records(talker, tokenizer, records[::-1], **options) == rows[::-1]


def test_a_changed_record_is_generated_again(talker, tokenizer, tmp_path):
    records, out, options = posts(6), tmp_path / "out.jsonl", {"max_new_tokens": 8, "batch_size": 2}
    with pytest.raises(Interrupted):
        generate_records(talker, tokenizer, records, out_path=out, progress=stop_after(1), **options)
    changed = [Record.from_dict(record.to_dict() | {"post": "another post"}) for record in records]
    rows = generate_records(talker, tokenizer, changed, out_path=out, **options)
    assert [row["prompt_ids"] for row in rows] == [tokenizer.prompt_ids(record.prompt) for record in changed]


def test_a_partial_file_of_another_run_is_refused(talker, tokenizer, tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    records, options = posts(4), {"max_new_tokens": 8, "batch_size": 2}
    with pytest.raises(Interrupted):
        generate_records(talker, tokenizer, records, out_path=out, progress=stop_after(1), **options)
    before = partial.read_bytes()
    with pytest.raises(InputError, match="another model or other options"):
        generate_records(talker, tokenizer, records, out_path=out, max_new_tokens=5)
    other = nnx.merge(*nnx.split(talker), copy=True)
    other.norm.weight.set_value(other.norm.weight[...].at[3].add(1e-3))
    with pytest.raises(InputError, match="another model or other options"):
        generate_records(other, tokenizer, records, out_path=out, **options)
    assert partial.read_bytes() == before
    partial.write_bytes(before + b'{"id": \n' + before.splitlines()[1] + b"\n")
    with pytest.raises(InputError, match="is damaged"):
        generate_records(talker, tokenizer, records, out_path=out, **options)


def test_fingerprint_tells_models_apart(hf):
    model = hf.to_jax(hf.model())
    first = model_fingerprint(model)
    assert first == model_fingerprint(hf.to_jax(hf.model()))
    add_lora(model, LoraConfig(rank=2), nnx.Rngs(0))
    assert len({first, model_fingerprint(model), model_fingerprint(hf.to_jax(hf.model(), dtype=jnp.bfloat16))}) == 3


def test_records_that_can_not_be_answered_are_named(talker, tokenizer, tmp_path):
    records = posts(4)
    long = Record("long-1", "suicide_risk", "en", "word 7 " * 200, "Q?", label="low")
    length = len(tokenizer.prompt_ids(long.prompt))
    with pytest.raises(InputError, match=rf"record 'long-1'.* {length} tokens .* context is 300; .* at most 290"):
        generate_records(talker, tokenizer, [*records, long], out_path=tmp_path / "out.jsonl", max_new_tokens=10)
    with pytest.raises(InputError, match="record 's0' is given twice"):
        generate_records(talker, tokenizer, [*records, records[1]], out_path=tmp_path / "out.jsonl", max_new_tokens=10)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make its directory"):
        generate_records(talker, tokenizer, records, out_path=tmp_path / "file" / "out.jsonl", max_new_tokens=10)
