"""Further processes of ``probes run`` and ``rank``: each makes its share of the posts, as under ``accelerate launch``.

A small model leaves most of a processor idle between its operations; a second process uses what a second thread cannot.
A worker is the same command with a rank of its own. What it makes lies in the cache they share, so that nothing is lost
with it, and the first process makes what a worker that stopped has left.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from probes.errors import ProbeError, ProbeInputError
from probes.foreign import plain
from probes.interpreter import environment

_PARENT = "PROBES_PARENT"  # whose worker this process is
_LAUNCHED = ("RANK", "WORLD_SIZE")  # as `accelerate launch` and `torchrun` set them
T = TypeVar("T")


@contextlib.contextmanager
def workers(count: int, arguments: Sequence[str], device: str) -> Iterator[Callable[[int], bool]]:
    """``count`` processes at work on one run, this one among them, each with its part of the processor. On a GPU this
    one is alone: several GPUs are for a launcher.

    Args:
        arguments: of ``probes``, for each of the others.
        device: where this process has its model.

    Yields:
        whether process i (from 0, this one, on) is still at work.
    Raises:
        ProbeInputError: a launcher has started several already.
    """
    if _PARENT in os.environ:
        _end_with(int(os.environ[_PARENT]))
    if count == 1 or _PARENT in os.environ or device != "cpu":
        yield lambda rank: True
        return
    if any(name in os.environ for name in _LAUNCHED):
        raise ProbeInputError(f"--processes {count}: a launcher has set {', '.join(_LAUNCHED)}; leave one of them away")
    import torch

    threads = torch.get_num_threads()
    share = max(1, threads // count)
    torch.set_num_threads(share)
    common = {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(share), _PARENT: str(os.getpid())}
    started: list[subprocess.Popen[bytes]] = []
    mine = {"RANK": "0", "WORLD_SIZE": str(count)}
    try:
        for rank in range(1, count):
            command = [sys.executable, "-P", "-m", "probes", *arguments]
            env, nowhere = environment(**common, RANK=str(rank)), subprocess.DEVNULL
            started.append(subprocess.Popen(command, env=env, stdin=nowhere, stdout=nowhere, stderr=nowhere))
        os.environ.update(mine)
        yield lambda rank: rank == 0 or started[rank - 1].poll() is None
    finally:
        torch.set_num_threads(threads)
        for name in mine:
            os.environ.pop(name, None)
        for one in started:
            one.terminate()  # like Ctrl-C, its post's finished steps are kept
        for one in started:
            try:
                one.wait(10)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


def launched() -> tuple[int, int]:
    """(rank, processes) of this process; (0, 1) where it is alone.

    Raises:
        ProbeInputError: the environment says neither.
    """
    found = [os.environ.get(name, usual) for name, usual in zip(_LAUNCHED, ("0", "1"), strict=True)]
    if not all(value.isascii() and value.isdigit() and len(value) < 10 for value in found):
        raise ProbeInputError(f"RANK={plain(found[0], 20)}, WORLD_SIZE={plain(found[1], 20)}: both must be numbers")
    return int(found[0]), max(1, int(found[1]))


def shares(count: int, rank: int, world: int) -> list[int]:
    """The places of ``count`` posts in the order in which this process takes them: every world-th, its own; the first
    process then reads those of the others."""
    order = sorted(range(count), key=lambda i: (i % world != rank, i))
    return order if rank == 0 else [i for i in order if i % world == rank]


def awaited(
    read: Callable[[], T | None], working: Callable[[], bool], path: Path, patience: float = 3600.0
) -> T | None:
    """What another process makes and ``read`` finds; None where that one has stopped.

    Raises:
        ProbeError: it did not come within ``patience`` seconds.
    """
    began = time.monotonic()
    while (result := read()) is None:
        if not working():
            return read()  # it may have been its last
        if time.monotonic() - began > patience:
            raise ProbeError(f"{path}: another process has not made this post in {patience:.0f} s; did it stop?")
        time.sleep(0.2)
    return result


def _end_with(parent: int) -> None:
    """Ends this process when its parent has: what nobody waits for need not be made."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # files are written whole or not at all

    threading.Thread(target=watch, daemon=True).start()
