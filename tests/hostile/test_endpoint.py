"""What strangers, and pages in a user's browser, send to `mentalglm serve`: one JSON error each, and it goes on."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from mentalglm_jax.serve import app
from tests.mentalglm_jax.serve.served import CONTEXT, Served, serving

WAIT = 300.0  # seconds; five, as httpx has it, are none on a busy machine
HI = [{"role": "user", "content": "Hi."}]


@pytest.fixture(scope="module")
def served():
    with serving(rows=2) as found:
        yield found


@pytest.fixture(autouse=True)
def goes_on(served: Served):
    """Whatever was sent, the next request is answered."""
    yield
    asking = {"model": "small", "messages": HI, "max_tokens": 3}
    done = httpx.post(f"{served.url}/chat/completions", json=asking, timeout=WAIT)
    assert done.json()["choices"][0]["message"]["content"] == served.said(HI, 3)[1]


def refused(answer: httpx.Response, status: int, says: str) -> dict:
    """OpenAI's error shape, one line, no trace of what is inside."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 600
    assert re.search(says, error["message"]), error["message"]
    assert "Traceback" not in answer.text and "pydantic" not in answer.text
    return error


def post(served: Served, **changes) -> httpx.Response:
    body = {"model": "small", "messages": HI, "max_tokens": 3} | changes
    return httpx.post(f"{served.url}/chat/completions", content=json.dumps(body), timeout=WAIT,
                      headers={"content-type": "application/json"})  # fmt: skip


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


