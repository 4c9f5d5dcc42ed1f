"""The review form's data and policy, ratings in and out, agreement against hand-made tables."""

import csv
import html
import io
import json
import re
import warnings
from collections import Counter

import krippendorff
import numpy as np
import pytest

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.explain.review import (
    SCALES,
    agreement,
    export_review,
    form_id,
    import_review,
    read_ratings,
    render_form,
    stratified_sample,
)
from mentalglm_jax.data.explain.review import Ratings as Given
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.errors import InputError

ATTACK = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u2028=1+1"


def records(count=12, post="帖子{}", explanation: str | None = "说了“帖子”。"):
    return [Record(f"r{n}", "suicide_risk", "zh", post.format(n), "问？", label="high" if n % 6 == 0 else "low",
                   explanation=explanation) for n in range(count)]  # fmt: skip


def test_the_sample_is_even_over_labels_and_fixed_by_its_seed():
    rows = [*records(60), *records(3, explanation=None)[:0]]
    sample = stratified_sample(rows, 16, 0)
    assert Counter(r.label for r in sample) == {"high": 8, "low": 8}
    assert Counter(r.label for r in stratified_sample(rows, 40, 0)) == {"high": 10, "low": 30}
    assert stratified_sample(rows[::-1], 16, 0) == sample != stratified_sample(rows, 16, 1)
    with pytest.raises(InputError, match="no record has an explanation"):
        export_review([Record("a", "suicide_risk", "zh", "p", "q", label="low")], "nowhere")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_of_the_data_is_markup(language):
    page = render_form(records(2, post=ATTACK, explanation=ATTACK), language)
    assert page.count("<script") == 2 and "<img" not in page and "<script>window" not in page
    assert "default-src 'none'" in html.unescape(page) and "unsafe-inline" not in page and "http:" not in page
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["items"][0]["post"] == ATTACK.replace("\u2028", "[U+2028]") and data["scales"] == list(SCALES)
    assert page.count('type="radio"') == 16


def answers(sample, rater, score, **more):
    ratings = {r.id: dict.fromkeys(SCALES, score(n)) for n, r in enumerate(sample)}
    return {"form": form_id(sample), "rater": rater, "ratings": ratings, **more}


@pytest.fixture
def exported(tmp_path):
    export_review(records(), tmp_path, count=8)
    return tmp_path, read_records(tmp_path / "sample.jsonl")


def put(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def test_raters_are_merged_and_disagreements_listed(exported):
    folder, sample = exported
    one = answers(sample, "甲", lambda n: 3)
    one["ratings"][sample[2].id]["comment"] = "引文不全"
    files = [put(folder / "a.json", one), put(folder / "b.json", answers(sample, "乙", lambda n: 0 if n == 1 else 2))]
    sheet = list(csv.reader(io.StringIO((folder / "review.csv").read_text("utf-8-sig"), newline="")))
    for n, row in enumerate(sheet[1:]):
        row[1], row[3:7] = "丙", ["1"] * 4 if n == 0 else [""] * 4
    with (folder / "c.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(sheet)
    result = import_review(folder, [*files, folder / "c.csv"])
    assert (result["raters"], result["items"], result["rated"], result["accepted"]) == (["甲", "乙", "丙"], 8, 8, 7)
    assert result["tasks"]["suicide_risk"] == {k: result[k] for k in ("items", "rated", "accepted", "agreement")}
    assert [d["id"] for d in result["disagreements"]] == [sample[0].id, sample[1].id]
    assert result["disagreements"][1]["scores"]["乙"] == dict.fromkeys(SCALES, 0)
    rows = [json.loads(line) for line in (folder / "reviewed.jsonl").read_text("utf-8").splitlines()]
    assert [row["accepted"] for row in rows] == [True, False, *[True] * 6]
    assert rows[0]["ratings"]["overall"] == 2.0 and rows[2]["comments"] == {"甲": "引文不全"}
    assert read_records(folder / "accepted.jsonl") == [r for r in sample if r is not sample[1]]
    assert json.loads((folder / "agreement.json").read_text("utf-8"))["accepted"] == 7


def given(rater, values):
    return Given(rater, {str(n): {"overall": v} for n, v in enumerate(values) if v is not None}, {})


def test_agreement_counts_whom_it_can_compare():
    """Kappa by hand, (P - Pe) / (1 - Pe); where nothing varies or nobody can be compared there is no figure."""
    a = [1, 2, 3, 3, 2, 1, 0, 1, 2, None, None, None]
    b = [1, 2, 3, 3, 2, 2, 0, 1, 2, 1, None, 3]
    found = agreement([given("a", a), given("b", b)], [str(n) for n in range(12)])["overall"]
    assert (found["items_rated_by_all"], found["items_rated_twice"], found["ratings"]) == (9, 9, 20)
    values = [v for x, y in zip(a, b, strict=True) if None not in (x, y) for v in (x, y)]
    chance = sum((values.count(v) / 18) ** 2 for v in range(4))
    assert found["fleiss_kappa"] == pytest.approx((8 / 9 - chance) / (1 - chance))
    assert 0.9 < found["krippendorff_alpha"] < 1.0
    same = agreement([given("a", [3, 3]), given("b", [3, 3])], ["0", "1"])["overall"]
    alone = agreement([given("a", [1, 3])], ["0", "1"])["overall"]
    for undefined in (same, alone):
        assert (undefined["fleiss_kappa"], undefined["krippendorff_alpha"]) == (None, None)


def test_agreement_is_that_of_published_examples(monkeypatch):
    """Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", reliability data of four observers (nominal
    0.743, ordinal 0.815, interval 0.849), one less each: only order counts. Fleiss' kappa: the worked example of
    fourteen raters and five categories that is 0.210 everywhere."""
    four = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    raters = [given(str(n), [None if v == "." else int(v) - 1 for v in row]) for n, row in enumerate(four)]
    found = agreement(raters, [str(n) for n in range(12)])["overall"]
    assert found["krippendorff_alpha"] == pytest.approx(0.815, abs=5e-4)
    assert (found["items_rated_by_all"], found["ratings"]) == (8, 41)
    table = np.array([[np.nan if v == "." else float(v) for v in row] for row in four])
    nominal = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
    interval = krippendorff.alpha(reliability_data=table, level_of_measurement="interval")
    assert (nominal, interval) == pytest.approx((0.743, 0.849), abs=5e-4)

    counts = ("0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1", "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2",
              "6 5 2 1 0", "0 2 2 3 7")  # fmt: skip
    items = [[v for v, n in enumerate(map(int, row.split())) for _ in range(n)] for row in counts]
    monkeypatch.setattr("mentalglm_jax.data.explain.review.POINTS", (0, 1, 2, 3, 4))
    raters = [given(str(n), [item[n] for item in items]) for n in range(14)]
    assert agreement(raters, [str(n) for n in range(10)])["overall"]["fleiss_kappa"] == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "other"}, "item 'r.*': is of form 'other', the sample is"),
        ({"rater": " "}, "expected the name of one rater, found"),
        ({"ratings": {}}, "holds no rating"),
        ({"ratings": {"zz": {"overall": 1}}}, "item 'zz' is not in the sample"),
        ({"ratings": {"r0": {"overall": 4}}}, "item 'r0', 'overall': expected 0, 1, 2 or 3, found '4'"),
        ({"ratings": {"r0": {"overall": True}}}, "expected 0, 1, 2 or 3, found 'True'"),
        ({"ratings": {"r0": 3}}, "not a file of this form"),
        ({"ratings": [1]}, "not a file of this form"),
    ],
)
def test_a_damaged_ratings_file_is_named(exported, change, message):
    folder, sample = exported
    path = put(folder / "x.json", answers(sample, "a", lambda n: 1) | change)
    with pytest.raises(InputError, match=rf"x\.json.*{message}"):
        read_ratings(path, form_id(sample), [*(r.id for r in sample), "r0"])


