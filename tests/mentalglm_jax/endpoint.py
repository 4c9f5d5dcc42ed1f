"""A real HTTP server that speaks the chat completions protocol, a proxy that spoils what passes through it, and a
server that behaves as badly as it is told to."""

import contextlib
import gzip
import http.client
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ASKED = re.compile(r"帖子：“(.*)”\n问题：.*\n标签句：(.*)", re.DOTALL)


def oracle(messages: list[dict[str, str]]) -> str:
    """A perfect explainer: the label it was given, and a quote of the post."""
    post, label = _ASKED.search(messages[-1]["content"]).groups()
    reason = f"这段话直接体现了发帖人当时的处境和想法，{post[-6:]}也符合相应的判断标准。"
    return f"{label} 推理：帖子里写道“{post[:12]}”，{reason}"


@dataclass
class Endpoint:
    """What the server saw; ``url`` is the base URL of the protocol."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


class Server(ThreadingHTTPServer):
    """Says nothing of a client that has left: what it would write is on the error stream of another test by then."""

    def handle_error(self, *given: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*given)


@contextlib.contextmanager
def _serving(answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self, body)

        def log_message(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@contextlib.contextmanager
def endpoint(say: Callable[[list[dict[str, str]]], str] = oracle) -> Iterator[Endpoint]:
    with behaving(default=lambda asked: completion(asked, say(asked["messages"]))) as seen:
        yield seen


def completion(asked: dict[str, Any], text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion that says ``text``; ``message`` adds to its message."""
    tokens = {"prompt_tokens": sum(len(m["content"]) for m in asked["messages"]), "completion_tokens": len(str(text))}
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice],
            "usage": tokens | {"total_tokens": sum(tokens.values())}}  # fmt: skip


Behaviour = Callable[[dict[str, Any]], Any]  # of a request: a JSON-ready answer, or what to do with the handler


@contextlib.contextmanager
def behaving(*first: Behaviour, default: Behaviour | None = None) -> Iterator[Endpoint]:
    """Each request meets the next of ``first``; when they are used up, ``default`` (a perfect explainer)."""
    seen, waiting, lock = Endpoint(""), list(first), threading.Lock()
    perfect: Behaviour = lambda asked: completion(asked, oracle(asked["messages"]))  # noqa: E731

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = json.loads(body)
        with lock:
            seen.requests.append(asked | {"path": handler.path, "authorization": handler.headers["authorization"]})
            behaviour = waiting.pop(0) if waiting else default or perfect
        found = behaviour(asked)
        if callable(found):
            found(handler)
            handler.close_connection = True
        else:
            reply(handler, 200, json.dumps(found).encode())

    with _serving(answer) as url:
        seen.url = url
        yield seen


def failing(status: int, body: Any = b"", **headers: str) -> Behaviour:
    """An error: ``body`` as it stands (bytes, text) or as JSON."""
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda asked: lambda handler: reply(handler, status, data, named)


def saying(data: bytes) -> Behaviour:
    """These bytes with status 200."""
    return failing(200, data)


def dripping(seconds: float, where: str = "body") -> Behaviour:
    """A byte every ``seconds``, of the headers or of the body, for as long as somebody listens."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        start = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        handler.wfile.write(start + (b"x-slow: " if where == "headers" else b"\r\n"))
        for _ in range(2000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(seconds)

    return lambda asked: drip


def endless(status: int = 200, sent: list[int] | None = None) -> Behaviour:
    """A body without end; ``sent`` gets the number of its bytes."""

    def flow(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n\r\n".encode())
        for _ in range(2**14):
            handler.wfile.write(b" " * 2**16)
            if sent is not None:
                sent.append(2**16)

    return lambda asked: flow


def bomb(mebibytes: int) -> Behaviour:
    """A small body that unpacks to a large one, whether asked for or not."""
    return failing(200, gzip.compress(b" " * (mebibytes << 20)), content_encoding="gzip")


@contextlib.contextmanager
def spoiling(upstream: str, faults: list[str]) -> Iterator[str]:
    """Each request meets the next of ``faults``; when they are used up, all pass. Yields the proxy's base URL."""
    waiting, lock = list(faults), threading.Lock()
    host = upstream.removeprefix("http://").removesuffix("/v1")

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with lock:
            fault = waiting.pop(0) if waiting else ""
        if fault.isdigit():
            code = "insufficient_quota" if fault == "402" else "busy"
            failed = json.dumps({"error": {"message": "no", "code": code}}).encode()
            return reply(handler, 429 if fault == "402" else int(fault), failed, {"retry-after": "0"})
        if fault.startswith("400 "):  # code and message; "post": the message repeats the request
            code, _, message = fault[4:].partition(" ")
            message = json.loads(body)["messages"][-1]["content"] if message == "post" else message
            return reply(handler, 400, json.dumps({"error": {"message": message, "code": code}}).encode())
        if fault == "timeout":
            time.sleep(1.0)
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("POST", handler.path, body, {"content-type": "application/json"})
        found = connection.getresponse().read()
        connection.close()
        if fault == "truncated":
            found = found[: len(found) // 2]
        elif fault == "cut":  # the connection ends before what was promised has come
            handler.send_response(200)
            handler.send_header("content-length", str(len(found)))
            handler.end_headers()
            handler.wfile.write(found[:20])
            handler.close_connection = True
            return None
        elif fault in ("empty", "english"):
            changed = json.loads(found)
            text = changed["choices"][0]["message"]["content"]
            other = (
                ""
                if fault == "empty"
                else text.split("推理：")[0] + "推理：The writer says that things were handed over."
            )
            changed["choices"][0]["message"]["content"] = other
            found = json.dumps(changed).encode()
        elif fault in ("null", "half", "no usage"):
            changed = json.loads(found)
            choice = changed["choices"][0]
            if fault == "no usage":
                del changed["usage"]
            else:
                text = choice["message"]["content"]
                choice["message"]["content"] = None if fault == "null" else text
                choice["finish_reason"] = "content_filter"
            found = json.dumps(changed).encode()
        elif fault == "no choices":
            found = b'{"id": "1", "choices": []}'
        return reply(handler, 200, found)

    with _serving(answer) as url:
        yield url