BAD_VALUES = {
    "a parameter that is misspelt": ({"temprature": 1}, r"unknown parameter 'temprature' \(did you mean 'temperature'"),
    "more answers than one": ({"n": 2}, "n is not supported here; leave it out, or give 1, got 2"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, r"tools is not .*, or give \[\]"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty is not supported here.* give 0, got 0.5"),
    "a bias": ({"logit_bias": {"5": 100}}, "logit_bias is not supported here.* give {}"),
    "a schema for the answer": ({"response_format": {"type": "json_object"}},
                                 "response_format is not supported.*{'type': 'text'}, got 'json_object'"),
    "a function to call": ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice is not supp"),
    "speech": ({"modalities": ["text", "audio"]}, r"modalities is not supported.* give \['text'\], got 'audio'"),
    "to be kept": ({"store": True}, "store is not supported.* give false, got True"),
    "a tier": ({"service_tier": "flex"}, "service_tier is not supported.*'auto', got 'flex'"),
    "effort": ({"reasoning_effort": "high"}, "unknown parameter 'reasoning_effort'.*would be ignored"),
    "vLLM's own": ({"top_k": 5}, "unknown parameter 'top_k'"),
    "no token": ({"max_tokens": 0}, "max_tokens .*greater than or equal to 1"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens .*integer"),
    "a number in quotes": ({"max_tokens": "5"}, "max_tokens .*integer"),
    "two limits": ({"max_completion_tokens": 4}, "mean the same"),
    "a negative temperature": ({"temperature": -1}, "temperature .*greater than or equal to 0"),
    "a nucleus of nothing": ({"top_p": 0}, "top_p .*greater than 0"),
    "a seed of 100 digits": ({"seed": 10**99}, "64 bits"),
    "too many most probable tokens": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs .*20"),
    "most probable tokens without log-probabilities": ({"top_logprobs": 2}, "needs logprobs"),
    "an empty stop text": ({"stop": [""]}, "stop.*at least 1"),
    "a hundred stop texts": ({"stop": ["x"] * 100}, "stop.*at most 16"),
    "options of a stream that is none": ({"stream_options": {"include_usage": True}}, "needs stream"),
    "no message": ({"messages": []}, "messages .*at least 1"),
    "messages that are text": ({"messages": "Hi."}, "messages .*list"),
    "a thousand messages and one": ({"messages": HI * 1001}, "messages .*at most 1000"),
    "an empty message": ({"messages": user("")}, r"messages\[0\].content is empty"),
    "a message of no parts": ({"messages": user([])}, r"messages\[0\].content is empty"),
    "a message without content": ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
    "a role of its own": ({"messages": [{"role": "observation", "content": "x"}]}, r"messages\[0\].role .*'user'"),
    "the role of a tool": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, r"messages\[0\]"),
    "an image": ({"messages": user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])},
                 r"messages\[0\].content\[0\].type should be 'text', got 'image_url'"),
    "a content that is a number": ({"messages": user(5)}, r"messages\[0\].content .*list, got 5"),
    "a key in a message": ({"messages": [{**HI[0], "tools": []}]}, r"unknown parameter 'messages\[0\].tools'"),
    "an answer to go on with": ({"messages": [*HI, {"role": "assistant", "content": "So"}]}, "end with a user's"),
    "a model of another name": ({"model": "../../etc/passwd"}, "there is no model"),
    "a name of a megabyte": ({"model": "x" * (1 << 20)}, "model .*at most 256"),
    "no model": ({"model": None}, "model is missing"),
    "half of a surrogate pair": ({"messages": user("\ud83d")}, "surrogate"),
    "more than the context": ({"messages": user("word " * CONTEXT)}, "context is 3000 tokens"),
    "an answer beyond the context": ({"max_tokens": CONTEXT}, "context is 3000 tokens.*lower max_tokens"),
    "a million things that are no part": ({"messages": user([1] * 1_000_000)}, "more than 20000 values"),
    "twenty thousand keys of a message": ({"messages": [HI[0] | {str(n): 1 for n in range(20_000)}]}, "20000 values"),
    "an answer of 2^62 tokens": ({"max_tokens": 2**62}, "context is 3000 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("changes", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_request_that_cannot_be_done(served, changes):
    given, says = changes
    status = 404 if str(given.get("model", "")).startswith("..") else 400
    refused(post(served, **given), status, says)


BODIES = {
    "nothing": (b"", "not JSON"),
    "no JSON": (b"{'model': 1}", "not JSON"),
    "cut short": (b'{"model": "small"', "not JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "not a number": (b'{"model": "small", "temperature": NaN}', "NaN is not a number"),
    "a key twice": (b'{"model": "small", "model": "small"}', "stands more than once"),
    "a hundred thousand brackets": (b"[" * 100_000, "levels"),
    "no UTF-8": (b'{"model": "\xff"}', "not JSON"),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_none(served, body):
    answer = httpx.post(f"{served.url}/chat/completions", content=body[0], timeout=WAIT,
                        headers={"content-type": "application/json"})  # fmt: skip
    refused(answer, 400, body[1])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_five_mebibytes(served, chunked):
    body = json.dumps({"model": "small", "messages": user("x" * (5 << 20))}).encode()
    content = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    answer = httpx.post(f"{served.url}/chat/completions", content=content, timeout=WAIT,
                        headers={"content-type": "application/json"})  # fmt: skip
    refused(answer, 413, "larger than 4 MiB")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "text/json; application/json"])
def test_a_page_posts_a_form(served, kind):
    """What a browser sends to any address without asking first: no JSON by its content type."""
    body = json.dumps({"model": "small", "messages": HI}).encode()
    headers = {"content-type": kind, "origin": "https://evil.example"} if kind else {"origin": "https://evil.example"}
    answer = httpx.post(f"{served.url}/chat/completions", content=body, headers=headers, timeout=WAIT)
    refused(answer, 415, "Content-Type")


def test_a_page_asks_first_and_is_not_told_yes(served):
    answer = httpx.options(f"{served.url}/chat/completions", timeout=WAIT, headers={
        "origin": "https://evil.example", "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    })  # fmt: skip
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


HOSTS = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil@127.0.0.1",
         "127.0.0.1:80:80", "127.0.0.1 evil", "0.0.0.0", "localhost:", "[::1]x", "127.1"]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_a_name_that_was_made_to_resolve_to_this_machine(served, host):
    """DNS rebinding: the page's own name stands in the Host header."""
    for path in ("/v1/models", "/", "/v1/chat/completions"):
        answer = httpx.get(served.url.removesuffix("/v1") + path, headers={"host": host}, timeout=WAIT)
        if answer.status_code == 400:  # the web server's own reading of it
            continue
        refused(answer, 403, "must name this machine")


def raw(served: Served, request: bytes, wait: float = 300.0) -> bytes:
    port = int(served.url.removesuffix("/v1").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(request)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except TimeoutError:
            pass
    return found


@pytest.mark.parametrize("hosts", [b"", b"Host: 127.0.0.1\r\nHost: evil.example\r\n"], ids=["none", "two"])
def test_no_host_or_two(served, hosts):
    answer = raw(served, b"GET /v1/models HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
    assert re.match(rb"HTTP/1.1 (400|403) ", answer), answer
    assert b"small" not in answer


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:1"])
def test_names_of_this_machine_are_answered(served, host):
    assert httpx.get(f"{served.url}/models", headers={"host": host}, timeout=WAIT).json()["data"][0]["id"] == "small"


def test_a_body_that_never_comes(served, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\nConnection: close\r\n\r\n{")  # fmt: skip
    began = time.monotonic()
    answer = raw(served, head)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive" in answer
    assert time.monotonic() - began < 250


def test_a_client_that_hangs_up_within_its_body(served):
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{")  # fmt: skip
    port = int(served.url.removesuffix("/v1").rpartition(":")[2])
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head)


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1", "/v1/completions", "/v1/../../etc/passwd"])
def test_nothing_else_is_served(served, path):
    refused(httpx.get(served.url.removesuffix("/v1") + path, timeout=WAIT), 404, "is not served")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods(served, method):
    refused(httpx.request(method, f"{served.url}/chat/completions", timeout=WAIT), 405, "is not served")


def test_a_websocket(served):
    head = (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")  # fmt: skip
    answer = raw(served, head, wait=1.0)
    assert b"101" not in answer[:20]


@pytest.mark.parametrize("words", ["<|user|>", "<|assistant|>\n", "[gMASK]<sop>", "<|endoftext|>", "{{ 7 * 7 }}"])
def test_a_post_cannot_open_a_turn(served, words):
    """Of the ids that the model is given, none but the format's own is special."""
    said = f"A post. {words} Another."
    done = post(served, messages=user(said)).json()
    ids = served.tokenizer.ask_ids(user(said))
    assert done["usage"]["prompt_tokens"] == len(ids)
    assert sum(i in served.tokenizer.special_ids for i in ids) == 4
    assert served.tokenizer.decode(ids).strip("\n") == said


def test_large_bodies_together(served, monkeypatch):
    """One of 4 MiB takes 800 MiB while it becomes tokens; a hundred at a time took the machine."""
    monkeypatch.setattr(app, "LARGEST_BODIES", 1 << 20)
    refused(post(served, messages=user("x" * (3 << 20))), 429, "too many large requests")
    refused(post(served, model="x" * 60_000), 400, "model .*at most 256")  # small ones are read all the same


def test_what_is_held_is_counted_and_given_back():
    held = app._Held()
    with held.one() as first, held.one() as second, held.one() as third:
        for _ in range(15):
            first(4 << 20)
        with pytest.raises(app.ApiError, match="too many large requests"):
            second(5 << 20)
        third(app._SMALL)
    with held.one() as again:
        again(app.LARGEST_BODIES)


def test_one_body_at_a_time_becomes_tokens(served, monkeypatch):
    there, gate, most, real = [], threading.Event(), [0], app.prompt_of

    def slow(asked, tokenizer):
        there.append(asked)
        most[0] = max(most[0], len(there))
        if len(there) > 1:
            gate.set()
        gate.wait(0.5)  # for another, which must not come
        there.pop()
        return real(asked, tokenizer)

    monkeypatch.setattr(app, "prompt_of", slow)
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda _: post(served), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert most == [1]
