"""Servers that a teacher's address may lead to, against `mentalglm data build`: time, size, costs, thinking."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mentalglm_jax.data.explain import endpoint
from mentalglm_jax.data.explain.teacher import AnswerCache
from mentalglm_jax.data.records import write_records
from tests.hostile.attack import refused
from tests.hostile.teacher_world import KEY, World, accepted, counted, said
from tests.mentalglm_jax.data.explain.test_build import post, records
from tests.mentalglm_jax.endpoint import behaving, bomb, completion, dripping, endless, failing, oracle, saying


@pytest.fixture
def world(tmp_path, capsys, monkeypatch) -> World:
    monkeypatch.setenv("HOSTILE_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return World(tmp_path, capsys)


# --- time and size ---


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (dripping(0.05), r"in 2 tries, last: timeout \(0\.5 s\)"),
        (dripping(0.05, "headers"), r"last: timeout \(0\.5 s\)"),
    ],
    ids=["the body drips", "the headers drip"],
)
def test_a_server_that_never_ends_is_left(world, behaviour, says):
    with behaving(default=behaviour) as server:
        refused(world.build(server.url, timeout=0.5), says, code=1, seconds=60)
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [200, 500, 400])
def test_a_body_without_end_is_left_at_its_bound(world, status):
    sent: list[int] = []
    with behaving(default=endless(status, sent)) as server:
        refused(world.build(server.url), "last: an answer of over 8 MiB", code=1)
    assert sum(sent) < 2 * (48 << 20)  # two tries: what was read, and what the sockets hold


def test_a_body_that_unpacks_without_end_is_left(world):
    with behaving(default=bomb(64)) as server:
        refused(world.build(server.url), "last: an answer of over 8 MiB", code=1)


@pytest.mark.parametrize("asks", ["nan", "inf", "-5", "1e308", "9" * 400, "soon", "Wed, 21 Oct 1815 07:28:00 GMT"])
def test_what_the_server_asks_to_wait_is_bounded(world, monkeypatch, asks):
    monkeypatch.setattr(endpoint, "_LONGEST_WAIT", 0.2)  # two minutes are too long for a test
    with behaving(failing(429, {"error": {"message": "slow"}}, retry_after=asks)) as server:
        began = time.monotonic()
        outcome = world.build(server.url)
    assert accepted(outcome)["teacher"] == {"asked": 3, "rate limit": 1} and time.monotonic() - began < 100


def test_an_answer_longer_than_its_tokens_is_cut(world):
    with behaving(said("长" * 2**20)) as server:
        accepted(world.build(server.url, max_tokens=64))
    (row,) = map(json.loads, (world.folder / "out" / "rejected.jsonl").read_text("utf-8").splitlines())
    assert len(row["answer"]) == 64 * 64 and row["finish"] == "length"


# --- answers that are none ---


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"choices": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001,
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}",
        b"\xff\xfe\x00",
        b"",
        b"[]",
        b'"text"',
        b"null",
        b'{"choices": [null]}',
        b'{"choices": [[]]}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [{"message": "text"}]}',
        b'{"choices": [{"message": {"content": {"a": 1}}}]}',
        b'{"choices": [{"message": {"content": 5}, "finish_reason": {}}], "usage": [1]}',
        b"<html><title>Login</title></html>",
    ],
    ids=["deep list", "deep object", "5,000 digits", "no text", "empty", "list", "string", "null", "null choice",
         "list choice", "object choices", "text message", "object content", "number content", "html"],
)  # fmt: skip
def test_an_answer_that_is_none_costs_no_other(world, body):
    """It is asked for again; what comes meanwhile is kept."""
    with behaving(saying(body)) as server:
        manifest = accepted(world.build(server.url, concurrency=3))
        assert len(server.requests) == 4
    assert manifest["teacher"] == {"asked": 3, "malformed answer": 1} and manifest["records"]["accepted"] == 3


@pytest.mark.parametrize("text", ["\ud83d", "好\udc00好", "\x00\x1b[31m", "\u202e", "x" * 10_000, "“" * 4000])
def test_whatever_an_answer_says_it_is_kept_and_no_other_lost(world, text):
    def slow(asked: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.3)
        return completion(asked, oracle(asked["messages"]))

    with behaving(said(text), default=slow) as server:
        manifest = accepted(world.build(server.url, concurrency=3))
        assert accepted(world.build(server.url))["teacher"] == {"cached": 3} and len(server.requests) == 3
    assert manifest["records"] == {"asked": 3, "accepted": 2, "rejected": 1, "filtered": 0, "too_long": 0}


@pytest.mark.parametrize("broken", ["\ud83d", "\x00", "\x1b[31m", "\u202e"], ids=ascii)
def test_no_broken_character_becomes_data(world, broken):
    with behaving(lambda asked: completion(asked, oracle(asked["messages"]) + broken)) as server:
        manifest = accepted(world.build(server.url))
    assert manifest["records"]["accepted"] == 2 and manifest["checks"]["whole_characters"]["passed"] == 2


def test_an_interrupted_build_keeps_what_is_under_way(world):
    """Ctrl-C while three answers are being written: all are kept, the build goes on for the price of the rest."""

    interrupted = threading.Event()

    def slow(asked: dict[str, Any]) -> dict[str, Any]:
        interrupted.wait(600)
        return completion(asked, oracle(asked["messages"]))

    write_records(world.folder / "posts.jsonl", records(9))
    with behaving(default=slow) as server:
        program = [str(Path(sys.executable).with_name("mentalglm")), "data", "build"]
        process = subprocess.Popen([*program, world.recipe(server.url, {"concurrency": 3})], stderr=subprocess.PIPE)
        while len(server.requests) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        threading.Timer(5, interrupted.set).start()  # it says nothing until they are there
        _, err = process.communicate(timeout=600)
        assert process.returncode == 1 and b"interrupted; what was finished is kept" in err and b"Traceback" not in err
        assert len(server.requests) == 3 and world.paid() == 3


def test_a_failure_of_any_kind_loses_no_answer_under_way(world, monkeypatch):
    """Here of the program itself: the disk is full for one answer alone."""
    put, full = AnswerCache.put, []

    def once(self: AnswerCache, *entry: Any) -> None:
        if not full:
            full.append(1)
            raise OSError(28, "No space left on device")
        put(self, *entry)

    all_there = threading.Barrier(3)

    def together(asked: dict[str, Any]) -> dict[str, Any]:
        all_there.wait(600)
        return completion(asked, oracle(asked["messages"]))

    monkeypatch.setattr(AnswerCache, "put", once)
    with behaving(together, together, together) as server:
        assert world.build(server.url, concurrency=3).code == 1
        assert len(server.requests) == 3 and world.paid() == 2
        assert accepted(world.build(server.url))["teacher"] == {"asked": 1, "cached": 2}


# --- what it says it cost ---


@pytest.mark.parametrize(
    "count", [-(10**6), 0, True, 1e30, 10**30, "7", None, float("nan"), float("inf"), [1]], ids=str
)
def test_no_usage_lifts_a_cap(world, count):
    with behaving(default=counted(prompt_tokens=count, completion_tokens=count)) as server:
        most = 9000  # three prompts take some 3,000 bytes each
        refused(world.build(server.url, max_total_tokens=most), "the budget is spent", code=1)
        assert len(server.requests) <= 2
        seen = len(server.requests)
        refused(world.build(server.url, max_total_tokens=most), "the budget is spent", code=1)
        assert len(server.requests) == seen


def test_a_try_that_was_sent_and_never_answered_counts(world):
    with behaving(default=dripping(0.05)) as server:
        refused(world.build(server.url, timeout=0.3, retries=50, max_total_tokens=9000), "the budget is spent", code=1)
        assert len(server.requests) <= 2


@pytest.mark.parametrize("lie", ["negative", "text", "another request's", "deep", "list", "fifo", "half"])
def test_a_cache_that_somebody_changed_lifts_no_cap_and_hangs_nothing(world, lie):
    with behaving() as server:
        accepted(world.build(server.url))
        file = sorted((world.folder / "cache").glob("??/*.json"))[0]
        kept = json.loads(file.read_text("utf-8"))
        if lie == "negative":
            kept["answer"]["prompt_tokens"] = -(10**9)
        elif lie == "text":
            kept["answer"]["text"] = 5
        elif lie == "another request's":
            kept["asked"]["model"] = "other"
        data = {"deep": "[" * 100_000, "list": "[]", "half": json.dumps(kept)[:50]}.get(lie, json.dumps(kept))
        file.unlink()
        if lie == "fifo":
            os.mkfifo(file)
        else:
            file.write_text(data, encoding="utf-8")
        (file.parent.parent / "unused").mkdir()
        (file.parent.parent / "unused" / "x.json").write_text('{"prompt_tokens": -9e9, "completion_tokens": -9}')
        assert accepted(world.build(server.url, max_total_tokens=100_000))["teacher"] == {"asked": 1, "cached": 2}


# --- thinking ---


@pytest.mark.parametrize(
    "spent",
    [
        said(None, "length"),
        said("", "length", reasoning_content="想想…"),
        said("<think>想想", "length"),
        said("  \n<THINKING>想", "length"),
        said(None, "max_tokens"),
        said("<|channel>thought\n想", "MAX_TOKENS"),
    ],
    ids=["null", "empty beside the thinking", "in its tag", "another tag", "max_tokens", "Gemma"],
)
def test_thinking_that_used_all_tokens_is_paid_once_and_told(world, spent):
    with behaving(default=spent) as server:
        for _ in range(2):
            refused(
                world.build(server.url, retries=6), r"used all 512 tokens before it wrote .* raise teacher\.max_tok", 1
            )
            assert len(server.requests) == 1 and world.paid() == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_post_thought_about_too_long_is_rejected_where_others_are_answered(world, at):
    calls = []

    def one(asked: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        long = post(at)[:8] in asked["messages"][-1]["content"]
        return completion(asked, None, "length") if long else completion(asked, oracle(asked["messages"]))

    with behaving(default=one) as server:
        first = world.build(server.url, concurrency=3)
        manifest = accepted(first if first.code == 0 else world.build(server.url, concurrency=3))
    assert manifest["records"]["accepted"] == 2 and len(calls) == 3


@pytest.mark.parametrize(
    "thinking",
    [
        "<think>\n想“什么”\n</think>\n\n",
        "想想</think>",
        "<thinking>x</thinking>",
        "[THINK]x[/THINK]",
        "◁think▷x◁/think▷",
        "<|START_THINKING|>x<|END_THINKING|>",
        "<|channel>thought\nx<channel|>",
        "<think>x</think>\n<answer>",
    ],
)
def test_thinking_before_the_answer_is_no_part_of_it(world, thinking):
    with behaving(default=lambda asked: completion(asked, thinking + oracle(asked["messages"]))) as server:
        manifest = accepted(world.build(server.url))
    assert manifest["records"]["accepted"] == 3
    assert "think" not in (world.folder / "out" / "records" / "train.jsonl").read_text("utf-8").lower()


def test_an_answer_in_parts_is_its_text(world):
    def parts(asked: dict[str, Any]) -> dict[str, Any]:
        text = oracle(asked["messages"])
        return completion(asked, [{"type": "thinking", "thinking": [{"text": "x"}]}, {"type": "text", "text": text}, 5])

    with behaving(default=parts) as server:
        assert accepted(world.build(server.url))["records"]["accepted"] == 3
