"""Prompts that join and leave a batch under way say what they say alone; text comes out of tokens piece by piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.continuous import ContinuousBatch, Wanted, cache_bytes
from mentalglm_jax.inference.decode import generate_ids
from mentalglm_jax.inference.generate import answer_text, generate
from mentalglm_jax.inference.spoken import Spoken
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text.chat_formats import GLM
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from tests.mentalglm_jax.inference.test_generate import EOS, ragged


@pytest.fixture(scope="module")
def tiny(hf) -> Glm:
    return hf.to_jax(hf.model())


@functools.cache
def builtin(trail: bool = False) -> GlmTokenizer:
    """With ``trail`` an answer is closed by a space, as Llama 2's."""
    found = GlmTokenizer.load(BUILTIN)
    if trail:
        found.chat_format = dataclasses.replace(GLM, assistant="<|assistant|>\n{content} <|user|>")
        assert (found.answer_lead, found.answer_trail) == ("\n", " ")
    return found


@pytest.fixture(scope="module")
def tokenizer() -> GlmTokenizer:
    return builtin()


def carried_out(batch: ContinuousBatch, wanted: list[Wanted], at: list[int]) -> list[list]:
    """The tokens of each request; number ``i`` comes before step ``at[i]`` and waits while the batch is full."""
    found: list[list] = [[] for _ in wanted]
    waiting, running, step = sorted(range(len(wanted)), key=lambda i: (at[i], i)), {}, 0

    def give(row, token):
        number = running[row]
        found[number].append(token)
        if token.id in EOS or len(found[number]) == wanted[number].room:
            batch.leave(row)
            del running[row]

    while waiting or running:
        while waiting and at[waiting[0]] <= step and not batch.full:
            row, token = batch.join(wanted[number := waiting.pop(0)])
            running[row] = number
            give(row, token)
        if running:
            for row, token in batch.step().items():
                give(row, token)
        step += 1
    assert len(batch) == 0
    return found


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_whoever_shares_the_batch_greedy_tokens_are_those_of_generate_ids(tiny, rows):
    prompts, rng = ragged(12, 70, seed=5), np.random.default_rng(rows)
    rooms = [int(rng.choice([1, 5, 20, 60])) for _ in prompts]
    alone = [generate_ids(tiny, [prompt], max_new_tokens=room, eos_ids=EOS)[0]
             for prompt, room in zip(prompts, rooms, strict=True)]  # fmt: skip
    assert {len(one) for one in alone} > {1, 60}  # some run long, across a column past the last
    wanted = [Wanted(prompt, room) for prompt, room in zip(prompts, rooms, strict=True)]
    found = carried_out(ContinuousBatch(tiny, rows=rows), wanted, rng.integers(0, 90, len(prompts)).tolist())
    assert [[token.id for token in one] for one in found] == alone


def test_the_cache_moves_when_its_columns_run_out(tiny):
    """A short-lived row beside ever new ones: the column to write reaches the end of the cache again and again."""
    prompts = ragged(24, 12, seed=2)
    wanted = [Wanted(prompt, 25) for prompt in prompts]
    batch = ContinuousBatch(tiny, rows=2)
    slots = set()
    step = batch.step

    def noted():
        slots.add((batch._length, batch._cache.segment_ids.shape[1]))
        return step()

    batch.step = noted
    found = carried_out(batch, wanted, [7 * i for i in range(24)])
    assert any(length == size for length, size in slots)
    assert max(size for _, size in slots) <= 64
    alone = generate_ids(tiny, prompts, max_new_tokens=25, eos_ids=EOS)
    assert [[token.id for token in one] for one in found] == alone


def test_after_every_move_a_row_sees_its_own_tokens_and_no_more(tiny):
    """A row that is left keeps its columns, and moves carry these round the edge: none comes into a living row."""
    batch, moves, carried = ContinuousBatch(tiny, rows=2), 0, False
    short, long = [5, 6, 7], [5, *[7] * 59]

    def look():
        segments = np.asarray(batch._cache.segment_ids)
        for number, row in batch._rows.items():
            own = np.zeros(segments.shape[1], int)
            own[batch._length - row.used : batch._length] = 1
            np.testing.assert_array_equal(segments[number], own)
        return bool(segments[[one for one in range(len(segments)) if one not in batch._rows], batch._length :].any())

    batch.join(Wanted(short, 110))
    for more in (20, 45, 5):
        second, _ = batch.join(Wanted(long, 30))
        look()
        batch.step()
        batch.leave(second)
        for _ in range(more):
            before = batch._length
            batch.step()
            moves += batch._length <= before
            carried |= look()
    assert moves == 1 and carried


