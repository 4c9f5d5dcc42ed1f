"""What the commands print, all of it: lines and tables in which names from outside are text and nothing else.

A path, an id or a message may hold control characters, Rich markup, or what the terminal's encoding cannot say. They
are shown escaped and do nothing: no colour, no cursor, no second line, no failure.
"""

import json
import logging
import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MOST = 1000  # characters of a line that is no result
SAFETY = (
    "This is a research instrument, not a diagnosis. If you or someone you know is in a crisis, "
    "please talk to a person: a doctor, a crisis line, someone you trust."
)
PIPED = 240  # columns of a table that goes to a file or a pipe, which have no width of their own
# Of every command and group. Help is plain text: Rich would take "[data]" for a style and leave it out.
TYPER: dict[str, Any] = {
    "no_args_is_help": True, "rich_markup_mode": None, "context_settings": {"max_content_width": 120}
}  # fmt: skip


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n".join(["\b", "Example:" if len(commands) == 1 else "Examples:", *(f"  {one}" for one in commands)])


def stdout() -> Console:
    """Where results go: as wide as the terminal, or as COLUMNS says."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED)


def inert(text: str) -> str:
    """``text`` with control characters, line and direction marks and halves of surrogate pairs escaped."""
    if text.isprintable():
        return text
    spaces = "\u3000\u00a0"  # no control characters, though Python does not print them
    shown = (
        one if one.isprintable() or one in spaces else one.encode("unicode_escape").decode("ascii") for one in text
    )
    return "".join(shown)


def cell(text: object) -> Text:
    """A cell of a table: text without markup."""
    return Text(inert(str(text)))


_hushed = False


def hush() -> None:
    """From here on results and progress are another process's to tell; reasons of a failure are still said."""
    global _hushed
    _hushed = True


def hushed() -> bool:
    """Whether ``hush`` was called."""
    return _hushed


def say(line: str | Table, console: Console | None = None, style: str | None = None) -> None:
    """Prints a line (or several, for line feeds between ours are meant) or a table on stdout, or on ``console``."""
    if _hushed:
        return
    console = console or stdout()
    if isinstance(line, str):
        for part in line.split("\n"):
            console.print(inert(part), soft_wrap=True, markup=False, highlight=False, style=style)
    else:
        console.print(line)


def complain(line: str) -> None:
    """One line on stderr, of a length that can be read."""
    line = inert(line)
    sys.stderr.write((line if len(line) <= MOST else f"{line[: MOST - 1]}…") + "\n")


class LogLines(logging.Handler):
    """Where warnings of the log go that nobody else takes: they quote files and checkpoints of strangers."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line for each of the record's."""
        for line in self.format(record).split("\n"):
            complain(line)


def usage(error: Exception, message: str) -> str:
    """What is wrong with a command line, of Click's ``message``: our names bare, what was typed in quotes."""
    named = r"^(Missing \w+|Invalid value for|Option) '([^']+)'(?: / '-[^']+')*"
    said = re.sub(named, r"\1 \2", message.partition("\n")[0])
    said = f"{said[:1].lower()}{said[1:]}".strip().removesuffix(".")
    context = getattr(error, "ctx", None)
    return f"{said} ({context.command_path} --help says more)" if context is not None else said


def print_json(value: Any) -> None:
    """One JSON object on stdout; in ASCII where stdout cannot say all of it."""
    if _hushed:
        return
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    sys.stdout.write("".join(f"\\u{ord(one):04x}" if "\x7f" <= one <= "\x9f" else one for one in text) + "\n")


def forgiving(stream: Any) -> None:
    """What an encoding cannot say is escaped: ``LC_ALL=C`` or ``PYTHONIOENCODING=ascii`` is no reason to fail."""
    if (change := getattr(stream, "reconfigure", None)) is not None:
        change(errors="backslashreplace")


def stderr() -> Console:
    """Where progress and reasons go."""
    return Console(stderr=True)
