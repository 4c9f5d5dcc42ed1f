"""The two ways a command can refuse: the input is wrong, or the work failed."""

import difflib
from collections.abc import Iterable


class MentalGLMError(Exception):
    """Base of every error this package raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


def install(extra: str) -> str:
    """How to get what an extra brings: from a clone, for the package is on no index."""
    return f"in a clone of mentalglm-jax: pip install '.[{extra}]'"


class InputError(MentalGLMError):
    """A file, row, key or option the user gave is wrong. The message names it and says what to do."""

    exit_code = 2


class RunError(MentalGLMError):
    """The input was fine, the work could not be finished (interrupted, diverged, disk full)."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
