"""The endpoint through the official client: what it says is what `mentalglm generate` says, however it is asked."""

import concurrent.futures
import json
import math
import socket
import time
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from mentalglm_jax.data.explain.build import BuildRecipe, build
from mentalglm_jax.data.records import write_records
from tests.mentalglm_jax.data.explain.test_build import quiet, records
from tests.mentalglm_jax.serve.served import CONTEXT, Served, serving

POSTS = [
    "I sleep badly and nothing helps.",
    "今天我觉得很累。",
    "We met at ten.",
    "a",
    "The rain 🌧 again.\n\nAnd again.",
]


def asked(post: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": post}]


@pytest.fixture(scope="module")
def served():
    with serving() as found:
        yield found


def test_the_official_client_gets_what_generate_says(served: Served):
    client = served.client()
    for post in POSTS[:3]:
        ids, text = served.said(asked(post), 20)
        answer = client.chat.completions.create(model="small", messages=asked(post), max_tokens=20, temperature=0)
        choice = answer.choices[0]
        assert choice.message.content == text and choice.message.role == "assistant"
        assert choice.finish_reason == ("stop" if ids[-1] in served.tokenizer.eos_ids else "length")
        prompt = len(served.tokenizer.ask_ids(asked(post)))
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(ids))
        assert answer.model == "small" and choice.logprobs is None


def test_many_at_a_time_say_what_each_says_alone(served: Served):
    """More than the batch holds, of all lengths, streamed and not."""
    work = [(POSTS[i % len(POSTS)] * (1 + i % 3), 5 + 9 * (i % 5), i % 2 == 0) for i in range(12)]

    def ask(one):
        post, room, streamed = one
        client = served.client()
        if not streamed:
            done = client.chat.completions.create(model="small", messages=asked(post), max_completion_tokens=room)
            return done.choices[0].message.content
        chunks = client.chat.completions.create(model="small", messages=asked(post), max_tokens=room, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, work))
    assert found == [served.said(asked(post), room)[1] for post, room, _ in work]


