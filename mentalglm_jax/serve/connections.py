"""What a connection may take of the endpoint: time, and a place among the others.

uvicorn's own limits begin and end with a request. A connection that sends nothing, or half of a head, or goes on
sending a body that was answered already, and one that does not read its answer, would hold its descriptor for ever.
"""

import asyncio
import json
import resource
from typing import Any

from mentalglm_jax.serve.requests import ApiError

REQUEST_SECONDS = 15.0  # for the head of a request, from the connection or the answer before
READ_SECONDS = 30.0  # without a byte taken of an answer that the client has to read
SPARE = 256  # connections beside those whose requests are answered or wait


def most_connections(requests: int) -> int:
    """How many may be open where so many requests are answered or wait; of the process's descriptors some are for
    other things."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return requests + SPARE if soft == resource.RLIM_INFINITY else min(requests + SPARE, max(1, soft - 128))


def bounded(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol for one connection, with time limits and at most ``most`` connections: one more gets status
    503 and is closed, which is said once.

    Raises: ImportError: no uvicorn.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    told = False

    class Bounded(H11Protocol):
        """Waits for its client no longer than the limits say; how long the model takes is no matter."""

        waits: asyncio.TimerHandle | None = None
        _unsent = 0

        def connection_made(self, transport: Any) -> None:
            nonlocal told
            super().connection_made(transport)
            self._wait(REQUEST_SECONDS)
            if len(self.connections) > most:
                if not told:
                    told = True
                    self.logger.warning("%d connections are open; more are refused until some of them end", most)
                self._end(ApiError(503, "too many connections are open; ask again later"))

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:  # a request
                self._wait(None)

        def on_response_complete(self) -> None:
            self._wait(REQUEST_SECONDS)  # first: what follows may begin the next request
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(READ_SECONDS)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.cycle is not None and not self.cycle.response_complete:
                self._wait(None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(None)
            super().connection_lost(exc)

        def _wait(self, seconds: float | None) -> None:
            """From now on so long for the client; None: it is not the client that is waited for."""
            if self.waits is not None:
                self.waits.cancel()
            self.waits = None if seconds is None else self.loop.call_later(seconds, self._late, seconds)
            self._unsent = self.transport.get_write_buffer_size()

        def _late(self, seconds: float) -> None:
            if 0 < self.transport.get_write_buffer_size() < self._unsent:  # it reads, slowly
                self._wait(seconds)
            elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._end(ApiError(408, f"the request did not arrive within {REQUEST_SECONDS:g} seconds"))
            else:
                self.transport.abort()

        def _end(self, error: ApiError) -> None:
            """Says why, if the client reads, and closes."""
            body = json.dumps(error.body()).encode()
            head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            else:
                self.transport.close()

    return Bounded
