"""Packing loses, repeats and cuts nothing, and a packed target is the target of its own example."""

import itertools
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mentalglm_jax.data.batches import (
    Example,
    PackedBatches,
    encode_chats,
    encode_posts,
    encode_records,
    example,
    fingerprint,
)
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tokenizer import BUILTIN, Encoded, GlmTokenizer
from tests.mentalglm_jax.tiny import tiny_examples


@pytest.fixture(scope="module")
def tokenizer() -> GlmTokenizer:
    return GlmTokenizer.load(BUILTIN)


@pytest.fixture(scope="module")
def records():
    corpus = make_corpus(SyntheticConfig(n_train=4, n_dev=0, n_test=0))
    return [record for record in corpus if record.split == "train"]


def epoch(batches: PackedBatches, number: int = 0) -> list[dict]:
    """The batches of one epoch."""
    iterator, steps = iter(batches), batches.steps_per_epoch()
    return [next(iterator) for _ in range((number + 1) * steps)][number * steps :]


def conversations(batch) -> list[tuple]:
    """Every (tokens, (position, target id) pairs) in a batch, taken apart token by token."""
    found = []
    for row in range(batch["tokens"].shape[0]):
        segments = batch["segment_ids"][row].tolist()
        for segment in sorted(set(segments) - {0}):
            where = [place for place, other in enumerate(segments) if other == segment]
            assert where == list(range(where[0], where[-1] + 1))  # in one piece
            assert batch["positions"][row, where].tolist() == list(range(len(where)))
            pairs = [
                (int(index) - where[0], int(target))
                for index, target, weight in zip(
                    batch["target_index"][row], batch["target_ids"][row], batch["target_weights"][row], strict=True
                )
                if weight == 1 and where[0] <= index <= where[-1]
            ]
            found.append((tuple(batch["tokens"][row, where].tolist()), tuple(pairs)))
    return found


