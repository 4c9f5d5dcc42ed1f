"""Options that are numbers, of every command of both command lines: what is no number is refused, also where a minimum
and a maximum would let it through. NaN is below no minimum, above no maximum, and no difference is larger than it."""

import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from tests.hostile.attack import ENTRIES, refused, run


def numbers(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The words that lead to each option that is a real number."""
    for name, one in getattr(command, "commands", {}).items():
        yield from numbers(one, (*path, name))
    if not getattr(command, "commands", {}):
        kinds = typing.get_type_hints(inspect.unwrap(command.callback))
        for option in command.params:
            if float in (kinds[option.name], *typing.get_args(kinds[option.name])):
                yield (*path, option.opts[0])


FOUND = [found for name in ENTRIES
         for found in numbers(typer.main.get_command(importlib.import_module(ENTRIES[name]).app), (name,))]  # fmt: skip


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "1e999", "NaN_", "9" * 400])
@pytest.mark.parametrize("words", FOUND, ids=" ".join)
def test_what_is_no_number(words, value, capsys):
    refused(run([*words, value], capsys), words[-1])


def test_every_such_option_is_known():
    assert {words[-1] for words in FOUND} == {
        "--minutes", "--rope-theta", "--max-shard-gb", "--threshold", "--accept-at", "--temperature", "--tolerance",
        "--margin", "--length-ratio", "--max-memory", "--min-p"
    }  # fmt: skip
