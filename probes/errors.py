"""The two ways a probe command can refuse: the input is wrong, or the work failed; and the one way it warns."""


class ProbeError(Exception):
    """The work could not be finished. ``exit_code`` is what the command line returns."""

    exit_code = 1


class ProbeInputError(ProbeError):
    """A file, row, key or option the user gave is wrong. The message names it and says what to do."""

    exit_code = 2


class ProbeWarning(UserWarning):
    """Something was read otherwise than it stands, or made again. A command prints it as a line on stderr."""
