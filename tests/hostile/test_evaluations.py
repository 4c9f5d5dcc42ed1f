"""Evaluations and ratings from strangers, and names that do things in the tables made of them."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from mentalglm_jax.data.cells import to_cell
from mentalglm_jax.data.explain.review import form_id
from mentalglm_jax.data.records import Record
from mentalglm_jax.evaluate import evaluate
from mentalglm_jax.evaluate.answers import generated
from mentalglm_jax.evaluate.human import human_ratings
from mentalglm_jax.evaluate.leaderboard import FORMATS, formatted, leaderboard_rows
from mentalglm_jax.evaluate.report import csv_text, write_report
from mentalglm_jax.inference.generate import write_rows
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import JSON_ATTACKS, RECORD, called
from tests.hostile.test_review_files import FORMULAS

SCORES = {"n": 4, "weighted_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.25, "ci95": [0.1, 0.9]}
ENTRY = SCORES | {"floors": {"majority": SCORES}, "label_reading": None, "data_set": None}


def evaluation(place: Path, entry) -> Path:
    (place / "evaluation.json").write_text(json.dumps({"suicide_risk": entry}))
    return place


@pytest.mark.parametrize("attack", JSON_ATTACKS)
def test_no_json(tmp_path, capsys, attack):
    raw, _ = JSON_ATTACKS[attack]
    (tmp_path / "evaluation.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    refused(run(["mentalglm", "leaderboard", tmp_path], capsys), r"evaluation\.json")


ENTRIES = {
    "a list": [1], "null": None, "text": "x", "nothing": {},
    "NaN as text": ENTRY | {"ci95": ["nan", "inf"]}, "a number for an interval": ENTRY | {"ci95": 3},
    "three ends": ENTRY | {"ci95": [0, 1, 2]}, "text for a score": ENTRY | {"weighted_f1": "0.5"},
    "a score of 10^300": ENTRY | {"macro_f1": 1e300}, "a list for a data set": ENTRY | {"data_set": ["imhi"]},
    "an object for a data set": ENTRY | {"data_set": {}}, "a fraction of a post": ENTRY | {"n": 1.5},
    "markup for a number": ENTRY | {"n": "<img src=x>"}, "true": ENTRY | {"n": True}, "minus one": ENTRY | {"n": -1},
    "floors of text": ENTRY | {"floors": "x"}, "a floor of text": ENTRY | {"floors": {"a": "x"}},
    "a floor without posts": ENTRY | {"floors": {"a": SCORES | {"n": 0}}},
    "a reading of text": ENTRY | {"label_reading": "x"}, "a reading of a list": ENTRY | {"label_reading": [SCORES]},
}  # fmt: skip


@pytest.mark.parametrize("attack", ENTRIES)
def test_no_evaluation(tmp_path, capsys, attack):
    place = evaluation(tmp_path, ENTRIES[attack])
    refused(run(["mentalglm", "leaderboard", place], capsys), r"evaluation\.json: suicide_risk: .*mentalglm evaluate")


def test_a_sound_one_is_a_table_in_every_form(tmp_path):
    rows = leaderboard_rows([evaluation(tmp_path, ENTRY)])
    assert all(formatted(rows, form) for form in FORMATS)


EDITS = {"a better score": {"weighted_f1": 0.99}, "a better mean": {"micro_f1": 0.76},
         "another mean": {"macro_f1": 0.1}, "more posts": {"n": 400}, "fewer posts": {"n": 3}}  # fmt: skip


@pytest.mark.parametrize("reading", ["text", "label"])
@pytest.mark.parametrize("edit", EDITS)
def test_scores_that_are_not_those_of_the_answers_beside_them(tmp_path, capsys, edit, reading):
    rows = [RECORD | {"id": f"r{number}", "label": ("high", "low")[number % 2], "parsed_label": "high",
                      "parse_status": "ok"} for number in range(4)]  # fmt: skip
    scores = [row | {"label_logprobs": {"high": -1.0, "low": -2.0}} for row in rows]
    write_rows(tmp_path / "generations.jsonl", rows)
    write_rows(tmp_path / "label_scores.jsonl", scores)
    result = evaluate(rows, label_scores=scores, draws=5)
    write_report(tmp_path, result, title="t")
    assert leaderboard_rows([tmp_path], draws=5)
    entry = result["suicide_risk"]
    (entry if reading == "text" else entry["label_reading"]).update(EDITS[edit])
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    says = rf"suicide_risk: {next(iter(EDITS[edit]))} is \S+ in the {reading} reading, the answers beside it give"
    refused(run(["mentalglm", "leaderboard", tmp_path], capsys), says)
    for name in ("generations.jsonl", "label_scores.jsonl"):
        (tmp_path / name).unlink()
    assert leaderboard_rows([tmp_path], draws=5)  # alone it is taken at its word, as SECURITY.md says


@pytest.mark.parametrize("name", FORMULAS, ids=repr)
def test_no_cell_of_a_leaderboard_is_a_formula(tmp_path, name):
    place = tmp_path / "run"
    place.mkdir()
    rows = leaderboard_rows([evaluation(place, ENTRY | {"floors": {name: SCORES}})])
    rows += [row | {"system": name} for row in rows if row["kind"] == "run"]
    cells = [row["system"] for row in csv.DictReader(io.StringIO(formatted(rows, "csv"), newline=""))]
    assert cells == ["run", to_cell(name), to_cell(name)] and to_cell(name)[0] == "'"


@pytest.mark.parametrize("name", FORMULAS, ids=repr)
def test_no_cell_of_an_evaluation_is_a_formula(name):
    """Labels are named by task files of strangers."""
    part = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    entry = ENTRY | {"by_language": {}, "per_class": {name: part}, "floors": {name: SCORES},
                     "explanation": {name: 1.0}}  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(csv_text({"suicide_risk": entry}), newline="")))
    assert {row["class"] for row in rows} == {"", to_cell(name)} and to_cell(name)[0] == "'"
    assert {row["reading"] for row in rows} == {"text", to_cell(name)}


@pytest.mark.parametrize("name", ["x\r=1+1", "x\n=1+1", "x\r\n=1+1"], ids=repr)
@pytest.mark.parametrize("table", ["leaderboard", "evaluation", "answers"])
def test_no_row_begins_inside_a_cell(tmp_path, table, name):
    """A line end of any kind is inside quotation marks: what follows one is a formula otherwise."""
    if table == "leaderboard":
        rows = leaderboard_rows([evaluation(tmp_path, ENTRY)])
        text = formatted([row | {"system": name} for row in rows], "csv")
    elif table == "evaluation":
        text = csv_text({"suicide_risk": ENTRY | {"by_language": {}, "per_class": {}, "floors": {name: SCORES}}})
    else:
        row = {"id": "r", "task": "mood", "language": "en", "post": name, "parsed_label": "b", "finish": "stop",
               "parsed_explanation": name, "parse_status": "ok"}  # fmt: skip
        write_rows(tmp_path / "a.csv", [row])
        text = (tmp_path / "a.csv").read_bytes().decode("utf-8-sig")
    assert f'"{to_cell(name)}"' in text and not [
        line for line in re.sub('"[^"]*"', "", text).splitlines() if line[:1] == "="
    ]
    assert not re.search(r"[;\r\n]\s*=", text)


SCALE = {"mean": 1.0, "ratings": 1, "fleiss_kappa": None, "krippendorff_alpha": 0.5}
COUNTS = {"items": 1, "rated": 1, "accepted": 0, "agreement": {"overall": SCALE}}
SOUND = {"raters": ["A"], "tasks": {"suicide_risk": COUNTS}}
RATINGS = {
    "a list": [1], "null": None, "no raters": {"tasks": {}}, "a number of raters": SOUND | {"raters": 3},
    "a list of tasks": SOUND | {"tasks": [["suicide_risk", COUNTS]]}, "text of a task": SOUND | {"tasks": {"x": "y"}},
    "a list of a task": SOUND | {"tasks": {"x": [1]}}, "text of a mean": SOUND | {"tasks": {"x": COUNTS | {
        "agreement": {"overall": SCALE | {"mean": "<script>"}}}}},
    "text of a count": SOUND | {"tasks": {"x": COUNTS | {"rated": "1"}}},
    "a list of scales": SOUND | {"tasks": {"x": COUNTS | {"agreement": [SCALE]}}},
    "true for a figure": SOUND | {"tasks": {"x": COUNTS | {"agreement": {"overall": SCALE | {"fleiss_kappa": True}}}}},
}  # fmt: skip


@pytest.mark.parametrize("attack", RATINGS)
def test_no_ratings(tmp_path, attack):
    (tmp_path / "agreement.json").write_text(json.dumps(RATINGS[attack]))
    refused(called(lambda: human_ratings(tmp_path, [])), r"agreement\.json: not what `mentalglm data review import`")


def rated(folder: Path) -> list[dict]:
    """Answers, and what was rated of them in ``folder``."""
    rows = [{"id": f"r{at}", "task": "suicide_risk", "language": "en", "post": f"I ate {at}.", "question": "High?",
             "label": "low", "explanation": "They ate.", "source": "s", "split": "dev"} for at in range(2)]  # fmt: skip
    rows = [Record.from_dict(row).to_dict() for row in rows]
    (folder / "sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = form_id([Record.from_dict(row) for row in rows])
    (folder / "agreement.json").write_text(json.dumps(SOUND | {"form": form}))
    return [row | {"parsed_label": "low", "parsed_explanation": "They ate.", "parse_status": "ok"} for row in rows]


def test_ratings_of_another_form(tmp_path):
    """A form was made anew in the folder; what people said of the one before stands there still."""
    answers = [generated(row) for row in rated(tmp_path)]
    assert human_ratings(tmp_path, answers)["suicide_risk"]["raters"] == 1
    file = tmp_path / "agreement.json"
    for form in ("0" * 12, None, 3):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"form": form}))
        refused(called(lambda: human_ratings(tmp_path, answers)), r"agreement\.json: is of another form than sample")


@pytest.mark.parametrize("mark", ["\u202e", "\u2066", "\u200b", "\x1b"], ids=ascii)
@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_no_name_moves_or_hides_a_cell_of_a_table(tmp_path, mark, form):
    place = tmp_path / f"a{mark}b"
    place.mkdir()
    assert mark not in formatted(leaderboard_rows([evaluation(place, ENTRY)]), form)