def expected(examples) -> list[tuple]:
    return [
        (tuple(e["tokens"].tolist()), tuple(zip(e["target_index"].tolist(), e["target_ids"].tolist(), strict=True)))
        for e in examples
    ]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 16), st.integers(1, 15)), min_size=1, max_size=30),
    rows=st.integers(1, 5),
    targets_per_row=st.sampled_from([None, 15, 16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_holds_every_example_once_and_whole(lengths, rows, targets_per_row, seed):
    rng = np.random.default_rng(0)
    examples = []
    for length, targets in lengths:
        tokens = rng.integers(0, 1000, length).astype(np.int32)
        index = np.sort(rng.permutation(length - 1)[:targets]).astype(np.int32)
        examples.append(Example(tokens=tokens, target_index=index, target_ids=tokens[index + 1]))
    batches = PackedBatches(examples, rows=rows, sequence_length=16, targets_per_row=targets_per_row, seed=seed)
    for number in (0, 1):
        found = epoch(batches, number)
        assert sorted(c for batch in found for c in conversations(batch)) == sorted(expected(examples))
        # Nothing counts twice and nothing beside the examples' targets counts.
        assert sum(batch["target_weights"].sum() for batch in found) == sum(len(e["target_ids"]) for e in examples)
        for batch in found:
            assert batch["tokens"].shape == (rows, 16)
            assert batch["target_ids"].shape == (rows, batches.targets_per_row)
            assert set(np.unique(batch["target_weights"])) <= {0, 1}
            assert not batch["tokens"][batch["segment_ids"] == 0].any()


@pytest.mark.parametrize("rows", [1, 4])
def test_the_examples_of_a_batch_can_be_named(rows):
    examples = [Example(tokens=np.full(3 + n % 5, n, np.int32), target_index=np.zeros(1, np.int32),
                        target_ids=np.full(1, n, np.int32)) for n in range(1, 40)]  # fmt: skip
    batches = PackedBatches(examples, rows=rows, sequence_length=16, targets_per_row=None, seed=5)
    iterator = iter(batches)
    for number in range(2 * batches.steps_per_epoch() + 1):  # into the third epoch
        held = {int(token) for token in np.unique(next(iterator)["tokens"])} - {0}
        assert {n + 1 for n in batches.examples_of(number)} == held


@pytest.mark.parametrize("mask_posts", [0.0, 0.7])
def test_processes_hold_the_rows_of_one_batch_between_them(mask_posts):
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(30):
        tokens = rng.integers(1, 1000, int(rng.integers(3, 12))).astype(np.int32)
        examples.append(Example(tokens=tokens, target_index=np.zeros(1, np.int32), target_ids=tokens[1:2], post=(0, 3)))
    common = {"rows": 6, "sequence_length": 16, "targets_per_row": None, "seed": 2, "mask_posts": mask_posts}
    whole = iter(PackedBatches(examples, **common))
    parts = [iter(PackedBatches(examples, **common, local_rows=part)) for part in ([0, 1, 5], [2, 3, 4])]
    for _ in range(6):
        batch, one, other = next(whole), *map(next, parts)
        for name, value in batch.items():
            np.testing.assert_array_equal(value[[0, 1, 5, 2, 3, 4]], np.concatenate([one[name], other[name]]))
    assert batch["tokens"].shape == (6, 16) and one["tokens"].shape == (3, 16)


def test_a_target_is_the_next_token_of_the_same_conversation(tokenizer, records):
    examples, _ = encode_records(records, tokenizer, 256)
    for batch in epoch(PackedBatches(examples, rows=3, sequence_length=256, targets_per_row=None, seed=0)):
        rows, slots = np.nonzero(batch["target_weights"])
        index = batch["target_index"][rows, slots]
        np.testing.assert_array_equal(batch["target_ids"][rows, slots], batch["tokens"][rows, index + 1])
        np.testing.assert_array_equal(batch["segment_ids"][rows, index], batch["segment_ids"][rows, index + 1])
        np.testing.assert_array_equal(batch["positions"][rows, index] + 1, batch["positions"][rows, index + 1])


def test_targets_are_the_answer_and_the_stop_token_and_nothing_of_the_prompt(tokenizer, records):
    examples, too_long = encode_records(records, tokenizer, 512)
    assert not too_long and len(examples) == len(records)
    for record, found in zip(records, examples, strict=True):
        ids = found["target_ids"].tolist()
        assert ids[-1] == tokenizer.stop_id
        assert tokenizer.decode(ids[:-1], skip_special=False) == "\n" + record.answer()
        prompt = tokenizer.prompt_ids(record.prompt)
        assert found["tokens"][: len(prompt)].tolist() == list(prompt)
        assert found["target_index"].min() == len(prompt) - 1  # <|assistant|> predicts the first answer token
        assert len(prompt) + len(ids) == len(found["tokens"])


def test_the_order_of_the_answer_is_the_callers(tokenizer, records):
    first, _ = encode_records(records, tokenizer, 512, order="label_first")
    second, _ = encode_records(records, tokenizer, 512, order="explanation_first")
    assert [len(e["tokens"]) for e in first] != [] and expected(first) != expected(second)


def test_over_long_examples_are_reported_and_never_cut(tokenizer, records):
    whole, _ = encode_records(records, tokenizer, 512)
    lengths = [len(e["tokens"]) for e in whole]
    limit = int(np.median(lengths))
    kept, too_long = encode_records(records, tokenizer, limit)
    assert too_long == [r.id for r, n in zip(records, lengths, strict=True) if n > limit] and too_long
    assert expected(kept) == expected([e for e, n in zip(whole, lengths, strict=True) if n <= limit])
    with pytest.raises(InputError, match=f"none of {len(records)} records fits into sequence_length = 8"):
        encode_records(records, tokenizer, 8)
    with pytest.raises(InputError, match="no training records"):
        encode_records([], tokenizer, 8)


def test_pre_training_trains_whole_posts_and_the_answers_of_chats(tokenizer, caplog):
    chats = [("What is said?", "A long answer " * 3), ("短问题", "短")]
    (post,) = encode_posts(["今天下雨。"], tokenizer, 64)
    np.testing.assert_array_equal(post["target_index"], np.arange(len(post["tokens"]) - 1))
    np.testing.assert_array_equal(post["target_ids"], post["tokens"][1:])
    found = encode_chats(chats, tokenizer, 64)
    for item, (user, _) in zip(found, chats, strict=True):
        assert item["target_index"][0] == len(tokenizer.prompt_ids(user)) - 1
        assert item["target_ids"][-1] == tokenizer.stop_id
    assert not caplog.records
    limit = len(found[1]["tokens"])
    with caplog.at_level(logging.WARNING):
        assert expected(encode_chats(chats, tokenizer, limit)) == expected(found[1:2])
    assert "1 of 2 pre-training texts are longer than sequence_length" in caplog.text
    with pytest.raises(InputError, match="none of 2 pre-training texts fits"):
        encode_chats(chats, tokenizer, 3)
    with pytest.raises(InputError, match="no pre-training texts"):
        encode_posts([], tokenizer, 3)


def test_the_first_token_is_never_a_target():
    found = example(Encoded((5, 6, 7), (True, False, True)))
    assert found["target_index"].tolist() == [1] and found["target_ids"].tolist() == [7]


def test_epochs_differ_in_order_and_the_seed_decides_it():
    examples = tiny_examples(60)

    def batches(seed: int) -> PackedBatches:
        return PackedBatches(examples, rows=4, sequence_length=32, targets_per_row=None, seed=seed)

    def order(batches: PackedBatches, number: int) -> list[tuple]:
        return [c for batch in epoch(batches, number) for c in conversations(batch)]

    first, second = order(batches(0), 0), order(batches(0), 1)
    assert first != second and sorted(first) == sorted(second)
    assert order(batches(0), 0) == first
    assert order(batches(1), 0) != first
    # Shuffled, not in the order of the file: neighbours of the file are rarely neighbours of a row.
    assert order(batches(0), 0) != expected(examples)


@pytest.mark.parametrize("done", [0, 1, 11])
def test_a_restored_iterator_goes_on_with_the_same_batches(done):
    examples = [dict(item, post=(0, 3)) for item in tiny_examples(50)]
    settings = {
        "rows": 5,
        "sequence_length": 32,
        "targets_per_row": None,
        "seed": 3,
        "mask_posts": 0.5,
        "neutral_id": 7,
    }
    batches = PackedBatches(examples, **settings)
    assert 0 < batches.steps_per_epoch() < 11  # the last case is beyond the first epoch
    iterator = iter(batches)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = [next(iterator) for _ in range(8)]
    other = iter(PackedBatches(examples, **settings))
    next(other)
    other.set_state(state)
    for expected_batch in wanted:
        found = next(other)
        for name, value in expected_batch.items():
            np.testing.assert_array_equal(found[name], value)


def test_targets_capacity():
    examples = tiny_examples(60)
    most = max(len(e["target_ids"]) for e in examples)
    tight = PackedBatches(examples, rows=4, sequence_length=128, targets_per_row=most, seed=0)
    roomy = PackedBatches(examples, rows=4, sequence_length=128, targets_per_row=128, seed=0)
    for batches in (tight, roomy):
        for batch in epoch(batches):
            assert batch["target_ids"].shape == (4, batches.targets_per_row)
            assert (batch["target_weights"].sum(axis=1) <= batches.targets_per_row).all()
    assert tight.lengths.rows > roomy.lengths.rows  # the second capacity really limited the rows
    with pytest.raises(InputError, match=f"targets_per_row = {most - 1}, but an example has {most} answer tokens"):
        PackedBatches(examples, rows=4, sequence_length=128, targets_per_row=most - 1, seed=0)
    # By itself: room for the data's share and a quarter more, but always for the largest example.
    share = sum(len(e["target_ids"]) for e in examples) / sum(len(e["tokens"]) for e in examples)
    chosen = PackedBatches(examples, rows=4, sequence_length=512, targets_per_row=None, seed=0).targets_per_row
    assert 1.25 * share * 512 <= chosen < 1.25 * share * 512 + 32
    lone = [*tiny_examples(200, longest=4), examples[0]]
    assert PackedBatches(lone, rows=4, sequence_length=24, targets_per_row=None, seed=0).targets_per_row <= 24


def test_lengths_are_what_packing_did():
    examples = tiny_examples(60)
    batches = PackedBatches(examples, rows=4, sequence_length=64, targets_per_row=64, seed=0)
    found = epoch(batches)
    filled = sum(int((batch["segment_ids"].max(axis=1) > 0).sum()) for batch in found)
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in found)
    assert batches.lengths.rows == filled and batches.steps_per_epoch() == len(found) == -(-filled // 4)
    assert batches.lengths.efficiency == pytest.approx(tokens / (filled * 64)) and batches.lengths.efficiency > 0.9
    assert (batches.lengths.examples, batches.lengths.longest) == (60, max(len(e["tokens"]) for e in examples))


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(InputError, match="nothing to train on: 0 examples"):
        PackedBatches([], rows=1, sequence_length=8, targets_per_row=None, seed=0)
    silent = example(Encoded((5, 6), (False, False)))
    with pytest.raises(InputError, match="nothing to train on: 1 examples without any answer token"):
        PackedBatches([silent], rows=1, sequence_length=8, targets_per_row=None, seed=0)
    longer = example(Encoded(tuple(range(9)), (True,) * 9))
    with pytest.raises(InputError, match="sequence_length = 8, but an example has 9 tokens"):
        PackedBatches([longer], rows=1, sequence_length=8, targets_per_row=None, seed=0)


def test_fingerprint_sees_every_token_target_and_the_order():
    examples = tiny_examples(5)
    reference = fingerprint(examples)
    assert fingerprint(tiny_examples(5)) == reference
    assert fingerprint(examples[::-1]) != reference != fingerprint(examples[:-1])
    for name in ("tokens", "target_index", "target_ids"):
        changed = [dict(item) for item in examples]
        changed[3][name] = changed[3][name] + np.array([0] * (len(changed[3][name]) - 1) + [1], np.int32)
        assert fingerprint(changed) != reference
    spans = {fingerprint([dict(item, post=(1, end)) for item in examples]) for end in (1, 2)}
    assert len(spans | {reference}) == 3


def test_masking_blanks_post_tokens_only_and_repeats_itself(tokenizer):
    records = make_corpus(SyntheticConfig(n_train=20, n_dev=0, n_test=0, tasks=("suicide_risk",)))
    examples, _ = encode_records(records, tokenizer, 256)
    for item, record in zip(examples, records, strict=True):
        a, b = item["post"]
        said = tokenizer.decode(item["tokens"][a:b].tolist())
        assert said in record.post
        assert len(said) >= len(record.post) - 4  # tokens that also hold a quotation mark stay out
    settings = {"rows": 4, "sequence_length": 256, "targets_per_row": None, "seed": 5}
    plain = PackedBatches(examples, **settings)
    masked = PackedBatches(examples, **settings, mask_posts=0.8, neutral_id=tokenizer.pad_id)
    rates = []
    for one, other, again in zip(*(itertools.islice(b, 12) for b in (plain, masked, masked)), strict=True):
        changed = one["tokens"] != other["tokens"]
        assert not (changed & ~one["is_post"]).any()
        assert (other["tokens"][changed] == tokenizer.pad_id).all()
        np.testing.assert_array_equal(other["tokens"], again["tokens"])
        np.testing.assert_array_equal(one["target_ids"], other["target_ids"])
        real = one["is_post"].any(axis=1)
        rates += list(changed.sum(axis=1)[real] / one["is_post"].sum(axis=1)[real])
    assert 0.3 < np.mean(rates) < 0.5  # U(0, 0.8)
    assert min(rates) < 0.1 < 0.7 < max(rates)
