"""Forms and sheets that leave for people and come back from them, against `mentalglm data review`."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest

from mentalglm_jax.data.cells import from_cell, to_cell
from mentalglm_jax.data.explain.review import SCALES, export_review, form_id
from mentalglm_jax.data.records import read_records, write_records
from tests.hostile.attack import refused, run
from tests.mentalglm_jax.data.explain.test_review import answers, put, records

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=1", "＝1", "＋1", "－1", "＠x",
            "=HYPERLINK(\"http://x\")", "'=1", "'", "''", "' =1", "=cmd|' /C calc'!A0")  # fmt: skip
CHANGED = (
    "007",
    "1e5",
    "1,000",
    "2024-01-01",
    "1/2",
    "TRUE",
    "false",
    "MAR1",
    "sep-2",
    ".5",
    "(3)",
    "12345678901234567890",
)
INNER = ("x;=1+1", "x;\t-1", "x; =1", "x\n=cmd|' /C calc'!A0", "x\r\n@SUM(A1)", "x;'=1", "x;''", "x\n\u3000＝1", ";=1",
         'a;"=1+1;b', "x;\x0b=1", "x;\u2003 +1")  # fmt: skip
NAMES = ("__proto__", "constructor", "toString", 'a,"b"', "a\r\nb", "[/b]", "\x1b[31m", "</script>", "名", "a;=1")


def sheet(path):
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def rate(folder, rater="A"):
    """Fills review.csv in as a spreadsheet does that keeps its cells."""
    rows = sheet(folder / "review.csv")
    for number, row in enumerate(rows[1:]):
        row[1], row[3:7] = rater, [str(number % 4)] * 4
    with (folder / "filled.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "filled.csv", rows


@pytest.mark.parametrize("text", INNER, ids=repr)
@pytest.mark.parametrize("name", [False, True], ids=["text", "name"])
def test_no_cell_begins_inside_a_cell(text, name):
    """A spreadsheet whose columns stand between ; reads our commas as text, and our quotation marks with them."""
    cell = to_cell(text, name=name)
    parts = re.split(r"[;\t\r\n]", cell)
    assert not [
        part
        for part in parts
        if part.lstrip(' "\x0b\u2003\u3000').startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠"))
    ]
    assert from_cell(cell) == text


@pytest.mark.parametrize("name", [*FORMULAS, *CHANGED, *NAMES, *INNER], ids=repr)
def test_an_id_leaves_inert_and_comes_back_as_it_was(tmp_path, name, capsys):
    export_review([replace(one, id=one.id if n else name) for n, one in enumerate(records(2))], tmp_path)
    filled, rows = rate(tmp_path)
    for cell in (row[2] for row in rows[1:]):
        assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) and cell[:1] not in "\t\r\n"
    done = run(["mentalglm", "data", "review", "import", tmp_path, filled, "--json"], capsys)
    assert done.code == 0, done.err
    reviewed = [json.loads(line) for line in (tmp_path / "reviewed.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert {row["id"]: row["raters"] for row in reviewed} == {name: 1, "r1": 1}


@pytest.mark.parametrize("name", [*CHANGED, *(one for one in FORMULAS if one[0] != "'")], ids=repr)
def test_no_name_is_left_that_a_spreadsheet_would_change(name):
    cell = to_cell(name, name=True)
    assert cell[:1] == "'" and from_cell(cell) == from_cell("'" + name) == name == from_cell(name)


@pytest.mark.parametrize("text", FORMULAS, ids=repr)
@pytest.mark.parametrize("field", ["post", "explanation"])
def test_no_cell_of_a_sheet_is_a_formula(tmp_path, field, text):
    export_review([replace(records(1)[0], **{field: text + "x"})], tmp_path)
    row = sheet(tmp_path / "review.csv")[1]
    assert row[9 if field == "post" else 11] == to_cell(text + "x") and to_cell(text + "x")[0] == "'"


@pytest.mark.parametrize("text", [*FORMULAS, *INNER, "3 errors", "plain"], ids=repr)
def test_a_rater_and_a_comment_come_back_as_they_were(tmp_path, text, capsys):
    """As the form's own sheet has them: marked."""
    export_review(records(1), tmp_path)
    form = form_id(read_records(tmp_path / "sample.jsonl"))
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["form", "rater", "id", *SCALES, "comment"])
        writer.writerow([form, to_cell("A" + text, name=True), "r0", 1, 1, 1, 1, to_cell(text)])
    assert run(["mentalglm", "data", "review", "import", tmp_path, tmp_path / "a.csv"], capsys).code == 0
    row = json.loads((tmp_path / "reviewed.jsonl").read_text("utf-8"))
    assert row["comments"] == {("A" + text).strip(): text.strip()}


