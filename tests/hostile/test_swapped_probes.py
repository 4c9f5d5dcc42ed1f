"""State of `probes` swapped between two commands: another tokenizer, other posts, a manifest that was edited."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from probes.errors import ProbeInputError
from probes.post import Plan
from probes.probe import Probe
from probes.ranking import _maps
from probes.report.page import render
from probes.results.cache import Cache, digest
from probes.results.posts import paired
from probes.results.store import read_run
from probes.results.summary import compare
from probes.saliency.attribute import Settings
from probes.suite import _depends, _randomisation, lay_out
from tests.hostile.attack import refused, run
from tests.hostile.probes_files import clean, edit, place, probe  # noqa: F401
from tests.hostile.test_probes_runs import finished  # noqa: F401
from tests.probes.worlds import attribution


def other_merges(model: Path) -> None:
    raw = json.loads((model / "tokenizer.json").read_text("utf-8"))
    raw["model"]["merges"] = raw["model"]["merges"][:-5]
    (model / "tokenizer.json").write_text(json.dumps(raw), "utf-8")


def narrow_letters(model: Path) -> None:
    edit(model / "tokenizer.json", normalizer={"type": "NFKC"})


TOKENIZERS = {
    "another token that erases": lambda m: edit(m / "tokenizer_config.json", pad_token="<|user|>"),
    "merges": other_merges,
    "a normalizer": narrow_letters,
}


@pytest.mark.parametrize("swap", TOKENIZERS)
def test_maps_of_another_tokenizer_are_not_gone_on_with(swap, place, capsys):  # noqa: F811
    """It says what the other labels' ids are, and which token stands where the post is taken away."""
    before = Probe.from_pretrained(place / "model").fingerprint
    assert before == Probe.from_pretrained(place / "model").fingerprint
    assert probe(place, capsys).code == 0
    names = set(read_run(place / "out").manifest["cache"])
    TOKENIZERS[swap](place / "model")
    assert Probe.from_pretrained(place / "model").fingerprint != before
    probe(place, capsys)
    assert not names & set(read_run(place / "out").manifest["cache"])


def test_what_a_call_asked_of_the_tokenizer_is_no_other_tokenizer(place):  # noqa: F811
    asked, fresh = (Probe.from_pretrained(place / "model") for _ in range(2))
    asked.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert asked.fingerprint == fresh.fingerprint


@pytest.fixture
def runs(finished, tmp_path):  # noqa: F811
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def swapped_ids(directory: Path) -> None:
    """The two posts under each other's ids, as two files whose lines are in another order have them."""
    for entry in (directory / "cache").glob("*.json"):
        text = entry.read_text("utf-8")
        text = text.replace("row-0", "row-x").replace("row-1", "row-0").replace("row-x", "row-1")
        value = json.loads(text)["value"]
        entry.write_text(json.dumps({"digest": digest(value, name=entry.name), "value": value}), "utf-8")


@pytest.mark.parametrize("which", ["open", "redacted"])
@pytest.mark.parametrize("against", ["open again", "redacted again"])
def test_runs_over_other_posts_are_not_compared(which, against, runs, capsys):
    shutil.copytree(runs / "open", runs / "open again")
    command = ["probes", "check", runs / which, "--against", runs / against]
    assert run(command, capsys).code == 0
    swapped_ids(runs / against)
    refused(run(command, capsys), r"post 'row-\d' is another text in the second run, as are 2 of the 2 ids that both")


def test_a_post_in_another_width_and_case_is_the_same(runs):
    one = read_run(runs / "open").results[0]
    wide = dataclasses.replace(one, post="ＡＢＣ " + one.post, length=one.length + 4)
    low = dataclasses.replace(wide, post="abc " + one.post)
    assert paired([wide], [low]) == [(wide, low)]
    with pytest.raises(ProbeInputError, match="another text"):
        compare([wide], [dataclasses.replace(low, post="abd " + one.post)])


def twice(directory: Path) -> None:
    names = json.loads((directory / "manifest.json").read_text("utf-8"))["cache"]
    edit(directory / "manifest.json", cache=[names[0], names[0]])


def fewer(directory: Path) -> None:
    names = json.loads((directory / "manifest.json").read_text("utf-8"))["cache"]
    edit(directory / "manifest.json", cache=names[:1])


MANIFESTS = {"a post twice": (twice, r"cache: post 'row-\d' twice"),
             "a post fewer": (fewer, r"cache: names 1 posts, but .*summary\.json is of 2")}  # fmt: skip


@pytest.mark.parametrize("command", ["check", "report"])
@pytest.mark.parametrize("attack", MANIFESTS)
def test_a_manifest_that_names_other_posts_than_the_summary_counts(attack, command, runs, capsys):
    change, says = MANIFESTS[attack]
    change(runs / "open")
    refused(run(["probes", command, runs / "open"], capsys), says)


