"""A map of erasure that shows missing text, or text of other posts, may not speak; the other kind finds the cue."""

import numpy as np
import pytest

from probes.checks.erasure_offset import offsets
from probes.validation.holes import holes, with_offset


@pytest.mark.parametrize("nats", [0.5, -0.5])
def test_a_planted_offset(nats: float) -> None:
    found = with_offset(nats, 4)
    assert found["shut"] == 1.0 and found["unfilled"] == 0.0 and found["filled"] == 1.0 and found["after"] == 1.0
    assert found["before"] < 0.75  # the rule without the contrast misses what all explanations here quote


@pytest.mark.parametrize("nats", [-1.0, -2.0])
def test_other_posts_that_speak_for_one_label(nats: float) -> None:
    found = with_offset(0.0, 4, others=nats)
    assert found["hole"] == 1.0 and found["shut"] == 0.0 and found["unfilled"] == 1.0
    assert found["before"] == found["after"] == 1.0  # a good map keeps its voice


def test_without_an_offset_nothing_is_shut() -> None:
    found = with_offset(0.0, 3)
    assert found == {"hole": 1.0, "filled": 1.0, "shut": 0.0, "unfilled": 0.0, "before": 1.0, "after": 1.0}


@pytest.mark.parametrize(
    ("hole", "replaced", "value", "failed"),
    [
        ([3, 3, 8, 3], [0, 0, 5, 0], 3.0, ["erase", "shap", "kernelshap"]),
        ([0, 0, 5, 0], [3, 3, 8, 3], -3.0, ["erase_resample"]),
        ([0, 0, 5, 0], [-3, -3, 2, -3], 3.0, ["erase_resample"]),
        ([1, 1, 6, 1], [0, 0, 5, 0], 1.0, []),
        ([0, 0, 5, 0], [1, 1, 6, 1], -1.0, []),
        ([5, 0, 0, 0], [5, 0, 0, 0], 0.0, []),
        ([4, 4, 4, 4], [4, 4, 4, 4], 0.0, []),  # evidence everywhere stays evidence where text is replaced
        ([-2, -2, -2, -2], [0, 0, 0, 0], -2.0, ["erase", "shap", "kernelshap"]),
        ([0, 0, 0], [0, 0, 0], 0.0, []),
        ([1, 2], [0, 0], None, []),
        ([1, 2, np.nan], [0, 0, 0], None, []),
    ],
)
def test_the_gate(hole: list[float], replaced: list[float], value: float | None, failed: list[str]) -> None:
    nets = {name: np.array(hole, dtype=float) for name in ("ig", "erase", "shap", "kernelshap")}
    found = offsets(nets | {"erase_resample": np.array(replaced, dtype=float)})
    assert [c.method for c in found] == ["erase", "shap", "kernelshap", "erase_resample"]
    assert found[0].value == value and found[-1].value == (None if value is None else -value)
    assert [c.method for c in found if c.status == "failed_gate"] == failed
    assert all((c.status == "abstain") == (value is None) for c in found)
    assert offsets(nets) == []


def test_rows_of_the_validation() -> None:
    rows = {r["id"]: r for r in holes(1)}
    assert len(rows) == 5 * 6 and all(r["ok"] for r in rows.values())
    assert rows["V11.others-1.0.unfilled"]["value"] == 1.0 and rows["V11.+0.5.shut"]["value"] == 1.0
