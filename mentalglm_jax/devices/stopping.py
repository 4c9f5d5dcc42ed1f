"""How work is stopped from outside: signals become a flag that is asked for where everything is saved.
Elsewhere SIGTERM ends a command as Ctrl-C does, children included, with the exit code of a preemption."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from mentalglm_jax.errors import RunError


class Interrupted(RunError):
    """Ctrl-C: the state was saved; the same command continues."""


class Preempted(Interrupted):
    """SIGTERM, to this process or another of the run: as after Ctrl-C, but with an exit code that launchers can tell
    from a failure: 75, EX_TEMPFAIL, "try again"."""

    exit_code = 75


class Terminated(SystemExit):
    """SIGTERM where nothing waits for it: what is finished is kept, and what a ``finally`` removes is removed."""

    def __init__(self) -> None:
        super().__init__(Preempted.exit_code)


@contextlib.contextmanager
def sigterm_ends() -> Iterator[None]:
    """SIGTERM raises ``Terminated`` while the ``with`` block runs, but for what is inside a ``StopSignal``."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def carried_out(command: Sequence[str], **options: Any) -> tuple[int, Any]:
    """Exit code and output of a child that does not outlive what stops this process.

    Args:
        command: as of ``subprocess.Popen``, which gets ``options`` too.

    Raises:
        KeyboardInterrupt: Ctrl-C. The terminal has told the child as well, which may still save.
        Terminated: SIGTERM, passed on to the child.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()
            raise
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode, output


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