@pytest.mark.parametrize(("rows", "context"), [(1, 2), (3, 90), (4, 33), (5, 100)])
def test_the_largest_cache_is_known_beforehand(tiny, rows, context):
    batch, largest = ContinuousBatch(tiny, rows=rows), 0
    for count in [max(1, context // 3)] * (rows - 1) + [context - 1]:
        batch.join(Wanted([5] * count, context - count))
        largest = max(largest, sum(x.nbytes for x in jax.tree.leaves(batch._cache)))
    assert largest == cache_bytes(tiny, rows, context)


def test_draws_are_those_of_generate_ids_with_the_same_seed(tiny):
    prompts = ragged(6, 20, seed=3)
    options = [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_p": 0.3},
               {}, {"temperature": 1.0}]  # fmt: skip
    alone = [generate_ids(tiny, [prompt], max_new_tokens=12, eos_ids=EOS, seed=seed, **one)[0]
             for seed, (prompt, one) in enumerate(zip(prompts, options, strict=True))]  # fmt: skip
    wanted = [Wanted(prompt, 12, seed=seed, **one)
              for seed, (prompt, one) in enumerate(zip(prompts, options, strict=True))]  # fmt: skip
    found = carried_out(ContinuousBatch(tiny, rows=4), wanted, [0, 0, 3, 1, 8, 2])
    assert [[token.id for token in one] for one in found] == alone
    greedy = generate_ids(tiny, prompts, max_new_tokens=12, eos_ids=EOS)
    assert sum(a != b for a, b in zip(alone, greedy, strict=True)) >= 3


def test_log_probabilities_are_those_of_a_plain_forward_pass(tiny):
    prompts = ragged(4, 20, seed=4)
    wanted = [Wanted(prompt, 6, told=told) for prompt, told in zip(prompts, [3, None, 0, 20], strict=True)]
    found = carried_out(ContinuousBatch(tiny, rows=4, vocab_limit=90), wanted, [0, 0, 2, 1])
    for prompt, one, told in zip(prompts, found, [3, None, 0, 20], strict=True):
        if told is None:
            assert all(token.logprob is None and token.others == () for token in one)
            continue
        text = [*prompt, *(token.id for token in one)]
        logits = tiny(jnp.asarray([text[:-1]], jnp.int32))[0, len(prompt) - 1 :, :90]
        expected = np.asarray(jax.nn.log_softmax(logits))
        for row, token in zip(expected, one, strict=True):
            assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
            best = np.argsort(-row)[:told]
            assert [other for other, _ in token.others] == best.tolist()
            assert [value for _, value in token.others] == pytest.approx(row[best].tolist(), abs=1e-4)


def test_a_request_that_does_not_fit_is_refused_and_leaves_no_trace(tiny):
    batch = ContinuousBatch(tiny, rows=2)
    for wanted, says in ((Wanted((), 3), "is empty"), (Wanted((5,), 5000), "context is 4096"),
                         (Wanted((96,), 3), "must be in 0..95")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            batch.join(wanted)
    assert len(batch) == 0 and not batch.full


TEXTS = ["It says: “low”.\n\n我今天很累。🙂🙂 end", "\n\n", "", "ééé\U0001f469\u200d\U0001f469 STOP STO", "ab\ufffdcd"]


@settings(max_examples=60)
@given(st.sampled_from(TEXTS), st.lists(st.sampled_from(["STOP", "。", "\n", "🙂 ", "lo", "\n我"]), max_size=3),
       st.booleans(), st.booleans(), st.lists(st.integers(0, 300), max_size=6))  # fmt: skip
def test_pieces_are_whole_characters_and_together_the_answer(text, stops, led, trail, noise):
    """Also of ids that are no text: bytes in any order."""
    tokenizer = builtin(trail)
    ids = [*tokenizer.encode(("\n" if led else "") + text + "  " * trail), *noise]
    spoken = Spoken(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(spoken.add(token))
        if spoken.stopped:
            break
    pieces.append(spoken.end())
    whole = answer_text(tokenizer, ids)
    untrimmed = tokenizer.decode(ids).removeprefix("\n")
    ends = [at for stop in stops if (at := untrimmed.find(stop)) >= 0]
    assert spoken.stopped == bool(ends)
    assert "".join(piece.text for piece in pieces) == (untrimmed[: min(ends)] if ends else whole)
    assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in whole
    told = [number for piece in pieces for number in piece.tokens]
    assert told == sorted(set(told))
    if not stops and led and text and not noise and not trail:
        spelled = b"".join(tokenizer.bytes_of(ids[number]) for number in told)
        assert spelled.decode() == whole  # every token but the line break that opens the answer


def test_a_stop_text_is_held_back_and_nothing_else(tokenizer):
    spoken = Spoken(tokenizer, ["</end>"])
    said = [spoken.add(token).text for token in tokenizer.encode("\nA < B </en A </end> B")]
    assert "".join(said) == "A < B </en A " and spoken.stopped
    assert said[-1] == "" and spoken.end().text == ""


def test_generate_streams_to_the_last_character(hf, tokenizer):
    """An answer that ends within a character: what `generate` returns is what it streamed."""
    model = hf.to_jax(hf.model(vocab_size=tokenizer.vocab_size, eos_token_id=[tokenizer.vocab_size - 1]))
    heard: list[str] = []
    for room in range(1, 9):
        heard.clear()
        said = generate(model, tokenizer, "我", max_new_tokens=room, temperature=2.0, seed=room,
                        stream=lambda _, piece: heard.append(piece))  # fmt: skip
        assert "".join(heard) == said
