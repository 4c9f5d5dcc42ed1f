"""How work is stopped from outside: signals become a flag that is asked for where everything is saved."""

import signal
from types import FrameType
from typing import Any

from mentalglm_jax.errors import RunError


class Interrupted(RunError):
    """Ctrl-C: the state was saved; the same command continues."""


class Preempted(Interrupted):
    """SIGTERM, to this process or another of the run: as after Ctrl-C, but with an exit code that launchers can tell
    from a failure: 75, EX_TEMPFAIL, "try again"."""

    exit_code = 75


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag while the ``with`` block runs; a second SIGINT acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None  # of the signal
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.number = True, number

    def __enter__(self) -> "StopSignal":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread (a notebook kernel's helper): signals stay as they are
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def error(self, message: str) -> Interrupted:
        """What to raise where work stops: ``Interrupted`` after Ctrl-C here, else ``Preempted``."""
        return (Interrupted if self.number == signal.SIGINT else Preempted)(message)
