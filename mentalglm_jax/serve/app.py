"""The endpoint as an ASGI application: who may ask, what, and how much.

A web page that a user has open can send requests to this machine, too. It cannot do so here: the Host header must name
this machine (a page of another name that is made to resolve to it is refused), a body must be JSON (for which a browser
asks first, and is never told yes: there is no CORS), and with a key nobody without it gets anywhere.
"""

import asyncio
import contextlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mentalglm_jax.errors import InputError, install
from mentalglm_jax.inference.continuous import Wanted
from mentalglm_jax.serve.engine import Answer, Engine, Said
from mentalglm_jax.serve.replies import Reply, model_object
from mentalglm_jax.serve.requests import ApiError, prompt_of, read_request, wanted_of
from mentalglm_jax.text.tokenizer import GlmTokenizer

_HOST = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
LARGEST_BODY = 4 << 20  # bytes
LARGEST_BODIES = 64 << 20  # bytes of all bodies that are being read
_SMALL = 64 << 10  # bytes of a body that do not count: a request of the usual size is never refused for others
BODY_SECONDS = 30.0  # for a body to arrive
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Held:
    """Bytes of the bodies that are in memory. One of 4 MiB takes 200 times as much while it becomes tokens, which is
    why that is done for one at a time."""

    def __init__(self) -> None:
        self._bytes = 0
        self.thread = ThreadPoolExecutor(1, "reader")

    @contextlib.contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """For one request, as long as its body is needed; yields what is told of every part that arrives.

        Raises: ApiError 429 of that: the bodies are too large together.
        """
        held = counted = 0

        def more(size: int) -> None:
            nonlocal held, counted
            held += size
            self._bytes += max(held - _SMALL, 0) - counted
            counted = max(held - _SMALL, 0)
            if counted and self._bytes > LARGEST_BODIES:
                raise ApiError(429, "too many large requests are being read; ask again later", code="queue_full")

        try:
            yield more
        finally:
            self._bytes -= counted


class _Guard:
    """What comes before any work: the Host header, then the key."""

    def __init__(self, app: Any, key: str | None):
        self._app, self._key = app, None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            body = json.dumps(error.body()).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            await send({"type": "http.response.start", "status": error.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Raises: ApiError."""
        if scope["type"] != "http":
            raise ApiError(404, "only HTTP is spoken here")
        given: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name, []).append(value)
        hosts = given.get(b"host", [])
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
            raise ApiError(403, "the Host header must name this machine: 127.0.0.1 or localhost", code="wrong_host")
        if self._key is None:
            return
        scheme, _, key = b"".join(given.get(b"authorization", ())).partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise ApiError(401, "the API key is missing or wrong; give it as 'Authorization: Bearer KEY'",
                           code="invalid_api_key")  # fmt: skip


def make_app(engine: Engine, tokenizer: GlmTokenizer, *, name: str, context: int, key: str | None) -> Any:
    """The application.

    Args:
        name: model id that clients give.
        context: tokens of messages and answer together, at most.
        key: what every request must carry; None: nothing.

    Raises:
        InputError: the [serve] extra is not installed.
    """
    try:
        from fastapi import FastAPI, HTTPException, Request, Response
        from fastapi.responses import JSONResponse, StreamingResponse
        from starlette.requests import ClientDisconnect
    except ImportError:
        raise InputError(f"`mentalglm serve` needs the serve extra: {install('serve')}") from None

    class Stream(StreamingResponse):
        """Cancels its answer however it ends, also before the first piece."""

        def __init__(self, answer: Answer, events: AsyncIterator[str]):
            super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
            self._answer = answer

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._answer.cancel()

    @contextlib.asynccontextmanager
    async def working(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(engine.work())
        yield
        task.cancel()
        held.thread.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    since, held = int(time.time()), _Held()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=working)

    def refusal(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, {"retry-after": "1"} if error.status == 429 else None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return refusal(error)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_here(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path[:200]} is not served; there are POST /v1/chat/completions and "
        return refusal(ApiError(error.status_code, said + "GET /v1/models"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return refusal(ApiError(500, f"the server failed ({type(error).__name__})"))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(name, since)]}

    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> dict[str, Any]:
        check_name(asked)
        return model_object(name, since)

    def check_name(asked: str) -> None:
        if asked != name:
            raise ApiError(404, f"there is no model {asked[:200]!r} here, only {name!r}", code="model_not_found",
                           param="model")  # fmt: skip

    async def body_of(request: Request, more: Callable[[int], None]) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be JSON, with 'Content-Type: application/json'")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    more(len(part))
                    if len(body) > LARGEST_BODY:
                        raise ApiError(413, f"the body is larger than {LARGEST_BODY >> 20} MiB")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
        except ClientDisconnect:
            raise ApiError(400, "the body is cut short") from None
        return bytes(body)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted, stops, reply, stream = await taken(request)
        answer = engine.ask(wanted, stops)
        if stream:
            return Stream(answer, _events(answer, reply))
        said = await _unless_gone(request, answer)
        return Response(status_code=499) if said is None else JSONResponse(reply.whole(said))

    async def taken(request: Request) -> tuple[Wanted, tuple[str, ...], Reply, bool]:
        """What of a request is needed while it waits and is answered: not its body."""
        with held.one() as more:
            body = await body_of(request, more)
            return await asyncio.get_running_loop().run_in_executor(held.thread, understood, body)

    def understood(body: bytes) -> tuple[Wanted, tuple[str, ...], Reply, bool]:
        asked = read_request(body)
        check_name(asked.model)
        prompt = prompt_of(asked, tokenizer)
        reply = Reply(asked, tokenizer, name, len(prompt))
        return wanted_of(asked, prompt, context), tuple(asked.stop), reply, asked.stream

    return _Guard(app, key)


async def _events(answer: Answer, reply: Reply) -> AsyncIterator[str]:
    """Server-sent events of an answer."""
    yield _event(reply.opening())
    try:
        async for said in answer:
            for chunk in reply.chunks(said):
                yield _event(chunk)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Any, answer: Answer) -> list[Said] | None:
    """All that is said; None where the client left before the end.

    Raises: ApiError as ``Answer``.
    """

    async def listen() -> list[Said]:
        return [said async for said in answer]

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    listening, leaving = asyncio.create_task(listen()), asyncio.create_task(leave())
    try:
        await asyncio.wait({listening, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await listening if listening.done() else None
    finally:
        answer.cancel()
        listening.cancel()
        leaving.cancel()
