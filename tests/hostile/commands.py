"""Every command of both command lines, by the name it has there, so that a new one cannot be forgotten."""

import importlib
from collections.abc import Iterator
from typing import Any

import typer

from tests.hostile.attack import ENTRIES


def commands(entry: str) -> list[str]:
    """``["run", ..., "data review import"]`` of ``mentalglm`` or ``probes``."""
    return list(_leaves(typer.main.get_command(importlib.import_module(ENTRIES[entry]).app), ()))


def _leaves(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    if not (below := getattr(command, "commands", None)):
        yield " ".join(path)
        return
    for name, one in below.items():
        yield from _leaves(one, (*path, name))


ALL = [(entry, command) for entry in ENTRIES for command in commands(entry)]
IDS = [f"{entry} {command}" for entry, command in ALL]
