"""The two ways a command can refuse: the input is wrong, or the work failed."""


class MentalGLMError(Exception):
    """Base of every error this package raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(MentalGLMError):
    """A file, row, key or option the user gave is wrong. The message names it and says what to do."""

    exit_code = 2


class RunError(MentalGLMError):
    """The input was fine, the work could not be finished (interrupted, diverged, disk full)."""

    exit_code = 1
