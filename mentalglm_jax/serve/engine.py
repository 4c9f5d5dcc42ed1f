"""Requests meet the decoder: a bounded queue before it, a batch in it, pieces of text out of it.

Everything but the decoder's own work happens in the event loop; the work is one call in one thread, a token of every
row, between which requests join and leave.
"""

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from mentalglm_jax.foreign import first_line
from mentalglm_jax.inference.continuous import ContinuousBatch, Token, Wanted
from mentalglm_jax.inference.spoken import Piece, Spoken
from mentalglm_jax.serve.requests import ApiError
from mentalglm_jax.text.tokenizer import GlmTokenizer

_log = logging.getLogger(__name__)
Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Said:
    """The next part of an answer: text, the tokens that begin in it, and at the end why it ends and how many tokens
    were generated in all (a stop token included)."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None
    count: int = 0


class Answer:
    """A request on its way; iterate over what is said. ``cancel`` when nobody listens any more."""

    def __init__(self, wanted: Wanted, spoken: Spoken):
        self.wanted = wanted
        self.cancelled = False
        self._spoken = spoken
        self._tokens: dict[int, Token] = {}  # that are in no piece yet
        self._count = 0
        self._pieces: asyncio.Queue[Said | ApiError] = asyncio.Queue()

    def cancel(self) -> None:
        """Ends it before its next token."""
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Said]:
        """Raises: ApiError where the work failed."""
        while True:
            said = await self._pieces.get()
            if isinstance(said, ApiError):
                raise said
            yield said
            if said.finish is not None:
                return

    def fail(self, error: ApiError) -> None:
        """Ends it with an error."""
        self._pieces.put_nowait(error)

    def take(self, token: Token, eos_ids: tuple[int, ...]) -> bool:
        """One more token; whether the answer is over."""
        number, self._count = self._count, self._count + 1
        self._tokens[number] = token
        ended = token.id in eos_ids
        pieces = [self._spoken.add(token.id)]
        over = ended or self._spoken.stopped or self._count >= self.wanted.room
        if over:
            pieces.append(self._spoken.end())
        finish: Finish | None = None
        if over:
            finish = "stop" if ended or self._spoken.stopped else "length"
        piece = Piece("".join(one.text for one in pieces), tuple(i for one in pieces for i in one.tokens))
        if piece.text or over:
            tokens = tuple(self._tokens.pop(i) for i in piece.tokens)
            self._pieces.put_nowait(Said(piece.text, tokens, finish, self._count))
        return over


class Engine:
    """Answers requests with one model.

    Args:
        batch: the decoder.
        most_waiting: requests that may wait while the batch is full.
    """

    def __init__(self, batch: ContinuousBatch, tokenizer: GlmTokenizer, *, most_waiting: int):
        self._batch, self._tokenizer, self._most = batch, tokenizer, most_waiting
        self._waiting: deque[Answer] = deque()
        self._running: dict[int, Answer] = {}
        self._joining = 0
        self._awake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "decoder")

    @property
    def under_way(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def ask(self, wanted: Wanted, stops: tuple[str, ...] = ()) -> Answer:
        """Raises: ApiError 429: the queue is full."""
        self._waiting = deque(one for one in self._waiting if not one.cancelled)
        places = self._batch.most - len(self._running) - self._joining
        if len(self._waiting) >= self._most + places:
            raise ApiError(429, f"{self._most} requests wait already; ask again later", code="queue_full")
        answer = Answer(wanted, Spoken(self._tokenizer, stops))
        self._waiting.append(answer)
        self._awake.set()
        return answer

    async def work(self) -> None:
        """Goes on until it is cancelled."""
        try:
            while True:
                self._awake.clear()
                if not self._waiting and not self._running:
                    await self._awake.wait()
                await self._once()
        finally:
            for answer in (*self._waiting, *self._running.values()):
                answer.fail(ApiError(503, "the server is being stopped"))
            self._thread.shutdown(wait=True)

    async def _once(self) -> None:
        """Those that are gone leave, those that wait join while there is room, all get a token."""
        for row in [row for row, answer in self._running.items() if answer.cancelled]:
            self._leave(row)
        while self._waiting and not self._batch.full:
            answer = self._waiting.popleft()
            if answer.cancelled:
                continue
            self._joining = 1
            try:
                row, token = await self._in_thread(self._batch.join, answer.wanted)
            except Exception as error:
                self._failed(error, answer)
                return
            finally:
                self._joining = 0
            self._running[row] = answer
            self._give(row, token)
        if not self._running:
            return
        try:
            tokens = await self._in_thread(self._batch.step)
        except Exception as error:
            self._failed(error)
            return
        for row, token in tokens.items():
            self._give(row, token)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _give(self, row: int, token: Token) -> None:
        if self._running[row].take(token, self._tokenizer.eos_ids):
            self._leave(row)

    def _leave(self, row: int) -> None:
        del self._running[row]
        self._batch.leave(row)

    def _failed(self, error: Exception, *more: Answer) -> None:
        """The device has no memory left, or worse: those under way get an error, the next requests a fresh batch."""
        reason = f"the model failed ({type(error).__name__}: {first_line(error)})"
        _log.warning("%s", reason)
        for answer in (*self._running.values(), *more):
            answer.fail(ApiError(500, reason))
        self._running.clear()
        self._batch.clear()