def test_a_redacted_report_of_an_open_run_names_no_pair(runs):
    """Of a run that is redacted itself pairs have numbers; so they have here."""
    found = read_run(runs / "open")
    each = {"pair": "Anna's note", "posts": ["row-0", "row-1"], "turned": True, "moved": 1.0, "by_method": {}}
    swaps = {"pairs": 1, "n": 1, "turned": 1, "moved": 1.0, "by_method": {}, "each": [each]}
    changed = dataclasses.replace(found, summary=found.summary | {"swaps": swaps})
    page = render(changed, redact=True)
    assert "Anna" not in page and "pair 0" in page and "Anna" in render(changed)


@pytest.mark.parametrize("there", ["rows.jsonl", "model", "fifo"])
def test_a_page_over_something_else(there, place, runs, capsys):  # noqa: F811
    import os

    os.mkfifo(place / "fifo")
    before = (place / "rows.jsonl").read_bytes()
    outcome = run(["probes", "report", runs / "open", "--out", place / there], capsys)
    refused(outcome, rf"{there}: (would be replaced, but is no page|is in the way, it is no file)")
    assert (place / "rows.jsonl").read_bytes() == before
    for _ in range(2):  # over a page it is written again
        assert run(["probes", "report", runs / "open", "--out", place / "page.html"], capsys).code == 0


@pytest.mark.parametrize("said", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202egnp"], ids=repr)
@pytest.mark.parametrize("where", ["method", "label", "conclusion"])
def test_what_a_run_of_strangers_says_in_the_terminal(where, said, runs, capsys):
    file = runs / "open" / "summary.json"
    found = json.loads(file.read_text("utf-8"))
    if where == "method":
        for key in ("mass_ratio", "mass_ratio_ci", "mass_ratio_null"):
            found[key] |= {said: next(iter(found[key].values()))}
    elif where == "label":
        found["labels"] |= {said: 1}
    else:
        found["conclusion"] = said
    file.write_text(json.dumps(found), "utf-8")
    edit(runs / "open" / "manifest.json", summary=digest(found))
    outcome = run(["probes", "check", runs / "open"], capsys)
    refused(outcome, r"summary\.json: (mass_ratio|labels|conclusion) is .*and its posts give")


def test_pairs_of_a_model_that_overflows(place, monkeypatch, capsys):  # noqa: F811
    """Its maps are nothing to choose by, and nothing to keep."""
    from probes.saliency import attribute as saliency

    made = saliency.attribute

    def overflown(*given, **named):
        found = made(*given, **named)
        return [dataclasses.replace(a, values=a.values * float("nan")) for a in found]

    row = json.loads((place / "rows.jsonl").read_text("utf-8").splitlines()[0])
    ids = row["output_ids"]
    rows = [row, row | {"id": "b", "output_ids": ids[:-1], "parsed_explanation": row["parsed_explanation"][:-1]}]
    (place / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    monkeypatch.setattr(saliency, "attribute", overflown)
    monkeypatch.setattr("probes.ranking.comparable", lambda answers, rules: ([(0, 1)], ""))
    outcome = run(["probes", "rank", place / "model", "--in", place / "rows.jsonl", "--out", place / "p.jsonl"], capsys)
    assert outcome.code == 1 and "is not finite in float32" in outcome.err and not (place / "p.jsonl").exists()


MENDED = {"label": {"label": "another"}, "explanation": {"explanation": None}, "candidates": {"candidates": {"a": "b"}},
          "cues": {"cues": ((0, 1),)}, "place": {"post_char": (0, 3)}}  # fmt: skip


@pytest.mark.parametrize("mended", MENDED)
def test_another_row_was_mended_under_the_same_ids(mended, place, tmp_path, monkeypatch):  # noqa: F811
    """Rows lend each other labels, explanations and chains; what was made of the old ones is not gone on with."""
    model = Probe.from_pretrained(place / "model")
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text("utf-8").splitlines()]
    examples, _ = lay_out(model, rows)
    others = [examples[0], dataclasses.replace(examples[1], **MENDED[mended])]
    studied: list[int] = []
    monkeypatch.setattr("probes.checks.randomise.study", lambda *given, **named: {"n": studied.append(1)})
    names = []
    for of in (examples, examples, others):
        plan = Plan(("erase",), ((), ()), tuple(of), True, 0)
        names.append(digest(_depends(examples[0], "f", plan, 0, Settings(), False)))
        _randomisation(model, of, plan, Cache(tmp_path / "out"))
    assert names[0] == names[1] != names[2] and len(studied) == 2


def test_ranked_maps_of_a_post_that_stands_elsewhere(place, tmp_path, monkeypatch):  # noqa: F811
    """The same ids and the same post, but `post_span` was mended: it stands twice in the prompt."""
    model = Probe.from_pretrained(place / "model")
    (example,), _ = lay_out(model, [json.loads((place / "rows.jsonl").read_text("utf-8").splitlines()[0])])
    moved = dataclasses.replace(example, post_char=(example.post_char[0] - 1, example.post_char[1] - 1))
    made: list[str] = []

    def attribute(probe, example, methods, *given):
        made.append(methods[0])
        return [attribution(methods[0], "label", np.ones(len(example.post)), example_id=example.id)]

    monkeypatch.setattr("probes.saliency.attribute.attribute", attribute)
    for one in (example, example, moved):
        _maps(model, one, one.ids, ("erase",), Cache(tmp_path / "maps"), (), 0, None)
    assert len(made) == 2
