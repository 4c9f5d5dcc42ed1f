"""Several real processes on the loopback interface that are one run, each with devices of its own on this CPU."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How one process ended."""

    code: int
    out: str
    err: str


class Pod:
    """``count`` processes of the same Python command (arguments after the interpreter), ``devices`` each.

    Args:
        each: a command per process instead, for those that are not to be the same.
    """

    def __init__(
        self, *arguments: object, count: int = 2, devices: int = 4, each: Sequence[Sequence[object]] | None = None
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        self.processes: list[Any] = []
        for number in range(count):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags,
                           "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
                           "JAX_PROCESS_ID": str(number)}  # fmt: skip
            command = [sys.executable, *map(str, arguments if each is None else each[number])]
            self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                                   stderr=subprocess.PIPE, text=True))  # fmt: skip

    def ended(self, seconds: float = 1200) -> list[Ended]:
        """Waits for all at once: none leaves before the others are done, and pipes fill."""
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda process: process.communicate(timeout=seconds), self.processes))
        return [Ended(one.returncode, _without_gloo(out), err)
                for one, (out, err) in zip(self.processes, found, strict=True)]  # fmt: skip

    def done(self) -> list[str]:
        """What each printed; all must end well."""
        found = self.ended()
        for one in found:
            assert one.code == 0, one.err[-4000:]
        return [one.out for one in found]

    def kill(self) -> list[Ended]:
        for process in self.processes:
            process.kill()
        return self.ended(60)

    def when(self, ready: Callable[[], bool], act: Callable[[], Any], seconds: float = 300) -> Any:
        """``act()`` as soon as ``ready()``."""
        ends = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < ends and all(one.poll() is None for one in self.processes), self.kill()
            time.sleep(0.005)
        return act()


def _without_gloo(out: str) -> str:
    """Its C++ side writes to stdout whom it is connected to, from threads that may write into each other's lines."""
    lines = out.splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() and not re.search(r"Gloo|peer ranks|Expected number", line))
