"""What a command says of its progress where nobody watches: one line now and then, with the time that is left."""

import io
import re

from rich.console import Console

from mentalglm_jax.cli.progress import ConsoleReporter


class Told:
    """A reporter with a clock of its own, and what it wrote."""

    def __init__(self, terminal: bool = False):
        self.now, self.file = 100.0, io.StringIO()
        console = Console(file=self.file, force_terminal=terminal, width=120)
        self.reporter = ConsoleReporter(console, clock=lambda: self.now)

    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then():
    told = Told()
    progress = told.reporter.stage("train english")
    for done in range(1, 101):  # a second a step, after five that compiled
        told.now = 104.0 + done
        progress(done, 100, f"loss {done / 100:.3f}, 800 tokens/s")
    assert told.lines() == [
        "train english ...",
        "  train english 6/100, 0:01:34 left, loss 0.060, 800 tokens/s",
        "  train english 36/100, 0:01:04 left, loss 0.360, 800 tokens/s",
        "  train english 66/100, 0:00:34 left, loss 0.660, 800 tokens/s",
        "  train english 96/100, 0:00:04 left, loss 0.960, 800 tokens/s",
        "  train english 100/100, loss 1.000, 800 tokens/s",
    ]


def test_a_short_stage_says_that_it_begins_and_no_more():
    told = Told()
    progress = told.reporter.stage("export")
    for done in (1, 2, 3):
        told.now += 2
        progress(done, 3)
    assert told.lines() == ["export ..."]


def test_the_time_left_is_that_of_what_is_done_now():
    """Steps before a resume were not done in no time; a second count in the same stage starts anew."""
    told = Told()
    progress = told.reporter.stage("generate")
    for done, seconds in ((500, 1), (510, 20), (520, 20), (1, 30), (11, 30)):
        told.now += seconds
        progress(done, 1000)
    assert told.lines()[1:] == [
        "  generate 510/1000, 0:16:20 left", "  generate 1/1000", "  generate 11/1000, 0:49:27 left"
    ]  # fmt: skip


def test_names_from_outside_are_text():
    told = Told()
    progress = told.reporter.stage("train [red]a[/]\x1b[31m")
    told.now += 60
    progress(1, 2, "[bold]x")
    assert told.lines() == ["train [red]a[/]\\x1b[31m ...", "  train [red]a[/]\\x1b[31m 1/2, [bold]x"]


def test_a_terminal_gets_a_bar_and_no_lines():
    told = Told(terminal=True)
    progress = told.reporter.stage("train english")
    told.now += 60
    progress(1, 2, "loss 1")
    told.reporter.say("said")
    told.reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told.file.getvalue())
    assert "train english ..." not in text and "  said" in text and "1/2" in text
