"""The leaderboard: seeds are one row, recipes are compared on the same posts, and every format says the same."""

import csv
import io
import json
import random
import re
import shutil
import statistics

import numpy as np
import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import evaluate
from mentalglm_jax.evaluate.leaderboard import FORMATS, formatted, leaderboard_markdown, leaderboard_rows
from mentalglm_jax.evaluate.metrics import METRICS
from mentalglm_jax.evaluate.report import write_report
from mentalglm_jax.evaluate.statistics import holm, paired_bootstrap
from mentalglm_jax.text import tasks

KEYS = tasks.TASKS["suicide_risk"].keys


def answers(right: float, seed: int, count: int = 60) -> list[dict]:
    rng, question = random.Random(seed), tasks.TASKS["suicide_risk"].question("en")
    found = []
    for number in range(count):
        gold = KEYS[number % 2]
        said = gold if rng.random() < right else KEYS[1 - number % 2]
        record = Record(f"r{number}", "suicide_risk", "en", f"post {number}", question, label=gold,
                        source="sos_hl_1k")  # fmt: skip
        found.append(record.to_dict() | {"parsed_label": said, "parse_status": "ok", "parsed_explanation": None})
    return found


def run(directory, rows, recipe=None, adapter=None):
    directory.mkdir(parents=True)
    (directory / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = {} if adapter is None else {"adapter": adapter}
    write_report(directory, {task: entry | said for task, entry in evaluate(rows, draws=5).items()}, title="t")
    if recipe is not None:
        (directory / "run.json").write_text(
            json.dumps({"recipe": recipe, "stages": {"generate": {}}}), encoding="utf-8"
        )
    return directory


def trained(directory, seed):
    """A run that only trained; the digest of its adapter."""
    adapter = str(seed) * 64
    files = {"stages/a/adapter/adapter_model.safetensors": adapter}
    directory.mkdir(parents=True)
    stages = {"train a": {"files": files}, "train control": {"files": {}}}
    (directory / "run.json").write_text(json.dumps({"recipe": {"seed": seed}, "stages": stages}))
    return adapter


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Two recipes of three and two seeds, and a directory that is no run's."""
    root = tmp_path_factory.mktemp("board")
    paths = [run(root / "weak" / f"seed-{n}", answers(0.6, n), {"seed": n, "lora": {"rank": 8}}) for n in range(3)]
    paths += [run(root / f"good-s{n}", answers(0.95, 10 + n), {"seed": n, "lora": {"rank": 16}}) for n in range(2)]
    paths.append(run(root / "alone", answers(0.8, 20)))
    return paths, leaderboard_rows(paths, draws=200)


def of_runs(rows):
    return [row for row in rows if row["kind"] == "run"]


def test_runs_that_differ_only_in_their_seed_are_one_row(board):
    paths, rows = board
    found = {row["system"]: row for row in of_runs(rows)}
    assert list(found) == ["good", "alone", "weak"]
    assert [(row["runs"], row["seeds"]) for row in found.values()] == [(2, [0, 1]), (1, None), (3, [0, 1, 2])]
    scores = [json.loads((path / "evaluation.json").read_text("utf-8"))["suicide_risk"] for path in paths[:3]]
    for metric in METRICS:
        values = [one[metric] for one in scores]
        assert found["weak"][metric] == pytest.approx(np.mean(values))
        assert found["weak"]["sd"][metric] == pytest.approx(np.std(values, ddof=1)) and len(set(values)) > 1
    assert found["weak"]["ci95"] is None and found["alone"]["sd"] is None and len(found["alone"]["ci95"]) == 2


@pytest.mark.parametrize("what", ["the same model", "other posts", "other gold labels", "what it should be"])
def test_what_is_no_other_seed_of_the_same_recipe(tmp_path, what):
    """The answers of one seed in the folder of another would be two seeds that agree; those to other records, a mean
    over nothing."""
    paths = []
    for seed in range(2):
        rows = [row | {"answered_by": f"model {0 if what == 'the same model' else seed}"} for row in answers(0.8, seed)]
        if seed and what == "other posts":
            rows[0]["post"] += " and more"
        if seed and what == "other gold labels":
            rows[0]["label"] = KEYS[1]
        paths.append(run(tmp_path / f"a-s{seed}", rows, {"seed": seed}))
    found = [(row["runs"], row["sd"] is None) for row in of_runs(leaderboard_rows(paths, draws=5))]
    assert found == ([(2, False)] if what == "what it should be" else [(1, True)] * 2)


def test_answers_asked_for_apart_below_their_runs_are_one_row_over_seeds_too(tmp_path):
    paths = []
    for seed in range(2):
        place = tmp_path / "arm" / f"seed-{seed}"
        adapter = trained(place, seed)
        for name, rows in (("risk", answers(0.8, seed)), ("distortion", distortions(seed))):
            paths.append(run(place / name, rows, adapter=adapter))
    found = of_runs(leaderboard_rows(paths, draws=5))
    assert [(row["task"], row["system"], row["runs"], row["seeds"]) for row in found] == [
        ("suicide_risk", "arm", 2, [0, 1]), ("cognitive_distortion", "arm", 2, [0, 1])
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["runs first", "base first", "runs alone"])
def test_what_another_model_said_below_a_run_is_no_seed_of_it(tmp_path, order):
    """The base before tuning, asked the same; and in the folder of a run that has no answers of its own yet."""
    runs, base = [], []
    for seed in range(2):
        place = tmp_path / f"tuned-s{seed}"
        adapter = trained(place, seed)
        runs.append(
            run(place / "risk", [row | {"answered_by": str(seed)} for row in answers(0.95, seed)], None, adapter)
        )
        before = [row | {"answered_by": "base"} for row in answers(0.2, 5)]
        base.append(run(place / "zero-shot", before))
        if seed == 1:
            shutil.copytree(place / "zero-shot", place, dirs_exist_ok=True)
            base.append(place)
    alone = of_runs(leaderboard_rows(runs, draws=5))
    assert [(row["system"], row["runs"], row["seeds"]) for row in alone] == [("tuned", 2, [0, 1])]
    given = {"runs first": runs + base, "base first": base + runs, "runs alone": [runs[0], base[1]]}[order]
    found = {row["system"]: row for row in of_runs(leaderboard_rows(given, draws=5))}
    if order == "runs alone":
        assert {name: row["runs"] for name, row in found.items()} == {"tuned-s0": 1, "zero-shot": 1}
        return
    assert found.pop("tuned") == alone[0] | {"against_best": None}
    assert {name: (row["runs"], row["seeds"], row["weighted_f1"] < 0.5) for name, row in found.items()} == {
        "zero-shot": (1, None, True), "tuned-s1/zero-shot": (1, None, True), "tuned-s1": (1, None, True)
    }  # fmt: skip


def distortions(seed: int) -> list[dict]:
    task, rng = tasks.TASKS["cognitive_distortion"], random.Random(seed)
    record = [Record(f"c{n}", task.name, "en", f"post {n}", task.question("en"), labels=(task.keys[n % 3],))
              for n in range(20)]  # fmt: skip
    said = {"parse_status": "ok", "parsed_explanation": None}
    return [one.to_dict() | said | {"parsed_label": [rng.choice(task.keys[:3])]} for one in record]


def test_recipes_are_compared_with_the_best_on_the_same_posts(board):
    paths, rows = board
    good, alone, weak = of_runs(rows)
    assert good["against_best"] is None
    gold = np.array([[key == KEYS[n % 2] for key in KEYS] for n in range(60)])

    def said(paths):
        read = [[json.loads(line) for line in (path / "generations.jsonl").read_text("utf-8").splitlines()]
                for path in paths]  # fmt: skip
        return np.array([[[row["parsed_label"] == key for key in KEYS] for row in one] for one in read])

    posts = [f"post {n}" for n in range(60)]
    wanted = [
        paired_bootstrap("single", posts, gold, said(side), said(paths[3:5]), 200)[METRICS[0]]
        for side in (paths[5:], paths[:3])
    ]  # fmt: skip
    adjusted = holm([test["p"] for test in wanted])
    for row, test, p in zip((alone, weak), wanted, adjusted, strict=True):
        assert row["against_best"] == test | {"p_holm": p}
        assert row["against_best"]["difference"] == pytest.approx(row["weighted_f1"] - good["weighted_f1"])
    assert weak["against_best"]["p_holm"] < 0.05


def test_several_runs_of_a_system_are_averaged_in_every_sample():
    rng = np.random.default_rng(0)
    gold = np.eye(2, dtype=bool)[rng.integers(0, 2, 40)]
    runs = np.stack([np.eye(2, dtype=bool)[rng.integers(0, 2, 40)] for _ in range(3)])
    posts = [str(n) for n in range(40)]
    one = [paired_bootstrap("single", posts, gold, run, gold, 30) for run in runs]
    found = paired_bootstrap("single", posts, gold, runs, gold, 30)
    for metric in METRICS:
        assert found[metric]["difference"] == pytest.approx(statistics.fmean(x[metric]["difference"] for x in one))
    assert paired_bootstrap("single", posts, gold, runs[:1], gold, 30) == one[0]


@pytest.mark.parametrize("what", ["no answers", "other records"])
def test_without_the_same_records_there_is_no_test(tmp_path, what):
    first, second = run(tmp_path / "a", answers(0.9, 0)), run(tmp_path / "b", answers(0.5, 1, 40))
    if what == "no answers":
        (second / "generations.jsonl").unlink()
    assert [row["against_best"] for row in of_runs(leaderboard_rows([first, second], draws=5))] == [None, None]


def test_damaged_answers_are_told(tmp_path):
    first, second = run(tmp_path / "a", answers(0.9, 0)), run(tmp_path / "b", answers(0.5, 1))
    (second / "generations.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"b/generations\.jsonl:1"):
        leaderboard_rows([first, second], draws=5)


def test_the_same_run_twice_and_the_same_name_twice_are_rows_of_their_own(tmp_path):
    recipe = {"seed": 0}
    paths = [run(tmp_path / where / "run", answers(0.9, 0), recipe) for where in ("x", "y")]
    paths.append(run(tmp_path / "z" / "run", answers(0.8, 0), {"seed": 0, "rank": 1}))
    found = of_runs(leaderboard_rows(paths, draws=5))
    assert sorted(row["system"] for row in found) == ["run", "y/run", "z/run"]
    assert [row["runs"] for row in found] == [1, 1, 1]
    one = run(tmp_path / "learning_rate=0.1" / "seed-3", answers(0.9, 0), recipe)
    assert of_runs(leaderboard_rows([one]))[0]["system"] == "learning_rate=0.1"


def test_markdown(board):
    lines = leaderboard_markdown(board[1]).splitlines()
    assert all(line.count("|") == 9 for line in lines)
    assert re.search(r"\| good \(2 seeds\) \| text \| 60 \| 0\.9\d\d ± 0\.0\d\d \|.*\| +\|$", lines[2])
    assert re.search(r"\| weak \(3 seeds\) .* \| -0\.\d{3}, p 0\.\d+ \|$", lines[4])
    assert "*published: " in lines[5]


def test_csv_and_json_have_every_number(board):
    rows = board[1]
    assert json.loads(formatted(rows, "json")) == json.loads(json.dumps(rows))
    found = list(csv.DictReader(io.StringIO(formatted(rows, "csv"))))
    assert len(found) == len(rows)
    for line, row in zip(found, rows, strict=True):
        if row["kind"] == "published":
            assert float(line["value"]) == row["value"] and line["weighted_f1"] == ""
            continue
        assert all(float(line[metric]) == row[metric] for metric in METRICS)
        assert line["micro_f1_sd"] == ("" if row["sd"] is None else str(row["sd"]["micro_f1"]))
        assert line["ci95_high"] == ("" if row["ci95"] is None else str(row["ci95"][1]))
        assert line["p_holm"] == ("" if row["against_best"] is None else str(row["against_best"]["p_holm"]))


def test_latex_is_escaped(tmp_path):
    path = run(tmp_path / "50%_of $a & #b {c} ~^\\d", answers(0.9, 0))
    text = formatted(leaderboard_rows([path]), "latex")
    assert r"50\%\_of \$a \& \#b \{c\} \textasciitilde{}\textasciicircum{}\textbackslash{}d" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert all(len(re.findall(r"(?<!\\)&", line)) == 7 and line.endswith(r"\\") for line in body)
    assert r"\textit{published: " in text and set(FORMATS) == {"markdown", "csv", "latex", "json"}
