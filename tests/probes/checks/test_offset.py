"""A map of erasure that shows missing text may not speak; the one that puts other text there finds the cue."""

import numpy as np
import pytest

from probes.checks.offset import offset
from probes.validation.holes import with_offset


@pytest.mark.parametrize("nats", [0.5, -0.5])
def test_a_planted_offset(nats: float) -> None:
    found = with_offset(nats, 4)
    assert found["shut"] == 1.0 and found["filled"] == 1.0 and found["after"] == 1.0
    assert found["before"] < 0.75  # the rule without the contrast misses what all explanations here quote


def test_without_an_offset_nothing_is_shut() -> None:
    found = with_offset(0.0, 3)
    assert found == {"hole": 1.0, "filled": 1.0, "shut": 0.0, "before": 1.0, "after": 1.0}


@pytest.mark.parametrize(
    ("hole", "replaced", "value", "status"),
    [
        ([3, 3, 8, 3], [0, 0, 5, 0], 3.0, "failed_gate"),
        ([1, 1, 6, 1], [0, 0, 5, 0], 1.0, "ok"),
        ([5, 0, 0, 0], [5, 0, 0, 0], 0.0, "ok"),
        ([4, 4, 4, 4], [4, 4, 4, 4], 0.0, "ok"),  # evidence everywhere stays evidence where text is replaced
        ([-2, -2, -2, -2], [0, 0, 0, 0], -2.0, "failed_gate"),
        ([0, 0, 0], [0, 0, 0], 0.0, "ok"),
        ([1, 2], [0, 0], None, "abstain"),
        ([1, 2, np.nan], [0, 0, 0], None, "abstain"),
    ],
)
def test_the_gate(hole: list[float], replaced: list[float], value: float | None, status: str) -> None:
    found = offset(np.array(hole, dtype=float), np.array(replaced, dtype=float))
    assert (found.value, found.status) == (value, status)
