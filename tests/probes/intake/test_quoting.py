"""Rows that a mark at the beginning of a post swallows are missed; honest cells of several lines are not."""

import csv
import io
from pathlib import Path

import pytest

from probes.errors import ProbeInputError
from probes.intake.rows import read_records
from tests.hostile.foreign_files import TORN_TABLES


@pytest.mark.parametrize(("ending", "content", "line"), TORN_TABLES.values(), ids=TORN_TABLES)
def test_rows_inside_a_cell_are_missed(tmp_path: Path, ending: str, content: str, line: int) -> None:
    path = tmp_path / f"t{ending}"
    path.write_text(content, newline="")
    says = rf"t\{ending}:(\d+: row \d has|{line}: a cell in quotation marks takes in \d+ lines that are)"
    with pytest.raises(ProbeInputError, match=says):
        read_records(path)


@pytest.mark.parametrize("post", ["I woke up, tired\nand went to bed", "idk,maybe\nso", "so,a\n\nb", 'a "b, c\nd" e'])
def test_a_cell_of_several_lines_is_one_cell(tmp_path: Path, post: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([("post", "label"), (post, "low"), ("It rained, again", "low"), ("So", "high")])
    (tmp_path / "t.csv").write_text(out.getvalue(), newline="")
    assert [one["post"] for one in read_records(tmp_path / "t.csv")] == [post, "It rained, again", "So"]


def test_both_packages_judge_alike() -> None:
    """Neither imports the other, and what one takes the other is to take."""
    first, second = (Path(one) / "quoting.py" for one in ("mentalglm_jax/data", "probes/intake"))
    root = Path(__file__).parents[3]
    assert (root / first).read_text("utf-8") == (root / second).read_text("utf-8")
