"""Connections to `mentalglm serve` that hold a descriptor and ask nothing: each ends by itself, whoever opened it."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import select
import socket
import threading
import time

import pytest
import uvicorn

from mentalglm_jax.serve import connections
from mentalglm_jax.serve.connections import bounded, most_connections
from mentalglm_jax.serve.server import listen

MOST = 6
HANG = 300.0  # seconds: what is tried here would last for ever
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = 64 << 20  # bytes of an answer: more than the system keeps for one who does not read


class App:
    """Says ``answer`` once it may."""

    def __init__(self) -> None:
        self.answer, self.may, self.asked = b"ok", threading.Event(), threading.Event()
        self.may.set()

    async def __call__(self, scope, receive, send):
        self.asked.set()
        while not self.may.is_set():
            await _pause()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for start in range(0, len(self.answer), 1 << 20):
            await send({"type": "http.response.body", "body": self.answer[start : start + (1 << 20)],
                        "more_body": True})  # fmt: skip
        await send({"type": "http.response.body", "body": b""})


async def _pause():
    import asyncio

    await asyncio.sleep(0.01)


@pytest.fixture
def served():
    """Server, app and port."""
    app = App()
    with listen(0) as at:
        config = uvicorn.Config(app, log_level="warning", lifespan="off", http=bounded(MOST), ws="none",
                                timeout_keep_alive=3600, timeout_graceful_shutdown=1)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield server, app, at.getsockname()[1]
        app.may.set()
        server.should_exit = True
        thread.join(HANG)
        assert not thread.is_alive()


def until(come) -> None:
    end = time.monotonic() + HANG
    while not come():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)


@contextlib.contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as one:
        yield one


def to_the_end(one: socket.socket) -> bytes:
    """All that is said until the server closes; it fails where it never does."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(1 << 20):
            found += part
    return found


def drip(one: socket.socket, data: bytes) -> None:
    """A byte at a time, over and over, until nobody takes them."""
    end = time.monotonic() + HANG
    with contextlib.suppress(OSError):
        while not select.select([one], [], [], 0.02)[0]:  # the server says something, or closes
            assert time.monotonic() < end, "it hangs"
            one.sendall(data[:1])
            data = data[1:] + data[:1]


BEGINNINGS = {
    "nothing": (b"", b"", b""), "half a head": (b"GET / HTTP/1.1\r\nHost: loc", b"", b"408"),
    "a head byte by byte": (b"GET / HTTP/1.1\r\n", b"a: b\r\n", b"408"), "empty lines": (b"", b"\r\n", b""),
    "half of a second head": (GET + b"GET /", b"", b"200"),
    "a body nobody waits for": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n", b"x", b"200"),
    "chunks nobody waits for": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n",
                                b"200"),
}  # fmt: skip


@pytest.mark.parametrize("attack", BEGINNINGS)
def test_a_connection_that_ends_by_itself(served, short, attack):
    server, _, port = served
    beginning, more, says = BEGINNINGS[attack]
    with connected(port) as one:
        one.sendall(beginning)
        found = b""
        if more:
            if says == b"200":
                found = one.recv(1 << 20)
            drip(one, more)
        found += to_the_end(one)
    assert says in found[:20]
    if says == b"408":
        assert "did not arrive within" in json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]
    until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("at_the_end", [False, True], ids=["while it is sent", "once it is all sent"])
def test_an_answer_that_nobody_reads(served, short, at_the_end):
    server, app, port = served
    app.answer = b"x" * LARGE
    if at_the_end:  # uvicorn then waits for it to be taken before it closes
        head = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connected(port) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(head if at_the_end else GET)
        until(app.asked.is_set)
        until(lambda: not server.server_state.connections)


def test_the_model_may_take_its_time(served):
    """What is waited for then is not the client."""
    server, app, port = served
    app.may.clear()
    with connected(port) as one:
        one.sendall(GET)
        until(app.asked.is_set)
        (here,) = server.server_state.connections
        assert here.waits is None
        app.may.set()
        assert one.recv(1 << 20).startswith(b"HTTP/1.1 200")
        until(lambda: here.waits is not None)


def test_one_that_reads_slowly_is_not_cut_off(served, monkeypatch):
    """Its time begins anew with all that it takes."""
    server, app, port = served
    app.answer = b"x" * (8 << 20)
    late = []
    with connected(port) as one:
        one.sendall(GET)
        until(app.asked.is_set)
        (here,) = server.server_state.connections
        until(lambda: here.flow.write_paused)
        unsent = here.transport.get_write_buffer_size()
        monkeypatch.setattr(here, "_unsent", unsent + 1)
        server_loop = here.loop
        done = threading.Event()
        server_loop.call_soon_threadsafe(lambda: (here._late(5.0), late.append(here.transport.is_closing()),
                                                  done.set()))  # fmt: skip
        assert done.wait(HANG)
        assert late == [False]
        assert len(one.recv(1 << 20)) > 0


def test_too_many_are_turned_away_and_said_once(served, caplog):
    server, _, port = served
    with contextlib.ExitStack() as held, caplog.at_level(logging.WARNING, "uvicorn.error"):
        for _ in range(MOST):
            held.enter_context(connected(port))
        until(lambda: len(server.server_state.connections) == MOST)
        for _ in range(3):
            with connected(port) as one:
                found = to_the_end(one)
            assert found.startswith(b"HTTP/1.1 503 ")
            assert "too many connections" in json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]
        until(lambda: len(server.server_state.connections) == MOST)
        said = [record.getMessage() for record in caplog.records if "connections are open" in record.getMessage()]
        assert said == [f"{MOST} connections are open; more are refused until some of them end"]
    until(lambda: not server.server_state.connections)
    with connected(port) as one:
        one.sendall(GET)
        assert one.recv(1 << 20).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("soft", "most"), [(1024, 328), (256, 128), (64, 1), (resource.RLIM_INFINITY, 328)])
def test_no_more_than_the_process_may_have(monkeypatch, soft, most):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert most_connections(72) == most
