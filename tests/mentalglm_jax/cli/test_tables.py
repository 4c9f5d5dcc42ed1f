"""What `mentalglm run` prints at its end, of posts that nobody planted a cue in too."""

import io
from typing import Any

from rich.console import Console

from mentalglm_jax.cli.tables import summary_table

PLANTED = {
    "n": 4, "cue_auroc": {"ig": 0.9, "erase": None}, "mass_ratio": {"ig": 0.5, "erase": 0.25},
    "mass_ratio_null": {"ig": 0.125, "erase": None}, "completeness_delta": {"mean": 0.01}, "n_quotes": 4,
    "verdicts": {"supported": 3, "contradicted": 0, "inconclusive": 1}, "conclusion": "supported",
    "verdicts_by_chance": {"supported": 0.5, "contradicted": 2.25}, "diagnosticity": None,
}  # fmt: skip
OWN = {
    "n": 4, "cue_auroc": {"ig": None, "erase": None}, "mass_ratio": {"ig": None, "erase": None}, "n_quotes": 0,
    "mass_ratio_null": {}, "verdicts": None,
}  # fmt: skip


def printed(probes: dict[str, Any]) -> list[str]:
    """The rows, their cells one space apart."""
    summary = {"eval_split": "test", "parity": {}, "eval": {}, "probes": probes, "seconds": {"data": 1.0}}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


def test_of_a_planted_cue_every_map_has_its_row():
    rows = printed(PLANTED)
    assert "saliency finds the planted cue: AUROC (ig) 0.900 chance 0.500" in rows
    assert "saliency finds the planted cue: AUROC (erase) – chance 0.500" in rows
    assert "positive saliency inside the cited span: share (ig) 0.500 chance 0.125" in rows
    assert "positive saliency inside the cited span: share (erase) 0.250" in rows
    said = (
        "explanations supported / contradicted / inconclusive (n = 4) 3 / 0 / 1 supported; random citations: 0.5 / 2.2"
    )
    assert said in rows


def test_where_nothing_was_planted_or_quoted_one_row_says_so():
    rows = printed(OWN)
    assert not any("planted" in row or "explanations" in row for row in rows)
    assert [row for row in rows if "cited span" in row] == [
        "positive saliency inside the cited span: share – no explanation quotes its post"]  # fmt: skip
    assert not any("no explanation" in row for row in printed(OWN | {"n_quotes": 2}))
