"""The ways a probe command can refuse: input is wrong, one row of it is, or the work failed; and how it warns."""


class ProbeError(Exception):
    """The work could not be finished. ``exit_code`` is what the command line returns."""

    exit_code = 1


class ProbeInputError(ProbeError):
    """A file, row, key or option the user gave is wrong. The message names it and says what to do."""

    exit_code = 2


class RowRefused(ProbeInputError):
    """One row of a file cannot be probed; the others can.

    Attributes:
        reason: why, in the same words for every such row and with nothing of its text: it is counted and passed on.
    """

    def __init__(self, row: str, said: str, reason: str) -> None:
        """``said``: what is wrong with this row and what to do, after its name."""
        super().__init__(f"row {row!r}: {said}")
        self.reason = reason


class ProbeWarning(UserWarning):
    """Something was read otherwise than it stands, or made again. A command prints it as a line on stderr."""
