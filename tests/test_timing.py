"""The test of growth fails for a square, and not for a machine that is busy."""

import time

import pytest

from tests.timing import TRIES, grows_at_most


def worked(monkeypatch: pytest.MonkeyPatch, power: float, busy: list[float]) -> None:
    """Work whose time grows with some power of its size, on a clock where other programs add what is ``busy``."""
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def work(size: int) -> None:
        clock[0] += (size / 1000) ** power / 5 + (busy.pop(0) if busy else 0.0)

    grows_at_most(work, 1000, 4000, 8)


def test_a_square_fails_whatever_else_runs(monkeypatch):
    with pytest.raises(AssertionError, match=r"4 times the input took 16\.0 times the time"):
        worked(monkeypatch, 2, [])
    with pytest.raises(AssertionError, match="4 times the input took"):
        worked(monkeypatch, 2, [0.0, 5.0, 3.0, 0.0] * TRIES)


def test_a_line_passes_though_others_run(monkeypatch):
    worked(monkeypatch, 1, [])
    worked(monkeypatch, 1, [0.0, 5.0, 0.0, 3.0])
