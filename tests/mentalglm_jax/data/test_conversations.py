"""Conversations of several turns: read strictly, kept apart from held-out posts, encoded with their targets."""

import json
from functools import cache

import numpy as np
import pytest

from mentalglm_jax.data.batches import encode_conversations
from mentalglm_jax.data.conversations import Conversation, apart_from, read_conversations
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

POST = "I have not slept for a week and nobody at home has noticed it."
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "I am tired."},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "A week. 一周了。"},
    {"role": "assistant", "content": "那很长。 <|user|> That is long."},
]


@cache
def tokenizer() -> GlmTokenizer:
    return GlmTokenizer.load(BUILTIN)


def talk(*contents: str, name: str = "a") -> Conversation:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation(name, tuple(turns))


@pytest.mark.parametrize(("train_on", "said"), [("last", [TALK[4]]), ("all", [TALK[2], TALK[4]])])
def test_targets_are_the_assistants_turns_and_what_ends_them(train_on, said):
    (made,), too_long = encode_conversations([Conversation("a", tuple(TALK))], tokenizer(), 512, train_on)
    assert too_long == [] and made["id"] == "a"
    text = tokenizer().decode(made["tokens"].tolist(), skip_special=False)
    assert text.startswith("[gMASK]<sop><|system|>\nBe kind.<|user|>\nI am tired.<|assistant|>\nSince when?<|user|>")
    np.testing.assert_array_equal(made["tokens"][made["target_index"] + 1], made["target_ids"])
    trained = tokenizer().decode(made["target_ids"].tolist(), skip_special=False)
    assert trained == "".join(f"\n{one['content']}<|user|>" for one in said)


def test_a_long_conversation_is_left_out_whole():
    kept, too_long = encode_conversations([talk("Hi.", "word " * 300, name="long"), talk("Hi.", "Yes.", name="short")],
                                          tokenizer(), 64, "last")  # fmt: skip
    assert [one["id"] for one in kept] == ["short"] and too_long == ["long"]


def test_turns_that_the_format_does_not_have_are_refused_by_name():
    with pytest.raises(InputError, match=r"^conversation 'a': chat message 1: role 'tool' is none of"):
        encode_conversations([Conversation("a", ({"role": "tool", "content": "x"}, TALK[4]))], tokenizer(), 64, "all")


def test_reading(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n\n" + json.dumps({"id": "b", "messages": TALK[1:3]}) + "\n")
    first, second = read_conversations(file)
    assert (first.id, second.id) == ("line 1", "b")
    assert first.messages == tuple(TALK) and second.messages == tuple(TALK[1:3])


BAD = {
    "a list": ([], "expected a JSON object, got list"),
    "another key": ({"messages": TALK, "label": "low"}, "unknown field 'label'"),
    "no turns": ({"messages": []}, "expected a list of turns"),
    "a text": ({"messages": "Hi."}, "expected a list of turns"),
    "a turn without role": ({"messages": [{"content": "x"}]}, "turn 1 must have role and content"),
    "a tool call": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}, "turn 1 must have role"),
    "an empty turn": ({"messages": [TALK[1], {"role": "assistant", "content": " "}]}, "turn 2 must be text"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 1 must be text"),
    "no answer": ({"messages": TALK[:2]}, "last turn must be the assistant's"),
    "an id that is a number": ({"id": 5, "messages": TALK}, "id: expected text"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_row_that_is_none_is_refused_with_file_and_line(tmp_path, bad):
    row, says = bad
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"talks\.jsonl:2: .*{says}"):
        read_conversations(file)


def test_files_that_hold_none(tmp_path):
    file = tmp_path / "talks.jsonl"
    with pytest.raises(InputError, match="no such file"):
        read_conversations(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no conversation"):
        read_conversations(file)
    file.write_text(2 * (json.dumps({"id": "a", "messages": TALK}) + "\n"))
    with pytest.raises(InputError, match=r"talks\.jsonl:2: id 'a' stands twice"):
        read_conversations(file)


def held_out(*posts: str) -> list[Record]:
    return [Record(f"r{n}", "suicide_risk", "en", post, "High or low?", "low", split="test")
            for n, post in enumerate(posts)]  # fmt: skip


KEPT = {
    "nothing alike": (talk("It rains.", "Yes."), True),
    "the post": (talk(POST, "Oh."), False),
    "the post in another dress": (talk(POST.upper().replace(".", "!!"), "Oh."), False),
    "the post within a prompt": (talk(f'Consider this post: "{POST}" What is it?', "Oh."), False),
    "the post quoted by the assistant": (talk("Read it to me.", f"It says: {POST}"), False),
    "the post in a later turn": (talk("Hi.", "Hello.", POST, "Oh."), False),
    "nearly the post": (talk(POST.replace("noticed it", "noticed that"), "Oh."), False),
    "a short post": (talk("So tired.", "Oh."), False),
    "a short post within a turn": (talk("I am so tired today.", "Oh."), True),
}


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT.keys())
def test_no_held_out_post_is_trained_on(case):
    one, stays = case
    found, gone = apart_from([one], held_out(POST, "So tired", POST))
    assert (found == [one], gone) == (stays, 0 if stays else 1)
