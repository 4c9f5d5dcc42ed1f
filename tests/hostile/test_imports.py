"""Tables from strangers for `mentalglm data import`: bombs, pipes, formulas, names that do things."""

import io
import json
import os
import random
import zipfile

import openpyxl
import pytest
import yaml

from mentalglm_jax.data.intake import rows as intake
from mentalglm_jax.text import tasks
from tests.hostile.attack import Outcome, child, refused, run
from tests.hostile.foreign_files import JSON_ATTACKS, TORN_TABLES

GOOD = [("I like rain.", "good"), ("I like wind.", "bad"), ("I like snow.", "good"), ("I like soup.", "bad")]


@pytest.fixture(autouse=True)
def known_tasks():
    yield
    tasks.forget_added()


def imported(source, capsys, *more) -> Outcome:
    out = source.parent / "out"
    return run(
        ["mentalglm", "data", "import", source, "--text", "post", "--label", "label", "--out", out, *more], capsys
    )


def sheet(lines) -> bytes:
    book = openpyxl.Workbook()
    for row in lines:
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def with_part(book: bytes, name: str, data: bytes | str, packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The workbook with one part replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(book)) as old, zipfile.ZipFile(out, "w", packing) as new:
        for item in old.infolist():
            new.writestr(item.filename, data if item.filename == name else old.read(item.filename))
    return out.getvalue()


BOOK = sheet([("post", "label"), *GOOD])
SHEET = "xl/worksheets/sheet1.xml"
CELLS = '<c r="A1" t="inlineStr"><is><t>post</t></is></c><c r="B1" t="inlineStr"><is><t>label</t></is></c>'
XML = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">{}<sheetData>{}</sheetData></worksheet>'
LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
FAR = f'<row r="1">{CELLS}</row><row r="500000"><c r="A500000"><v>1</v></c></row>'
WIDE = f'<row r="1">{CELLS}<c r="XFD1"><v>1</v></c></row>'
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
NONE = "not an Excel workbook that can be read"
BOOKS = {
    "a bomb of 64 MB": (lambda: with_part(BOOK, SHEET, b" " * (64 << 20)), "parts once unpacked are too much"),
    "four million styles in 35 kB": (
        lambda: with_part(
            BOOK, "xl/styles.xml", f'<styleSheet xmlns="{MAIN}"><cellXfs>{"<xf/>" * 4_000_000}</cellXfs></styleSheet>'
        ),
        "parts once unpacked are too much",
    ),
    "a row of three million cells": (
        lambda: with_part(BOOK, SHEET, XML.format("", f"<row>{'<c/>' * 3_000_000}</row>").encode()),
        "parts once unpacked are too much",
    ),
    "a cell longer than any of Excel's": (
        lambda: with_part(
            BOOK, SHEET, XML.format("", f"<row>{CELLS}</row><row>{CELLS}</row>".replace("label", "x" * 40_000)).encode()
        ),
        "row 1 has a cell of more than 32767 characters",
    ),
    "billion laughs": (
        lambda: with_part(BOOK, SHEET, f'<!DOCTYPE x [<!ENTITY a0 "ha">{LAUGHS}]>{XML.format("", "&a11;")}'.encode()),
        NONE,
    ),
    "an entity of a file": (
        lambda: with_part(
            BOOK, SHEET, f'<!DOCTYPE x [<!ENTITY a SYSTEM "/etc/passwd">]>{XML.format("", "&a;")}'.encode()
        ),
        NONE,
    ),
    "a cell in row 500,000": (
        lambda: with_part(BOOK, SHEET, XML.format("", FAR).encode()),
        "more than 1048576 rows, or 100000 empty ones on end from row 2",
    ),
    "a header of 16,384 columns": (
        lambda: with_part(BOOK, SHEET, XML.format("", WIDE).encode()),
        "holds no row below its header",
    ),
    "a cell in row 10^9 and no other": (
        lambda: with_part(BOOK, SHEET, XML.format("", '<row r="999999999"><c r="A1"><v>1</v></c></row>').encode()),
        "its first 100000 rows are empty",
    ),
    "cut": (lambda: BOOK[:500], NONE),
    "no sheet": (lambda: with_part(BOOK, "xl/workbook.xml", b"<x/>"), f"{NONE}|no sheet"),
    "text": (lambda: b"post,label", NONE),
    "empty": (lambda: b"", NONE),
}


