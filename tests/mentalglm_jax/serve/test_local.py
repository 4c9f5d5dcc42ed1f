"""Chats in this process: several at a time say what each says alone, in any event loop, and refuse like it."""

import asyncio

import pytest

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.inference.decode import generate_ids
from mentalglm_jax.inference.generate import answer_text
from mentalglm_jax.serve.local import LocalChats
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

ROOM = 12


@pytest.fixture(scope="module")
def model(hf):
    return hf.to_jax(hf.model(vocab_size=4096))


@pytest.fixture(scope="module")
def tokenizer() -> GlmTokenizer:
    return GlmTokenizer.load(BUILTIN)


def chats(model, tokenizer, rows=4, temperature=0.0) -> LocalChats:
    return LocalChats(model, tokenizer, rows=rows, max_tokens=ROOM, temperature=temperature)


def asked(length: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "a b " * length}]


def together(found: LocalChats, lengths, seed=3):
    async def run():
        return await asyncio.gather(*(found.complete(found.prompt(asked(length)), seed) for length in lengths))

    return asyncio.run(run())


def alone(model, tokenizer, length, temperature, seed=3):
    prompt = tokenizer.ask_ids(asked(length))
    (ids,) = generate_ids(model, [prompt], max_new_tokens=ROOM, eos_ids=tokenizer.eos_ids, temperature=temperature,
                          seed=seed, vocab_limit=tokenizer.vocab_size)  # fmt: skip
    ended = ids[-1] in tokenizer.eos_ids
    return answer_text(tokenizer, ids), "stop" if ended else "length", len(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_chats_than_rows_say_what_each_says_alone(model, tokenizer, temperature):
    lengths = (1, 7, 2, 11, 3, 5)
    found = together(chats(model, tokenizer, temperature=temperature), lengths)
    assert found == [alone(model, tokenizer, length, temperature) for length in lengths]
    assert len({one[0] for one in found}) > 1


def test_they_share_the_steps_of_one_batch(model, tokenizer, monkeypatch):
    one = chats(model, tokenizer)
    step, steps = one._batch.step, []
    monkeypatch.setattr(one._batch, "step", lambda: (steps.append(len(one._batch)), step())[1])
    together(one, (1, 2, 3, 4))
    assert max(steps) == 4 and len(steps) < 2 * ROOM  # one after the other they would take four times ROOM


def test_another_event_loop_finds_it_ready(model, tokenizer):
    """Also after one that was left while answers were under way."""
    found = chats(model, tokenizer, rows=1)

    async def left():
        async with asyncio.timeout(0.05):
            await asyncio.gather(*(found.complete(found.prompt(asked(length)), 0) for length in range(1, 200)))

    with pytest.raises(TimeoutError):
        asyncio.run(left())
    for _ in range(2):
        assert together(found, (2,)) == [alone(model, tokenizer, 2, 0.0)]


def test_a_chat_without_room_is_refused_and_the_others_are_answered(model, tokenizer):
    found = chats(model, tokenizer)

    async def run():
        return await asyncio.gather(
            *(found.complete(found.prompt(asked(length)), 0) for length in (model.config.max_position_embeddings, 2)),
            return_exceptions=True,
        )  # fmt: skip

    refused, answered = asyncio.run(run())
    assert isinstance(refused, InputError) and "needs room for 12 more (max_tokens)" in str(refused)
    assert answered == alone(model, tokenizer, 2, 0.0)


def test_room_is_what_the_context_leaves(model, tokenizer):
    most = model.config.max_position_embeddings
    assert chats(model, tokenizer).room == most - ROOM
    with pytest.raises(InputError, match=f"max_tokens {most}: leaves no room"):
        LocalChats(model, tokenizer, rows=1, max_tokens=most, temperature=0.0)


def test_a_device_that_fails_is_said_with_what_takes_less(model, tokenizer, monkeypatch):
    found = chats(model, tokenizer)

    def failing():
        raise MemoryError("RESOURCE_EXHAUSTED: 7 GiB")

    monkeypatch.setattr(found._batch, "step", failing)
    with pytest.raises(RunError, match=r"the model failed \(MemoryError: RESOURCE_EXHAUSTED.*a smaller concurrency"):
        together(found, (2,))
    monkeypatch.undo()
    assert together(found, (2,)) == [alone(model, tokenizer, 2, 0.0)]
