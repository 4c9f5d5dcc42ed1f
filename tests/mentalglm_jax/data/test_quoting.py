"""Rows that a mark at the beginning of a post swallows are missed; honest cells of several lines are not."""

import csv
import io
from pathlib import Path

import pytest

from mentalglm_jax.data.tables import read_table
from mentalglm_jax.errors import InputError
from tests.hostile.foreign_files import TORN_TABLES

REST = [("We cooked together", "low"), ("The bus was late", "high"), ("It rained, again", "low")]
HONEST = {
    "a comma in each line but the last": [("I woke up, tired\nand went back to bed", "low")],
    "a comma in each line": [("I am tired,\nso, what", "low"), ("idk,maybe\nso,whatever", "low")],
    "no space behind it": [("idk,maybe\nwhatever", "low")],
    "a paragraph between": [("I woke up, tired\n\nand, then, nothing", "high"), ("idk,maybe\n\nwhatever", "low")],
    "marks inside": [('"No, never"\nhe said', "low"), ('"No,never\nmind', "low")],
    "of many lines": [("\n".join(f"day {day}, nothing" for day in range(30)) + "\nthe end", "low")],
    "tabs": [("pain\tbad\nsleep\tbad", "low")],
    "a label's word": [("it was low,high\nand so, low", "low")],
}


def table(rows, delimiter, quoting=csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=quoting).writerows(rows)
    return out.getvalue()


def read(path: Path, delimiter: str):
    return [tuple(cells) for _, cells in read_table(path, ("utf-8-sig",), delimiter)]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("columns", ["post label", "label post", "id post label", "lang post label", "post why label"])
@pytest.mark.parametrize("name", HONEST)
def test_a_cell_of_several_lines_is_one_cell(tmp_path, name, columns, delimiter, quoting):
    path, names = tmp_path / "t.csv", columns.split()
    rows = [tuple({"id": str(number), "lang": "en", "post": post, "why": f"so, {post}", "label": label}[name]
                  for name in names) for number, (post, label) in enumerate([*HONEST[name], *REST])]  # fmt: skip
    rows.append(tuple(f'it is "{number}"{delimiter} so' for number in range(len(names))))
    path.write_text(table([tuple(names), *rows], delimiter, quoting), newline="")
    assert read(path, delimiter) == [tuple(names), *((*map(str, row),) for row in rows)]


@pytest.mark.parametrize(("ending", "content", "line"), TORN_TABLES.values(), ids=TORN_TABLES)
def test_rows_inside_a_cell_are_missed(tmp_path, ending, content, line):
    path = tmp_path / f"t{ending}"
    path.write_text(content, newline="")
    with pytest.raises(InputError, match=rf"t\{ending}:{line}: a cell in quotation marks takes in \d+ lines that are"):
        read(path, "\t" if ending == ".tsv" else ",")


@pytest.mark.parametrize(
    "content", ['1\t"I am tired\n0\tA fine day\n1\tNo more"\n0\tIt rained\n', '"One\t1\nTwo"\t0\nThree\t1\n']
)
def test_the_first_row_may_be_no_header(tmp_path, content):
    """As in SOS-HL-1K's files; two labelled posts were gone."""
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(InputError, match=r"t\.tsv:1: a cell in quotation marks takes in \d lines"):
        read(tmp_path / "t.tsv", "\t")


def test_a_name_of_two_lines_is_one_name(tmp_path):
    (tmp_path / "t.csv").write_text('"post\n(text, as written)",label\nWe left,high\n')
    assert read(tmp_path / "t.csv", ",")[0] == ("post\n(text, as written)", "label")


def test_the_only_quoted_cell_may_be_a_sentence(tmp_path):
    (tmp_path / "t.csv").write_text('post,label\n"I woke up, tired\nand went back",low\nWe left,high\n', "utf-8")
    assert read(tmp_path / "t.csv", ",")[1] == ("I woke up, tired\nand went back", "low")