@pytest.mark.parametrize("attack", BOOKS)
def test_workbook(tmp_path, capsys, attack):
    made, says = BOOKS[attack]
    (tmp_path / "t.xlsx").write_bytes(made())
    refused(imported(tmp_path / "t.xlsx", capsys), rf"t\.xlsx: .*({says})")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_workbook_that_is_as_large_as_it_says_and_takes_all_memory(tmp_path, capsys):
    """Not packed at all: its size alone tells nothing. 20 MB of styles are 1.5 GiB of objects."""
    (tmp_path / "t.xlsx").write_bytes(
        with_part(BOOK, "xl/styles.xml", f'<styleSheet xmlns="{MAIN}"><cellXfs>{"<xf/>" * 4_000_000}</cellXfs>'
                  "</styleSheet>", zipfile.ZIP_STORED)
    )  # fmt: skip
    says = "takes more than 1024 MiB of memory|take more than 60 s of processor time"
    refused(imported(tmp_path / "t.xlsx", capsys), rf"t\.xlsx: .*({says})", seconds=600)


@pytest.mark.parametrize(("bound", "value"), [("MOST_ROWS", 20), ("MOST_CHARACTERS", 200)])
def test_more_than_is_split_in_memory(tmp_path, capsys, monkeypatch, bound, value):
    monkeypatch.setattr(intake, bound, value)
    (tmp_path / "t.csv").write_text("post,label\n" + "".join(f"post number {n},{n % 2}\n" for n in range(40)))
    refused(
        imported(tmp_path / "t.csv", capsys), r"t\.csv: more than \d+ rows, or \d+ characters, are not taken at once"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_as_many_rows_as_are_taken_fit_into_two_gibibytes(tmp_path):
    words, length = random.Random(0), intake.MOST_CHARACTERS // intake.MOST_ROWS - 10
    with (tmp_path / "t.csv").open("w") as file:
        file.write("post,label\n")
        for number in range(intake.MOST_ROWS):
            file.write(f"{words.randbytes(length // 2).hex()},{number % 2}\n")
    command = ["mentalglm", "data", "import", "t.csv", "--text", "post", "--label", "label", "--language", "en",
               "--task", "liking", "--out", "out"]  # fmt: skip
    done = child(command, tmp_path, limit=1700)
    assert done.code == 0, done.err
    assert done.peak_mib < 2048


@pytest.mark.parametrize("said", ["A1:XFD1048576", "A1:B2", "A1"])
def test_a_sheet_is_as_large_as_it_is_whatever_it_says(tmp_path, capsys, said):
    cell = '<c r="{}{}" t="inlineStr"><is><t>{}</t></is></c>'
    rows = "".join(
        f'<row r="{n}">{cell.format("A", n, f"I like {word}.")}{cell.format("B", n, word[0])}</row>'
        for n, word in enumerate(("rain", "wind"), 2)
    )
    data = XML.format(f'<dimension ref="{said}"/>', f'<row r="1">{CELLS}</row>{rows}').encode()
    (tmp_path / "t.xlsx").write_bytes(with_part(BOOK, SHEET, data))
    outcome = imported(tmp_path / "t.xlsx", capsys, "--json")
    assert outcome.code == 0 and outcome.seconds < 250, outcome.err
    assert json.loads(outcome.out)["rows"] == 2


def test_a_formula_is_not_calculated_and_an_empty_value_is_no_post(tmp_path, capsys):
    book = sheet([("post", "label"), *GOOD, ('=HYPERLINK("http://127.0.0.1:9/"&A2)', "good")])
    (tmp_path / "t.xlsx").write_bytes(book)
    refused(imported(tmp_path / "t.xlsx", capsys), r"1 of 5 rows cannot be taken: 1 without a post \(row 6\)")


@pytest.mark.parametrize("kind", ["pipe", "device", "a link in itself", "directory"])
@pytest.mark.parametrize("name", ["t.csv", "t.xlsx", "t.jsonl", "t.parquet"])
def test_no_file(tmp_path, capsys, name, kind):
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(file)
    refused(imported(file, capsys), name)


@pytest.mark.parametrize("attack", [name for name in JSON_ATTACKS if name not in ("a byte order mark",)])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json(tmp_path, capsys, suffix, attack):
    raw, _ = JSON_ATTACKS[attack]
    raw = raw if isinstance(raw, bytes) else raw.encode()
    first = json.dumps({"post": "x", "label": "y"}).encode()
    (tmp_path / f"t{suffix}").write_bytes(
        b"[" + first + b", " + raw + b"]" if suffix == ".json" else first + b"\n" + raw
    )
    refused(imported(tmp_path / f"t{suffix}", capsys), rf"t\{suffix}")


TEXTS = {
    "an unclosed quote": (b'post,label\n"I like,good\nrain.,bad\n', r"t\.csv:2: not a readable row"),
    "a cell of 200,000 characters": (b"post,label\n" + b"x" * 200_000 + b",good\n", r"t\.csv:2: .*field limit"),
    "zero bytes": (b"\0" * 5000, "its encoding cannot be told"),
    "no line end": (b"x" * 300_000, "no column 'post'|holds no row|field"),
    "a header alone": (b"post,label\n", "holds no row below its header"),
    "a thousand columns": (b",".join(b"c%d" % n for n in range(1000)) + b"\n", r"no column 'post'"),
    "a header that does things": (b"post,la\x1b[31mbel\n", r"no column 'label' \(did you mean .*\\x1b"),
    "a label that does things": (b"post,label\nI like rain.,x\nI like wind.,\x1b]0;x\x07\n", r"label|name"),
    "labels that are one in an answer": (b"post,label\na b,x.\nc d,x\ne f,y\n", r"x\."),
    "half a character": ("post,label\n好,高\n".encode()[:-2], "cannot be told|t.csv"),
}  # fmt: skip


@pytest.mark.parametrize("attack", TEXTS)
def test_text(tmp_path, capsys, attack):
    data, says = TEXTS[attack]
    (tmp_path / "t.csv").write_bytes(data)
    refused(imported(tmp_path / "t.csv", capsys), says)


@pytest.mark.parametrize("more", [(), ("--skip-bad-rows",)])
@pytest.mark.parametrize("attack", TORN_TABLES)
def test_rows_inside_a_cell(tmp_path, capsys, attack, more):
    """They would go without a word, and a post would get the label of another one."""
    ending, content, line = TORN_TABLES[attack]
    (tmp_path / f"t{ending}").write_text(content, newline="")
    refused(imported(tmp_path / f"t{ending}", capsys, *more), rf"t\{ending}:{line}: a cell in quotation marks takes in")


@pytest.mark.parametrize(
    "encoding", ["rot13", "hex", "base64", "zlib", "no such", "idna", "undefined", "../x", "utf-8\0"]
)
def test_encoding_that_is_none_for_text(tmp_path, capsys, encoding):
    (tmp_path / "t.csv").write_text("post,label\nI like rain.,good\n")
    refused(imported(tmp_path / "t.csv", capsys, "--encoding", encoding), "encoding")


@pytest.mark.parametrize("name", ["a: {b", "- x", "'", '"', "# x", "é", "x y", "{}", "%n"])
def test_the_recipe_names_any_folder(tmp_path, capsys, name):
    """A name that YAML would take for something else."""
    source = tmp_path / "t.csv"
    source.write_text("post,label\n" + "".join(f"{post},{label}\n" for post, label in GOOD))
    out = tmp_path / name
    run(["mentalglm", "data", "import", source, "--text", "post", "--label", "label", "--out", out], capsys)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text("utf-8"))
    assert recipe["data"] == {"source": "jsonl", "root": str(out)} and recipe["tasks"] == str(out / "tasks.yaml")
    assert recipe["run_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", ["x\ny: 1", "x\x1b[31m", "x\u202e"])
