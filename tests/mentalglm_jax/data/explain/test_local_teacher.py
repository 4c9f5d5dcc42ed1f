"""A model on this machine as teacher: the same cache as an endpoint's, and what it depends on."""

import asyncio
import json

import pytest

from mentalglm_jax.data.explain.build import build
from mentalglm_jax.data.explain.teacher import AnswerCache, LocalTeacher
from tests.mentalglm_jax.endpoint import oracle


def quiet(*arguments):
    """No progress shown."""


class Spoken:
    """The oracle as a model on this machine: a character is a token."""

    def __init__(self, room=1 << 20, stops=(0,), shift=0):
        self.room, self.stops, self.shift, self.calls = room, stops, shift, []

    def prompt(self, messages):
        return [ord(letter) + self.shift for letter in json.dumps(messages)]

    async def complete(self, prompt, seed):
        self.calls.append(seed)
        return oracle(json.loads("".join(chr(one - self.shift) for one in prompt))), "stop", 20


def test_a_local_model_teaches_behind_the_same_cache(made):
    chats = Spoken()
    recipe = made(None, teacher={"local": True})
    for expected in ({"asked": 12}, {"cached": 12}):
        teacher = LocalTeacher(recipe.teacher, AnswerCache(recipe.cache), "weights", chats)
        assert build(recipe, quiet, teacher)["teacher"] == expected
    assert chats.calls == [0] * 12
    assert asyncio.run(teacher.ask([{"role": "user", "content": "帖子：“a”\n问题：b\n标签句：c"}], 0)).finish == "stop"


@pytest.mark.parametrize("other", [{"shift": 1}, {"stops": (0, 1)}])
def test_a_tokenizer_put_right_asks_anew(made, other):
    recipe = made(None, teacher={"local": True})
    for chats in (Spoken(), Spoken(**other)):
        teacher = LocalTeacher(recipe.teacher, AnswerCache(recipe.cache), "weights", chats)
        assert build(recipe, quiet, teacher)["teacher"] == {"asked": 12}


def test_posts_without_room_are_rejected_and_counted(made):
    recipe = made(None, teacher={"local": True})
    lengths = []
    whole = Spoken()
    whole.complete = lambda prompt, seed, answer=whole.complete: (lengths.append(len(prompt)), answer(prompt, seed))[1]
    build(recipe, quiet, LocalTeacher(recipe.teacher, AnswerCache(recipe.cache), "whole", whole))
    room = max(lengths) - 1
    teacher = LocalTeacher(recipe.teacher, AnswerCache(recipe.cache), "weights", Spoken(room))
    manifest, longest = build(recipe, quiet, teacher), lengths.count(room + 1)
    assert manifest["records"] == {"asked": 12, "accepted": 12 - longest, "rejected": longest, "filtered": 0,
                                   "too_long": longest}  # fmt: skip
    rejected = (recipe.out / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["finish"] for line in rejected] == ["too_long"] * longest
