"""No command writes over a file that it reads: what was to be answered, or counted, would be gone."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from mentalglm_jax.errors import InputError


def guarded(command: Any) -> Any:
    """A command of Click with its subcommands, each of which refuses such an ``--out`` before it does anything."""
    for one in getattr(command, "commands", {}).values():
        guarded(one)
    if not hasattr(command, "commands"):
        command.invoke = functools.partial(_invoked, command.invoke)
    return command


def _invoked(invoke: Callable[[Any], Any], context: Any) -> Any:
    """Raises: InputError."""
    out = context.params.get("out")
    if out is None or not os.path.isfile(out):
        return invoke(context)
    for option in context.command.params:
        for path in _paths(context.params.get(option.name)) if option.name != "out" else ():
            if os.path.isfile(path) and os.path.samefile(path, out):
                raise InputError(f"--out {out}: is what {option.opts[0]} names, and would be replaced; name another "
                                 "file")  # fmt: skip
    return invoke(context)


def _paths(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, (str, os.PathLike)) and os.fspath(value) and "\0" not in os.fspath(value):
        yield value