def test_two_records_of_one_id_are_no_form(tmp_path, capsys):
    """In two files of a build: the raters' work could not be told apart."""
    for split in ("train", "dev"):
        write_records(tmp_path / "build" / "records" / f"{split}.jsonl", records(1))
    done = run(["mentalglm", "data", "review", "export", tmp_path / "build", "--out", tmp_path / "r"], capsys)
    refused(done, "id 'r0' stands in two of the files")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("[" * 100_000, "more than 50 levels"),
        ('{"form": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ("[]", "not a file of this form"),
        ("null", "not a file of this form"),
        ({"rater": ["A"]}, "not a file of this form"),
        ({"rater": {"name": "A"}}, "not a file of this form"),
        ({"ratings": [["r0", {"overall": 1}]]}, "not a file of this form"),
        ({"ratings": {"r0": {"overall": 1, "comment": 5}}}, "not a file of this form"),
        ({"ratings": {"r0": {"overall": float("nan")}}}, "NaN is not a number"),
        ({"ratings": {"r0": {"overall": 1e400}}}, "Infinity is not a number"),
        ({"ratings": {"r0": {"overall": "٣"}}}, "expected 0, 1, 2 or 3"),
        ({"ratings": {"__proto__": {"overall": 1}}}, "item '__proto__' is not in the sample"),
        ('{"form": "FORM", "rater": "A", "ratings": {"r0": {"overall": 1}, "r0": {}}}', "'r0' stands more than once"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b"", "not JSON"),
    ],
    ids=["deep", "5,000 digits", "list", "null", "list rater", "object rater", "pairs", "number comment", "NaN",
         "infinity", "other digits", "proto", "an item twice", "no UTF-8", "empty"],
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path, change, says, capsys):
    export_review(records(2), tmp_path)
    sample = read_records(tmp_path / "sample.jsonl")
    path = tmp_path / "x.json"
    if isinstance(change, dict):
        put(path, answers(sample, "A", lambda n: 1) | change)
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.replace("FORM", form_id(sample)).encode())
    refused(run(["mentalglm", "data", "review", "import", tmp_path, path], capsys), rf"x\.json.*{says}")
    assert not (tmp_path / "reviewed.jsonl").exists()


def test_half_a_surrogate_pair_in_a_comment_loses_no_rating(tmp_path, capsys):
    export_review(records(1), tmp_path)
    sample = read_records(tmp_path / "sample.jsonl")
    given = answers(sample, "A", lambda n: 1)
    given["ratings"]["r0"]["comment"] = "so \ud83d"
    (tmp_path / "x.json").write_text(json.dumps(given))
    assert run(["mentalglm", "data", "review", "import", tmp_path, tmp_path / "x.json"], capsys).code == 0
    assert json.loads((tmp_path / "reviewed.jsonl").read_text("utf-8"))["comments"] == {"A": "so \ufffd"}


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/x]", "\x1b[31mred", "\u202ex"], ids=repr)
def test_an_id_is_printed_inert(tmp_path, name, capsys):
    export_review([replace(records(1)[0], id=name)], tmp_path)
    sample = read_records(tmp_path / "sample.jsonl")
    files = [
        put(tmp_path / f"{rater}.json", answers(sample, rater, lambda n, v=v: v)) for rater, v in (("A", 0), ("B", 3))
    ]
    done = run(["mentalglm", "data", "review", "import", tmp_path, *files], capsys)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert done.code == 0 and f"{shown}: apart on consistency" in done.out and "\x1b" not in done.out


@pytest.mark.parametrize(("whose", "column"), [("experts", "label"), ("model", "model_label")])
def test_a_sheet_says_whose_label_it_is(tmp_path, whose, column):
    export_review(records(1), tmp_path, labels_by=whose)
    assert sheet(tmp_path / "review.csv")[0][10] == column


def test_no_export_takes_away_what_raters_wrote_into_the_sheet(tmp_path, capsys):
    write_records(tmp_path / "posts.jsonl", records(4))
    again = ["mentalglm", "data", "review", "export", tmp_path / "posts.jsonl", "--out", tmp_path / "r"]
    assert run(again, capsys).code == 0 == run(again, capsys).code
    filled, _ = rate(tmp_path / "r")
    filled.replace(tmp_path / "r" / "review.csv")
    before = (tmp_path / "r" / "review.csv").read_bytes()
    refused(run(again, capsys), r"review\.csv: is there already and differs")
    refused(run([*again, "--limit", 2], capsys), r"review\.html: is there already and differs")
    assert (tmp_path / "r" / "review.csv").read_bytes() == before


def test_a_post_longer_than_a_cell_comes_back(tmp_path, capsys):
    """A spreadsheet would cut it, and 131,072 characters are more than the reader of the sheet takes."""
    export_review([replace(records(1)[0], post="x" * 200_000)], tmp_path)
    filled, rows = rate(tmp_path)
    assert len(rows[1][9]) < 32_767 and rows[1][9].endswith("(the form, review.html, has all of it)")
    assert run(["mentalglm", "data", "review", "import", tmp_path, filled], capsys).code == 0


@pytest.mark.parametrize("other", ["a", "Ａ", " A ", "A\u200b"], ids=ascii)
def test_one_person_in_two_spellings_is_no_second_rater(tmp_path, capsys, other):
    """She agrees with herself."""
    export_review(records(2), tmp_path)
    sample = read_records(tmp_path / "sample.jsonl")
    files = [put(tmp_path / f"{n}.json", answers(sample, name, lambda n: n % 4)) for n, name in enumerate(("A", other))]
    refused(run(["mentalglm", "data", "review", "import", tmp_path, *files], capsys), "was already read from another")


@pytest.mark.parametrize("name", ["agreement.json", "reviewed.jsonl", "accepted.jsonl"])
def test_no_ratings_are_written_over_by_what_is_made_of_them(tmp_path, capsys, name):
    export_review(records(2), tmp_path)
    path = put(tmp_path / name, answers(read_records(tmp_path / "sample.jsonl"), "A", lambda n: 1))
    before = path.read_bytes()
    refused(
        run(["mentalglm", "data", "review", "import", tmp_path, path], capsys), f"{name}: would be replaced by what"
    )
    assert path.read_bytes() == before
