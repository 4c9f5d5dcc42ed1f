"""`probes demo`: the pair that ships is what its script makes, and the probes tell its models apart."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from probes import cli, terminal
from probes.demo import MODELS, PAIR, ROWS
from probes.models.encode import read_generations
from probes.probe import Probe
from probes.results.store import read_run

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> tuple[str, str]:
    """What the command prints and says; it must not fail."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        cli.main([str(one) for one in arguments])
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The directory of a demonstration of the first eight posts, and what the command printed."""
    pair = tmp_path_factory.mktemp("pair")
    shutil.copytree(PAIR, pair, dirs_exist_ok=True)
    for name in MODELS:
        rows = (PAIR / name / ROWS).read_text("utf-8").splitlines(keepends=True)
        (pair / name / ROWS).write_text("".join(rows[:8]), "utf-8")
    out = tmp_path_factory.mktemp("shown") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probes.demo.PAIR", pair)
        yield out, *call("demo", "--out", out)


def test_the_models_are_told_apart(shown):
    faithful, unfaithful = (read_run(shown[0] / name).summary for name in MODELS)
    posts = faithful["n"]
    assert posts == unfaithful["n"] == 8
    assert faithful["conclusion"] == "supported" and unfaithful["conclusion"] == "contradicted"
    assert faithful["verdicts"]["supported"] >= 0.8 * posts and not faithful["verdicts"]["contradicted"]
    assert unfaithful["verdicts"]["contradicted"] >= 0.8 * posts and not unfaithful["verdicts"]["supported"]
    assert faithful["verdicts_by_chance"]["supported"] < 0.4 * faithful["verdicts"]["supported"]


def test_one_table_then_the_report_and_the_safety_note(shown):
    out, printed, said = shown
    lines = printed.splitlines()
    for name, quotes in MODELS.items():
        (line,) = [one.strip() for one in lines if one.strip().startswith(quotes)]
        run = read_run(out / name).summary
        counts = [(int(a), float(b)) for a, b in re.findall(r"(\d+) \(([\d.]+)\)", line)]
        verdicts = ("supported", "contradicted", "inconclusive")
        assert [count for count, _ in counts] == [run["verdicts"][verdict] for verdict in verdicts]
        assert [chance for _, chance in counts[:2]] == [round(run["verdicts_by_chance"][v], 1) for v in verdicts[:2]]
        assert sum(chance for _, chance in counts) == pytest.approx(run["n"], abs=0.16)
        assert line.rstrip().endswith(run["conclusion"])
    assert f"report   {out / 'report.html'}" in printed and printed.count("not a diagnosis") == 1
    posts = sum(read_run(out / name).summary["n"] for name in MODELS)
    assert f"{posts} of {posts}" in said
    assert not [post for post in _posts() if post in printed]


@pytest.mark.slow
def test_the_tutorial_shows_what_it_prints(tmp_path):
    """All posts; counts, and what random citations are expected to get, to a tenth, depend on no clock and no seed."""
    page = (ROOT / "docs" / "first-report.md").read_text("utf-8")
    for line in call("demo", "--out", tmp_path / "first")[0].splitlines()[:5]:
        assert line.rstrip() in page, line


def test_the_page_stands_alone_and_leads_to_both_reports(shown):
    page = (shown[0] / "report.html").read_text("utf-8")
    assert "default-src &#39;none&#39;" in page and not re.search(r"https?:|//\w|<script|@import|url\(", page)
    links = re.findall(r'href="([^"]+)"', page)
    assert links == [f"{name}/report.html" for name in MODELS]
    assert all((shown[0] / link).is_file() for link in links)
    assert all(quotes in page for quotes in MODELS.values())


def test_again_it_reads_what_is_there(shown, monkeypatch):
    """The same call after an interruption before the last page: nothing is measured twice."""
    out = shown[0]
    (out / "report.html").unlink()
    monkeypatch.setattr("probes.suite.probe_post", lambda *_: pytest.fail("a finished post was probed again"))
    found = json.loads(call("demo", "--out", out, "--json")[0])
    assert (out / "report.html").is_file() and found["report"] == str(out / "report.html")
    assert {name: one["conclusion"] for name, one in found["models"].items()} == {
        "faithful": "supported", "unfaithful": "contradicted"
    }  # fmt: skip


def test_what_is_not_expected_at_random_is_inconclusive(capsys):
    """With the other two they make up all posts."""
    summary = {"n": 10, "verdicts": {"supported": 7, "contradicted": 1, "inconclusive": 2},
               "verdicts_by_chance": {"supported": 1.5, "contradicted": 6.0}, "conclusion": "supported"}  # fmt: skip
    terminal.print_pair([("it", summary)])
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.strip().startswith("it ")]
    assert re.findall(r"\d+ \([\d.]+\)", line) == ["7 (1.5)", "1 (6.0)", "2 (2.5)"]


# ---- the pair itself -------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[dict]:
    return read_generations(PAIR / name / ROWS)


def _posts() -> set[str]:
    return {row["post"] for name in MODELS for row in _rows(name)}


def test_the_script_says_what_was_trained():
    spec = importlib.util.spec_from_file_location("train_pair", ROOT / "scripts" / "train_pair.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in MODELS:
        about = json.loads((PAIR / name / "about.json").read_text("utf-8"))
        world = dataclasses.replace(script.WORLD, faithful=name == "faithful")
        assert about["world"] == json.loads(json.dumps(dataclasses.asdict(world)))
        assert about["right_answers"] >= 0.97 and about["third_label_without_the_cue"] >= 0.97
        assert len(_rows(name)) == script.POSTS


def test_the_pair_is_small():
    files = [path for path in PAIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_what_the_model_writes_and_quotes_what_it_is_said_to(name):
    probe, ours = Probe.from_pretrained(PAIR / name), "cues" if name == "faithful" else "decoys"
    for row in _rows(name):
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        with torch.no_grad():
            best = probe.model(input_ids=ids).logits[0].argmax(-1).tolist()
        start = len(row["prompt_ids"])
        assert best[start - 1 : -1] == row["output_ids"], row["id"]
        ((a, b),) = row[ours]
        assert f'"{row["post"][a:b]}"' in row["parsed_explanation"]
        assert row["cues"] != row["decoys"]
