"""Report, CSV, card and leaderboard: complete, escaped, and published figures never among ours."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import compare, evaluate, floors
from mentalglm_jax.evaluate.leaderboard import leaderboard_markdown, leaderboard_rows
from mentalglm_jax.evaluate.published import published
from mentalglm_jax.evaluate.report import (
    SAFETY,
    csv_text,
    model_card,
    render,
    write_report,
)
from mentalglm_jax.text import tasks

NASTY = '<script>alert("x")</script> & {{ 7 * 7 }} `|`'


def rows(task: str, count: int, explanation: str | None = "写道“帖子”。", language="zh", source="") -> list[dict]:
    """Two answers of three are right, one of ten is unread."""
    keys, kind = tasks.TASKS[task].keys, tasks.TASKS[task].arity
    found = []
    for number in range(count):
        gold, said = keys[number % len(keys)], keys[(number + (number % 3 == 0)) % len(keys)]
        labels = {"label": gold} if kind == "single" else {"labels": (gold,)}
        question = tasks.TASKS[task].question(language)
        record = Record(f"{task}{number}", task, language, f"帖子 {number} {NASTY}", question, explanation=explanation,
                        source=source, **labels)  # fmt: skip
        label = None if number % 10 == 9 else said if kind == "single" else [said]
        more = {"parsed_label": label, "parsed_explanation": explanation, "parse_status": "ok" if label else "no_label"}
        more["label_logprobs"] = {key: 0.0 if key == said else -2.0 for key in keys}
        found.append(record.to_dict() | more)
    return found


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    return rows("suicide_risk", 30) + rows("cognitive_pathway", 38, None) + rows("imhi_sad", 18, "Reasons.", "en")


@pytest.fixture(scope="module")
def result(answers):
    found = evaluate(answers, label_scores=answers, draws=20)
    records = [Record.from_dict(row, allow_extra=True) for row in answers if row["task"] == "suicide_risk"]
    found["suicide_risk"]["floors"] = floors(records, records)["suicide_risk"]
    return found


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_complete_and_inert(answers, result):
    compared = compare((answers, answers), (answers, answers), draws=5)
    text = render(result, title=NASTY, compared=compared, against=NASTY)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert "svg" in names
    assert not [(tag, attrs) for tag, attrs in page.tags if {"src", "href", "style"} & set(attrs) or
                any(name.startswith("on") for name in attrs)]  # fmt: skip
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(r"default-src 'none'; style-src 'sha256-[\w+/=]+'", policy)
    shown = " ".join(page.text)
    assert NASTY in shown  # as words
    assert "帖子" not in shown  # no post and no explanation
    assert SAFETY in shown
    for task, entry in result.items():
        assert task in shown
        for reading in (entry, entry["label_reading"]):
            assert f"{reading['weighted_f1']:.3f}" in shown
            assert all(key in shown for key in reading["per_class"])
    assert f"{result['suicide_risk']['label_reading']['calibration']['ece']:.3f}" in shown
    assert f"{result['suicide_risk']['floors']['tfidf_logreg']['weighted_f1']:.3f}" in shown
    numbers = [
        float(v)
        for tag, attrs in page.tags
        for k, v in attrs.items()
        if k in ("cx", "x1", "x2", "width") and "%" not in v
    ]
    assert all(0 <= v <= 2000 for v in numbers)


def test_a_page_without_anything_optional(answers):
    texts = [row for row in answers if row["task"] == "suicide_risk"]
    assert "Label log-probability" not in render(evaluate(texts, draws=2), title="t")
    only = render(evaluate([], label_scores=texts, draws=2), title="t")
    assert "Read from the text" not in only


def test_cut_answers_are_told_on_page_and_card():
    made = [row | {"finish": "length" if n < 4 else "stop"} for n, row in enumerate(rows("suicide_risk", 30))]
    found = evaluate(made, draws=20)
    assert "4 of the 30 answers were cut off by the token limit" in " ".join(render(found, title="t").split())
    head, line = (next(text for text in model_card(found, title="t").splitlines() if text.startswith(start))
                  for start in ("| task", "| suicide_risk"))  # fmt: skip
    told = dict(zip(head.split("|"), line.split("|"), strict=True))
    assert told[" cut off "] == " 4 "
    whole = render(evaluate(rows("suicide_risk", 30), draws=20), title="t")
    assert "were cut off" not in whole


def test_csv_has_every_number(result):
    found = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert {row["reading"] for row in found} == {"text", "label", "majority", "tfidf_logreg"}

    def value(task, reading, metric, language="", of_class=""):
        (row,) = (r for r in found if (r["task"], r["reading"], r["metric"], r["language"], r["class"])
                  == (task, reading, metric, language, of_class))  # fmt: skip
        return float(row["value"])

    entry = result["suicide_risk"]
    assert value("suicide_risk", "text", "weighted_f1") == entry["weighted_f1"]
    assert value("suicide_risk", "label", "ece") == entry["label_reading"]["calibration"]["ece"]
    assert value("suicide_risk", "text", "recall", of_class="high") == entry["per_class"]["high"]["recall"]
    assert value("suicide_risk", "label", "accuracy", language="zh") == entry["label_reading"]["accuracy"]
    assert value("suicide_risk", "text", "ci95_by_metric.weighted_f1.low") == entry["ci95"][0]
    assert value("suicide_risk", "tfidf_logreg", "ci95.high") == entry["floors"]["tfidf_logreg"]["ci95"][1]
    assert (
        value("cognitive_pathway", "text", "levels.parent.f1") == result["cognitive_pathway"]["levels"]["parent"]["f1"]
    )
    bleu = entry["explanation"]["overlap"]["zh"]["character"]["bleu"]
    assert value("suicide_risk", "text", "explanation.overlap.zh.character.bleu") == bleu
    assert len({tuple(row[k] for k in row if k != "value") for row in found}) == len(found)


def test_files_of_a_report(tmp_path, result):
    write_report(tmp_path / "out", result, title="model")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json", "evaluation.csv", "evaluation.html", "model_card.md"
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(result)
    )


def test_card_states_numbers_and_safety(result):
    text = model_card(result, title=NASTY)
    assert SAFETY in text
    assert re.search(r"(?<!\\)[<`*\[|]", text.splitlines()[0]) is None  # tests/hostile/test_markdown.py has more
    entry = result["suicide_risk"]
    line = next(line for line in text.splitlines() if line.startswith("| suicide_risk | text"))
    assert f"{entry['weighted_f1']:.3f} ({entry['ci95'][0]:.3f}–{entry['ci95'][1]:.3f})" in line
    assert f"tfidf_logreg {entry['floors']['tfidf_logreg']['weighted_f1']:.3f}" in line
    assert not re.search(r"82\.76|0\.828", text)  # no published figure among the measured ones


def test_leaderboard(tmp_path, answers, result):
    better = evaluate([row | {"parsed_label": row["label"]} for row in answers if "label" in row], draws=5)
    for name, found in (("weak", result), ("strong", better)):
        write_report(tmp_path / name, found, title=name)
    board = leaderboard_rows([tmp_path / "weak", tmp_path / "strong" / "evaluation.json"])
    risk = [row for row in board if row["task"] == "suicide_risk"]
    assert [(row["kind"], row["system"]) for row in risk[:3]] == [("run", "strong"), ("run", "weak"), ("run", "weak")]
    assert [row["kind"] for row in risk[3:]] == ["floor", "floor"]
    assert "| floor: tfidf_logreg |" in leaderboard_markdown(board)
    for text, name in (("{}", "absent"), ("[]", "list"), ('{"suicide_risk": {"n": 3}}', "half"), ("{", "broken")):
        if name != "absent":
            (tmp_path / name).mkdir()
            (tmp_path / name / "evaluation.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="make it with `mentalglm evaluate"):
            leaderboard_rows([tmp_path / name])


SETS = [("suicide_risk", "sos_hl_1k", "82.76"), ("cognitive_distortion", "socialcd_3k", "76.1"),
        ("cognitive_pathway", "pathways", "62.34"), ("imhi_sad", "imhi_sad", "68.44")]  # fmt: skip


@pytest.mark.parametrize(("task", "source", "figure"), SETS)
@pytest.mark.parametrize("of", ["these records", "others", "some others", "nobody knows"])
def test_published_figures_stand_only_beside_results_on_their_records(tmp_path, task, source, figure, of):
    """A demo's synthetic posts, or somebody's own table, are asked the same question and are no such records."""
    language = "en" if task.startswith("imhi") else "zh"
    given = rows(task, 12, language=language, source={"others": "synthetic", "nobody knows": ""}.get(of, source))
    if of == "some others":
        given[3]["source"] = "synthetic"
    found = evaluate(given, draws=2)
    write_report(tmp_path, found, title="t")
    board = leaderboard_rows([tmp_path])
    shown = of == "these records"
    assert found[task]["data_set"] == (source if shown else None)
    assert (f"<td>{figure}</td>" in render(found, title="t")) == shown
    assert [row["kind"] for row in board] == ["run", *["published"] * (len(published()[task][source]) if shown else 0)]
    assert all("weighted_f1" not in row for row in board if row["kind"] == "published")
    lines = leaderboard_markdown(board).splitlines()
    assert all(line.count("|") == 9 for line in lines)
    marked = ["*published:" in line for line in lines[2:]]
    assert marked == [row["kind"] == "published" for row in board]


def test_an_evaluation_of_an_earlier_version_has_no_published_figure(tmp_path):
    found = evaluate(rows("suicide_risk", 12, source="sos_hl_1k"), draws=2)
    del found["suicide_risk"]["data_set"]
    assert "82.76" not in render(found, title="t")
    write_report(tmp_path, found, title="t")
    assert [row["kind"] for row in leaderboard_rows([tmp_path])] == ["run"]


def test_no_row_of_the_page_stands_twice(answers, result):
    """Both readings and the floors of a task are rows of one table, each with its name."""
    text = render(result, title="t", compared=compare((answers, answers), (answers, answers), draws=2))
    for section in text.split("<section")[1:]:
        found = [
            re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "|", row)) for row in re.findall(r"<tr.*?</tr>", section, re.DOTALL)
        ]
        headless = [row for row in found if "level" not in row and "calibration" not in row]
        assert len(set(headless)) == len(headless), [row for row in headless if headless.count(row) > 1]
    for name in ("read from the text", "label log-probability", "floor: majority", "floor: tfidf_logreg"):
        assert text.count(f"<td>{name}</td>") == (1 if "floor" in name else len(result)), name


def test_published_figures_say_where_they_are_from():
    figures = published()
    assert set(figures) <= set(tasks.TASKS)
    for row in (row for sets in figures.values() for rows in sets.values() for row in rows):
        assert set(row) == {"system", "metric", "value", "seen", "source"}
        assert row["seen"] in ("primary", "secondary", "derived")
        assert 0 < row["value"] < 100
        assert "MentalGLM" not in row["system"]
