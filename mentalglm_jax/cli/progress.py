"""How commands show that they are at work: a bar on a terminal, a line now and then where there is none.

One rule for every long loop (training, generation, evaluation): a log file of ``nohup`` or a launcher gets a line when
a stage begins, one ``FIRST`` seconds after that, one every ``EVERY`` seconds from then on, and the last if there were
any. In a run of several processes only the first reports (``pipeline.job.run``).
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from mentalglm_jax.cli.output import hushed, say

FIRST, EVERY = 10.0, 30.0


class ConsoleReporter:
    """Progress of the stages of a command, and the lines they say.

    Args:
        console: where to; whether it is a terminal decides between bar and lines.
        clock: seconds, rising.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console = console
        self._clock = clock
        self._bar: Progress | None = None
        self._task: Any = None

    def stage(self, name: str, announced: bool = True) -> Callable[..., None]:
        """Starts a bar that counts once the stage reports; the bar of the stage before is closed. ``announced``: a log
        is told that the stage begins."""
        self.close()
        if hushed() or not self.console.is_terminal:
            if announced:
                say(f"{name} ...", self.console)
            return _Lines(name, self.console, self._clock)
        room = max(self.console.width - 64, 0)  # numbers are kept whole; what a stage says is cut at the line end
        self._bar = Progress(
            TextColumn("[bold]{task.description:<15}"), BarColumn(bar_width=16), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, max_width=room, overflow="ellipsis")),
            console=self.console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(name, total=None, text="")

        def progress(done: int, total: int, text: str = "") -> None:
            if self._bar is not None:
                self._bar.update(self._task, completed=done, total=total, text=text)

        return progress

    def say(self, line: str) -> None:
        """Prints a line of the stage, above its bar."""
        say(f"  {line}", self.console)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Lines:
    """``  english 120/500, 0:03:20 left, loss 1.234, 800 tokens/s`` now and then. The time left goes by what was done
    since the first report, which has waited for compilation and may tell of what was done before a resume."""

    def __init__(self, name: str, console: Console, clock: Callable[[], float]):
        self._name, self._console, self._clock = name, console, clock
        self._due = clock() + FIRST
        self._first: tuple[float, int] | None = None
        self._told = False

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = self._clock()
        if self._first is None or done < self._first[1]:  # a stage may count several things one after the other
            self._first = now, done
        if now < self._due and not (done >= total and self._told):
            return
        self._due, self._told = now + EVERY, done < total
        began, before = self._first
        left = ""
        if before < done < total:
            left = f"{timedelta(seconds=round((now - began) / (done - before) * (total - done)))} left"
        rest = ", ".join(filter(None, (f"{done}/{total}", left, text)))
        say(f"  {self._name} {rest}", self._console)