def test_other_damage_is_named(exported):
    folder, sample = exported
    path = put(folder / "a.json", answers(sample, "a", lambda n: 1))
    with pytest.raises(InputError, match="rater 'a' was already read"):
        import_review(folder, [path, path])
    path.write_text(path.read_text()[:-4])
    with pytest.raises(InputError, match=r"a\.json: not JSON"):
        import_review(folder, [path])
    (folder / "b.csv").write_text("form,rater,id\n")
    with pytest.raises(InputError, match=r"b\.csv:1: column 'consistency' is missing"):
        import_review(folder, [folder / "b.csv"])
    with pytest.raises(InputError, match="at least one file"):
        import_review(folder, [])


def test_a_sheet_holds_no_formula(tmp_path):
    export_review(records(1, post="=1+1"), tmp_path)
    assert ",'=1+1," in (tmp_path / "review.csv").read_text("utf-8")


def test_the_commands(tmp_path, capsys):
    write_records(tmp_path / "build" / "records" / "train.jsonl", records())

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["data", "review", *map(str, arguments)])
        return stop.value.code, *capsys.readouterr()

    code, out, _ = call("export", tmp_path / "build", "--out", tmp_path / "r", "--limit", 5, "--json")
    assert code == 0 and json.loads(out)["items"] == 5
    sample = read_records(tmp_path / "r" / "sample.jsonl")
    files = [put(tmp_path / f"{r}.json", answers(sample, r, lambda n, r=r: 3 if r == "a" else n % 3)) for r in "ab"]
    code, out, _ = call("import", tmp_path / "r", *files)
    assert code == 0 and "Krippendorff" in out and "3 of 5 rated records accepted" in out and "帖子" not in out
    assert call("export", tmp_path, "--out", tmp_path / "r")[0] == 2


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
def test_a_sheet_is_read_as_excel_saves_it_in_any_country(tmp_path, encoding, delimiter):
    """Where numbers have a comma, cells are separated by semicolons, and the text is not UTF-8."""
    sample = records(4, post="Ich schlafe nicht, und müde bin ich auch {}", explanation="Er schläft nicht; „müde“.")
    export_review(sample, tmp_path / "form")
    sample = read_records(tmp_path / "form" / "sample.jsonl")
    rows = list(csv.reader(io.StringIO((tmp_path / "form" / "review.csv").read_text("utf-8-sig"), newline="")))
    sheet = [[cell.encode("cp1252", "replace").decode("cp1252") for cell in row] for row in rows]
    for row in sheet[1:]:
        row[1:2], row[3:8] = ["Zoë Müller"], ["3", "2", "1", "0", "schön; für mich"]
    with (tmp_path / "z.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(sheet)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read_ratings(tmp_path / "z.csv", form_id(sample), [one.id for one in sample])
    assert [str(one.message).split(" by ")[0] for one in said] == (
        [f"{tmp_path / 'z.csv'}: not UTF-8, read as CP1252"] if encoding == "cp1252" else [])  # fmt: skip
    assert found.rater == "Zoë Müller" and found.comments == {one.id: "schön; für mich" for one in sample}
    assert all(scores == dict(zip(SCALES, (3, 2, 1, 0), strict=True)) for scores in found.scores.values())
