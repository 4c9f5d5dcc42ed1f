"""Work that several processes do in step, though one alone touches files: its word, its failures and its locks hold for
all of them, and so does a signal to any."""

import contextlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mentalglm_jax.devices.distributed import any_process, is_primary
from mentalglm_jax.devices.stopping import Interrupted, Preempted, StopSignal
from mentalglm_jax.errors import InputError, RunError

T = TypeVar("T")
_LONGEST = 7 * 24 * 3600 * 1000  # milliseconds that the others wait for the primary, e.g. for its probes
_FAILURES: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (InputError, RunError, Interrupted, Preempted, KeyboardInterrupt)
}
_count = itertools.count()


def on_primary(work: Callable[[], T]) -> T:
    """What ``work`` returns on the primary process, on every process; where it fails there, it fails on all.

    The others wait meanwhile, hours if need be. All processes must call this in the same order.

    Args:
        work: what only one process may do, e.g. write a file. Its result must be JSON's in a run of several processes,
            and is then what JSON makes of it.

    Raises:
        BaseException: of ``work``; elsewhere the same kind with the same message, or a RunError where it is none of
            this package's.
    """
    if jax.process_count() == 1:
        return work()
    said: dict[str, Any] = {}
    failure: BaseException | None = None
    if is_primary():
        try:
            said = {"value": work()}
            json.dumps(said)
        except BaseException as error:
            failure = error
            said = {"kind": type(error).__name__, "message": str(error)}
    _wait("the first process is done")
    said = _from_primary(said)
    if failure is not None:
        raise failure
    if (name := said.get("kind")) is not None:
        kind = _FAILURES.get(name)
        raise kind(said["message"]) if kind else RunError(f"the first process failed: {name}: {said['message']}")
    return said["value"]


@contextlib.contextmanager
def held_by_primary(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters ``context()``, a lock for one, on the primary process; where that refuses, all processes refuse."""
    with contextlib.ExitStack() as held:

        def enter() -> None:
            held.enter_context(context())

        on_primary(enter)
        yield


def check_same(what: str, value: Any) -> None:
    """That every process was given the same ``value``, of plain types.

    Raises:
        InputError: they differ, so that the processes would not run the same program.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.array(zlib.crc32(repr(value).encode()), np.uint32))
    if len({*found.tolist()}) > 1:
        raise InputError(f"mesh.distributed: the processes were given different {what}; give each the same files, "
                         "recipe and options")  # fmt: skip


@contextlib.contextmanager
def stopping_together(what: str) -> Iterator[Callable[[], None]]:
    """For work in pieces that all processes do in step: yields what each calls after every piece.

    It raises on all of them once one was told to stop, and so does the end of the block. In a run of one process it
    does nothing: a signal acts at once there, as nobody waits for an answer.

    Args:
        what: is interrupted, for the message.

    Raises:
        Interrupted, Preempted: a signal arrived at one of the processes.
    """
    if jax.process_count() == 1:
        yield lambda: None
        return
    with StopSignal() as stop:

        def check() -> None:
            if any_process(stop.requested):
                raise stop.error(f"interrupted while {what}; what was finished is kept, the same command continues")

        yield check
        check()


def consumed(pieces: Iterator[Any], work: Callable[[], object]) -> None:
    """Runs ``work`` on the primary process, which takes all ``pieces``, and takes them on the others too.

    For pieces that every process must help to make, such as arrays that lie on the devices of all. Where ``work``
    fails, the rest is taken all the same, so that nobody waits for it; then it fails on all.
    """
    if jax.process_count() == 1:
        work()
        return

    def whole() -> None:
        try:
            if is_primary():
                work()
        finally:
            for _ in pieces:
                pass

    failure: BaseException | None = None
    try:
        whole()
    except BaseException as error:
        failure = error

    def report() -> None:
        if failure is not None:
            raise failure

    on_primary(report)


def _wait(what: str) -> None:
    """A barrier of the coordination service: unlike one of the devices it may take hours."""
    from orbax.checkpoint import multihost  # slow to import

    multihost.get_barrier_sync_fn()(key=f"{what} {next(_count)}", timeout_ms=_LONGEST)


def _from_primary(value: Any) -> Any:
    """The primary's ``value``, through JSON."""
    data = json.dumps(value).encode() if is_primary() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    buffer = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)  # few sizes, for each is a program
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes())