def test_a_folder_that_no_recipe_can_name(tmp_path, capsys, name):
    (tmp_path / "t.csv").write_text("post,label\nI like rain.,good\n")
    command = ["mentalglm", "data", "import", tmp_path / "t.csv", "--text", "post", "--label", "label"]
    refused(run([*command, "--out", tmp_path / name], capsys), "choose a name that can be printed")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--task", "../x", "task name"), ("--task", "x" * 100, "task name"), ("--sep", "", "--sep"),
        ("--language", "xx", "language"), ("--split", "1/2/3", "--split"), ("--seed", "-1", "seed|--seed"),
        ("--sheet", "x", "sheet"), ("--text", "label", "post|same"),
    ],
)  # fmt: skip
def test_option(tmp_path, capsys, option, value, says):
    (tmp_path / "t.csv").write_text("post,label\nI like rain.,good\nI like wind.,bad\n")
    refused(imported(tmp_path / "t.csv", capsys, option, value), says)


def test_a_post_is_never_printed(tmp_path, capsys):
    rows = "".join(f"secret number {n} of somebody,{'' if n % 3 == 0 else 'ab'[n % 2]}\n" for n in range(12))
    (tmp_path / "t.csv").write_text("post,label\n" + rows)
    for more in ((), ("--skip-bad-rows",), ("--skip-bad-rows", "--json")):
        outcome = imported(tmp_path / "t.csv", capsys, *more)
        assert "somebody" not in outcome.out + outcome.err
    assert (
        "somebody"
        not in (tmp_path / "out" / "README.md").read_text() + (tmp_path / "out" / "manifest.json").read_text()
    )