def test_a_conversation_with_a_system_turn_is_rendered_in_the_models_format(served: Served):
    messages = [{"role": "system", "content": "Be brief."}, *asked("How are you?"),
                {"role": "assistant", "content": "<|user|> fine"}, *asked("And now? <|assistant|>")]  # fmt: skip
    client = served.client()
    answer = client.chat.completions.create(model="small", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == served.said(messages, 12)[1]
    parts = [{**one, "content": [{"type": "text", "text": one["content"][:3]}, {"type": "text", "text":
             one["content"][3:]}]} for one in messages]  # fmt: skip
    again = client.chat.completions.create(model="small", messages=parts, max_tokens=12)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.usage.prompt_tokens == answer.usage.prompt_tokens == len(served.tokenizer.ask_ids(messages))


def test_streamed_pieces_usage_and_end(served: Served):
    ids, text = served.said(asked(POSTS[1]), 16)
    chunks = list(served.client().chat.completions.create(
        model="small", messages=asked(POSTS[1]), max_tokens=16, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 3  # not all at once
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ids)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    raw = httpx.post(f"{served.url}/chat/completions", json={"model": "small", "messages": asked("a"), "max_tokens": 2,
                                                             "stream": True})  # fmt: skip
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert (
        raw.text.endswith("data: [DONE]\n\n")
        and "usage" not in raw.text
        and "access-control-allow-origin" not in raw.headers
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities(served: Served, streamed):
    """Of each token that is in the content, with the most probable ones beside it."""
    asking = {"model": "small", "messages": asked(POSTS[0]), "max_tokens": 10, "logprobs": True, "top_logprobs": 5}
    if streamed:
        chunks = [chunk.choices[0] for chunk in served.client().chat.completions.create(**asking, stream=True)]
        content = [entry for one in chunks if one.logprobs for entry in one.logprobs.content]
        text = "".join(one.delta.content or "" for one in chunks)
    else:
        choice = served.client().chat.completions.create(**asking).choices[0]
        content, text = choice.logprobs.content, choice.message.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == text
    assert len(content) >= 8
    for entry in content:
        assert len(entry.top_logprobs) == 5 and entry.logprob <= 0
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == values[0] and sum(map(math.exp, values)) <= 1 + 1e-5


def test_a_stop_text_ends_the_answer_before_it(served: Served):
    whole = served.said(asked(POSTS[0]), 30)[1]
    stop = whole[7:10]
    cut = whole[: whole.index(stop)]
    client = served.client()
    done = client.chat.completions.create(model="small", messages=asked(POSTS[0]), max_tokens=30, stop=stop,
                                          logprobs=True)  # fmt: skip
    assert done.choices[0].message.content == cut and done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens < 30
    chunks = client.chat.completions.create(model="small", messages=asked(POSTS[0]), max_tokens=30, stream=True,
                                            stop=["never said", stop])  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut


def test_a_seed_gives_the_same_draws_as_generate(served: Served):
    drawn = {"temperature": 1.5, "top_p": 0.9}
    client, heard = served.client(), set()
    for seed in (7, 8):
        said = served.said(asked("a"), 12, seed=seed, **drawn)[1]
        for _ in range(2):
            done = client.chat.completions.create(model="small", messages=asked("a"), max_tokens=12, seed=seed, **drawn)
            assert done.choices[0].message.content == said
        heard.add(said)
    assert len(heard) == 2
    free = {client.chat.completions.create(model="small", messages=asked("a"), max_tokens=12, **drawn)
            .choices[0].message.content for _ in range(4)}  # fmt: skip
    assert len(free) > 1


def test_without_a_limit_an_answer_gets_what_generate_gives_it_or_what_the_context_leaves(served: Served):
    post = "word " * 400
    while (prompt := len(served.tokenizer.ask_ids(asked(post)))) < CONTEXT - 30:
        post += "word " * 2
    done = served.client().chat.completions.create(model="small", messages=asked(post))
    assert done.usage.completion_tokens <= CONTEXT - prompt
    assert done.choices[0].message.content == served.said(asked(post), CONTEXT - prompt)[1]


def test_models(served: Served):
    client = served.client()
    assert [one.id for one in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="only 'small'"):
        client.models.retrieve("gpt-5")


def occupied(served: Served, rows: int, room: int = 480) -> list[httpx.Client]:
    """Streams that hold every place of the batch; close them."""
    streams = []
    for _ in range(rows):
        client = httpx.Client(timeout=300)
        asking = {"model": "small", "messages": asked("a"), "max_tokens": room, "stream": True}
        stream = client.stream("POST", f"{served.url}/chat/completions", json=asking)
        response = stream.__enter__()
        next(response.iter_lines())
        streams.append((client, stream))
    return streams


def unanswered(served: Served, post: str, room: int) -> socket.socket:
    """A client that has asked for a whole answer and not read it; close it."""
    body = json.dumps({"model": "small", "messages": asked(post), "max_tokens": room}).encode()
    address = urlsplit(served.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=300)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
    return connection


class Slow:
    """A decoder that takes its time, so that what happens meanwhile can be seen."""

    def __init__(self, engine, seconds=0.05):
        self.engine, self.seconds, self.step = engine, seconds, engine._batch.step
        engine._batch.step = self.slowly

    def slowly(self):
        time.sleep(self.seconds)
        return self.step()


@pytest.fixture
def engines(monkeypatch):
    """The engines that are made, the newest last."""
    from mentalglm_jax.serve import server

    made, real = [], server.Engine

    def make(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(server, "Engine", make)
    return made


def eventually(true, seconds=300.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_queue_is_told_so_and_those_who_leave_make_room(engines):
    """One place in the batch, one in the queue: the third is refused; both are free once their clients are gone."""
    with serving(rows=1, waiting=1) as served:
        engine = engines[-1]
        Slow(engine)
        client = served.client()
        (held,) = occupied(served, 1)
        eventually(lambda: engine.under_way == 1)

        second = unanswered(served, "b", 400)
        eventually(lambda: len(engine._waiting) == 1)
        with pytest.raises(openai.RateLimitError, match="wait already") as refused:
            client.chat.completions.create(model="small", messages=asked("c"))
        assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"] == "1"
        second.close()
        eventually(lambda: all(one.cancelled for one in engine._waiting))  # it left while it waited, and not streaming
        assert engine.under_way == 1
        held[1].__exit__(None, None, None)
        held[0].close()
        eventually(lambda: engine.under_way == 0)
        done = client.chat.completions.create(model="small", messages=asked("c"), max_tokens=5)
        assert done.choices[0].message.content == served.said(asked("c"), 5)[1]


def test_a_client_that_leaves_an_answer_under_way_ends_it(engines):
    with serving(rows=2) as served:
        engine = engines[-1]
        served.client().chat.completions.create(model="small", messages=asked("a"), max_tokens=8)  # compiles
        Slow(engine, 0.3)  # the answer would take ten minutes
        client = unanswered(served, "a", 2000)
        eventually(lambda: engine.under_way == 1)
        client.close()
        eventually(lambda: engine.under_way == 0)
        assert len(engine._batch) == 0


def test_a_step_that_fails_fails_those_under_way_and_nobody_after_them(engines):
    with serving(rows=2) as served:
        engine = engines[-1]
        step = engine._batch.step

        def broken():
            raise MemoryError("no room on the device")

        engine._batch.step = broken
        with pytest.raises(openai.InternalServerError, match=r"the model failed \(MemoryError: no room"):
            served.client().chat.completions.create(model="small", messages=asked("a"), max_tokens=5)
        raw = httpx.post(
            f"{served.url}/chat/completions", json={"model": "small", "messages": asked("a"), "stream": True}
        )
        assert '"type": "server_error"' in raw.text and "[DONE]" not in raw.text
        engine._batch.step = step
        done = served.client().chat.completions.create(model="small", messages=asked("a"), max_tokens=5)
        assert done.choices[0].message.content == served.said(asked("a"), 5)[1]


def test_a_key_is_asked_of_everybody():
    with serving(key="sk-secret-1") as served:
        assert served.client().models.list().data[0].id == "small"
        for key in ("sk-secret-2", "", "sk-secret-11"):
            with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
                served.client(api_key=key or "x").models.list()
        for headers in ({}, {"Authorization": "Basic sk-secret-1"}, {"Authorization": "sk-secret-1"}):
            answer = httpx.get(f"{served.url}/models", headers=headers, timeout=300)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert "sk-secret" not in answer.text


def test_it_is_a_teacher_for_data_build(served: Served, tmp_path):
    """An endpoint recipe, by the package's own client; a second build asks nothing."""
    write_records(tmp_path / "posts.jsonl", records(3))
    write_records(tmp_path / "experts.jsonl", records(16, 100, explanation="专家写道“可以”。"))
    made = BuildRecipe.model_validate({
        "out": tmp_path / "out", "cache": tmp_path / "cache", "data": {"root": tmp_path / "posts.jsonl"}, "attempts": 1,
        "experts": tmp_path / "experts.jsonl", "examples_per_class": 1,
        "teacher": {"model": "small", "base_url": served.url, "temperature": 0.0, "max_tokens": 12},
    })  # fmt: skip
    assert build(made, quiet)["teacher"] == {"asked": 3}
    assert build(made, quiet)["teacher"] == {"cached": 3}
    kept = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "cache").glob("??/*.json")]
    assert len(kept) == 3
    for one in kept:
        assert one["answer"]["text"] == served.said(one["asked"]["messages"], 12)[1]