def test_a_column_of_posts_taken_for_labels_is_not_printed(tmp_path, capsys):
    rows = "".join(f"ab{n},secret number {n} of somebody who is tired of it all\n" for n in range(5))
    (tmp_path / "t.csv").write_text("post,label\n" + rows)
    line = refused(imported(tmp_path / "t.csv", capsys, "--task", "suicide_risk"), "unknown label text of")
    assert "somebody" not in line


@pytest.mark.parametrize("name", ["pandas", "csv", "json", "text", "imagefolder", "parquet", "webdataset", "posts"])
def test_a_word_is_no_data_set(tmp_path, capsys, monkeypatch, name):
    """Under such names `datasets` keeps readers of its own, which take what lies in the working directory; that of
    "pandas" unpickles it."""
    (tmp_path / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    (tmp_path / "train.csv").write_text("post,label\nI like rain.,good\n")
    monkeypatch.chdir(tmp_path)
    command = ["mentalglm", "data", "import", name, "--text", "post", "--label", "label", "--out", "out"]
    refused(run(command, capsys), f"{name}: no such file or folder, nor the name of a data set of the Hub")
    assert not (tmp_path / "hacked").exists()


SPELT = {"case": ("Anna", "anna"), "width": ("Anna", "Ａnna"), "accents": ("Jos\u00e9", "Jose\u0301"),
         "spaces": ("Anna B", "Anna  b"), "hidden": ("Anna", "An\u200bna"), "mark": ("Anna", "\u202aAnna")}  # fmt: skip


@pytest.mark.parametrize("names", SPELT.values(), ids=SPELT)
def test_an_author_in_two_spellings_is_on_one_side(tmp_path, names, capsys):
    """In training and in test: the score was of an author it knows."""
    words = ("rain", "wind", "snow", "hail", "sun", "fog", "ice", "mud")
    rows = [f"{word} {number} fell on the {word},{'ab'[number // 2 % 2]},{names[number % 2]}" for number, word in
            enumerate(word for word in words for _ in range(6))]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(["post,label,who", *rows]))
    done = imported(tmp_path / "t.csv", capsys, "--user", "who", "--task", "mood", "--split", "50/25/25")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["splits"]) == ["train"] and manifest["splits"]["train"]["records"] == 48
