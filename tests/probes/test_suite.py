"""The run over a data set: what is written, what survives a kill, what redaction leaves; and once with a real model."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.errors import ProbeError, ProbeInputError, ProbeWarning, RowRefused
from probes.models.abilities import Abilities
from probes.models.trial import Trial
from probes.records import Check, Example, Segment
from probes.report.page import write_report
from probes.results.store import SCHEMA_VERSION, PostResult, read_manifest, read_run
from probes.saliency.attribute import Settings
from probes.suite import BUDGETS, _copies, prepare, run_suite
from probes.terminal import print_summary
from tests.probes.worlds import attribution, clause_map, post_result

WORLDS = {r.id: r for r in (post_result(s, k=5 + s % 2, cite=(s % 3,), invent=s == 2) for s in range(6))}
NECESSITY = Check("necessity", "erase", 3.0, 0.5, 0.1, 1.0, 0.05, None, 20, "ok", ())
FILES = {
    "manifest.json",
    "attributions.jsonl",
    "checks.jsonl",
    "checks.parquet",
    "units.parquet",
    "summary.csv",
    "summary.json",
    "report.html",
    "cache",
    "run.lock",
}


def example(result: PostResult, **changes: Any) -> Example:
    post = result.post or ""  # a token per character, one without text that ends the prompt, one for the answer
    offsets = tuple(itertools.accumulate((len(char.encode("utf-8", "surrogatepass")) for char in post), initial=0))
    fields: dict[str, Any] = {
        "id": result.id,
        "task": result.task,
        "post": result.post or "",
        "ids": tuple(range(len(post) + 2)),
        "prompt_len": len(post) + 1,
        "byte_spans": (*itertools.pairwise(offsets), (offsets[-1], offsets[-1]), (offsets[-1], offsets[-1] + 1)),
        "char_bytes": (*offsets, offsets[-1] + 1),
        "segments": (Segment("post", (0, len(post)), (0, len(post))),),
        "post_char": (0, result.length),
        "text": result.post or "",
        "label": result.label,
        "label_text": result.label_text or "",
        "candidates": {},
        "explanation": result.explanation,
        "cues": result.cues,
        "decoys": None,
    }
    return Example(**(fields | changes))


class FakeProbe:
    """Stands in for a model: lays out rows from ``WORLDS`` and counts what is asked of it."""

    name, fingerprint, dtype, device = "fake", "f" * 16, "torch.float32", "cpu"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.studied: list[list[str]] = []
        self.before: tuple[str, ...] = ("gradnorm",)
        self.stop_at: int | None = None
        self.scorer = self
        self.checked: list[str] = []
        self.tried = Trial(Abilities(), {"packed": 0.0, "prefix kept": math.inf}, 1e-3, 1e-5, 40, 0, 1e3)
        self.memory = {"weights": 2**30, "prefix": 0, "batch": 2**29, "tokens": 40, "rows": 5}
        self.room: list[int] = []

    def check(self, example: Example) -> None:
        self.checked.append(example.id)

    def settle(self, examples: Sequence[Example]) -> None:
        self.checked += [e.id for e in examples]

    def fit(self, max_memory: int) -> None:
        self.room.append(max_memory)

    def unchanged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def encode(self, row: dict) -> Example:
        if row["id"] == "bad":
            raise RowRefused("bad", "its post 'secret' is not in the prompt", "the post is not in the prompt")
        return example(
            WORLDS[row["id"]], **{k: v for k, v in row.items() if k in ("label_text", "explanation", "user", "pair")}
        )


@pytest.fixture
def probe(monkeypatch):
    fake = FakeProbe()

    def attribute(probe, example, methods, targets, settings, fillers=()):
        assert isinstance(settings, Settings)
        begins = methods == ("ig",) or (methods == ("erase",) and fake.before != ("ig",))
        begins, fake.before = begins and "label" in targets, methods
        if begins:  # one call per method: ig (not in "fast"), erase, ...
            if fake.stop_at is not None and len(fake.calls) >= fake.stop_at:
                raise KeyboardInterrupt
            fake.calls.append(example.id)
        return [a for a in WORLDS[example.id].attributions if a.method in methods and a.target in targets]

    def effects(probe, example, spans):
        assert spans and all(0 <= a < b <= len(example.post) for a, b in spans)
        return NECESSITY, dataclasses.replace(NECESSITY, name="sufficiency", value=None, status="abstain")

    monkeypatch.setattr("probes.saliency.attribute.attribute", attribute)
    monkeypatch.setattr("probes.checks.faithfulness.cited_effects", effects)
    for name in ("checks.gates.judge", "checks.gates.max_sensitivity", "checks.behaviour.counterfactuals"):
        monkeypatch.setattr(f"probes.{name}", lambda *given, **named: ())
    for name in ("weight_of_evidence", "mediation_share"):
        monkeypatch.setattr(
            f"probes.checks.behaviour.{name}", lambda *given, name=name: dataclasses.replace(NECESSITY, name=name)
        )

    def study(probe, examples, methods, seed, keep):
        assert methods == ("ig", "erase")
        fake.studied.append([e.id for e in examples])
        return {
            "n": len(examples),
            "kinds": {},
            "cascade": [{"down_to": "nothing", "correlation": {}, "correlation_null": {}, "cue_auroc": {}}],
        }

    monkeypatch.setattr("probes.checks.randomise.study", study)
    return fake


def rows(*ids: str) -> list[dict]:
    return [{"id": i} for i in ids or WORLDS]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_post_that_is_stopped_goes_on_where_it_was(probe, tmp_path, monkeypatch):
    """Ctrl-C within a post costs the map that is being made, not those that are."""
    import probes.saliency.attribute

    made, whole = [], probes.saliency.attribute.attribute

    def stopped(probe, example, methods, targets, settings, fillers=()):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((example.id, methods, targets))
        return whole(probe, example, methods, targets, settings, fillers)

    monkeypatch.setattr("probes.saliency.attribute.attribute", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_suite(probe, rows("p0", "p1"), tmp_path / "a", redact=True)
    kept = list((tmp_path / "a" / "cache").glob("*.part-*"))
    assert len(kept) == 2 and not any((WORLDS["p0"].post or "")[:4] in path.read_text("utf-8") for path in kept)
    again = list(made)
    monkeypatch.setattr(
        "probes.saliency.attribute.attribute",
        lambda *given, **named: made.append((given[1].id, *given[2:4])) or whole(*given, **named),
    )
    found = run_suite(probe, rows("p0", "p1"), tmp_path / "a", redact=True)
    assert not set(made[2:]) & set(again)  # no map was made twice
    assert found == run_suite(probe, rows("p0", "p1"), tmp_path / "b", redact=True)
    assert not list((tmp_path / "a" / "cache").glob("*.part-*"))


def test_run_directory(probe, tmp_path):
    seen = []
    summary = run_suite(probe, rows(), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert [one for one in seen if one[0] == int(one[0])] == [(i, 6) for i in range(7)]
    assert seen == sorted(seen) and len(seen) > 4 * 6  # within a post, too
    assert probe.checked and not list((tmp_path / "cache").glob("*.part-*"))
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == summary
    assert summary["n"] == 6 and summary["skipped"] == 0 and sum(summary["verdicts"].values()) == 6
    maps = [json.loads(line) for line in (tmp_path / "attributions.jsonl").read_text("utf-8").splitlines()]
    phrases = sum(len(r.citations) for r in WORLDS.values())
    assert len(maps) == 6 * 3 * 2 + phrases and {m["schema_version"] for m in maps} == {SCHEMA_VERSION}
    assert {m["method"] for m in maps if m["target"].startswith("explanation[")} == {"erase"}
    flat = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text("utf-8").splitlines()]
    assert summary["necessity"] == 3.0 and summary["necessity_null"] == 0.5 and summary["sufficiency"] is None
    assert {row["name"] for row in flat} >= {
        "mass_ratio",
        "cosine",
        "cue_auroc",
        "coincidence",
        "fabricated_quote_rate",
    }
    manifest = read_manifest(tmp_path)
    assert (
        manifest["status"] == "done"
        and len(manifest["cache"]) == 6
        and manifest["methods"] == list(BUDGETS["standard"][0])
    )


def test_results_come_back_equal(probe, tmp_path):
    run_suite(probe, rows(), tmp_path)
    run = read_run(tmp_path)
    assert [r.id for r in run.results] == list(WORLDS)
    assert repr(run) == f"Run({len(WORLDS)} posts, {run.summary['conclusion']})"  # what a log and a notebook keep
    for result in run.results:
        assert repr(result) == f"PostResult({result.id!r}, {len(result.attributions)} maps)"
        world = WORLDS[result.id]
        assert result.units == world.units and result.citations == world.citations
        assert result.measured[0] == NECESSITY and result.evidence().report.verdict == world.evidence().report.verdict
        for a, b in zip(result.attributions, world.attributions, strict=True):
            np.testing.assert_array_equal(a.char_values, b.char_values)


def test_what_run_suite_returns_is_the_summary_and_knows_its_run(probe, tmp_path):
    suite = run_suite(probe, rows("p0", "p1"), tmp_path / "run")
    assert json.loads(json.dumps(suite)) == json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    page = write_report(suite, tmp_path / "again.html")
    assert page.read_bytes() == (tmp_path / "run" / "report.html").read_bytes()
    assert [r.id for r in suite.run.results] == ["p0", "p1"] and suite._repr_html_() == suite.run._repr_html_()


def test_killed_anywhere_the_same_call_continues(probe, tmp_path):
    whole = tmp_path / "whole"
    run_suite(probe, rows(), whole)
    probe.calls.clear()
    out = tmp_path / "cut"
    for stop in (0, 2, 3, 5):
        probe.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            run_suite(probe, rows(), out)
        with pytest.raises(ProbeInputError, match="not finished"):
            read_run(out)
    probe.stop_at = None
    run_suite(probe, rows(), out)
    assert probe.calls == list(WORLDS)  # every post exactly once, over five calls
    ours, theirs = tree(out), tree(whole)
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different <= {"manifest.json", "report.html"}  # they hold the time of day


def test_what_scoring_takes_is_told_before_the_first_post(probe, tmp_path):
    told: list[tuple[str, int]] = []
    for _ in range(2):  # the second call makes no post
        run_suite(probe, rows(), tmp_path, max_memory=2.5, tell=lambda line: told.append((line, len(probe.calls))))
    ((line, calls),) = told
    assert calls == 0 and probe.room == [int(2.5 * 2**30)]
    assert "batches of 5 rows of 40 tokens; memory: weights 1.00 GiB, prefix 0.00 GiB, batch 0.50 GiB" in line
    engine = json.loads((tmp_path / "manifest.json").read_text("utf-8")).get("engine")
    assert engine is None or engine["gaps"] == {"packed": 0.0}
    run_suite(probe, rows(), tmp_path / "other")
    engine = json.loads((tmp_path / "other" / "manifest.json").read_text("utf-8"))["engine"]
    assert engine["gaps"] == {"packed": 0.0} and engine["memory"] == probe.memory and len(probe.room) == 1
    for size in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ProbeInputError, match="max memory"):
            run_suite(probe, rows(), tmp_path / "third", max_memory=size)


def test_killed_between_the_files_it_is_not_taken_for_finished(probe, tmp_path, monkeypatch):
    run_suite(probe, rows("p0"), tmp_path)
    monkeypatch.setattr("probes.suite.write_report", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_suite(probe, rows("p0", "p1"), tmp_path)
    with pytest.raises(ProbeInputError, match="not finished"):
        read_run(tmp_path)


def test_what_changes_the_numbers_is_not_read_from_the_cache(probe, tmp_path):
    run_suite(probe, rows("p0"), tmp_path)
    run_suite(probe, rows("p0"), tmp_path)
    assert probe.calls == ["p0"]
    first, second = (run_suite(probe, rows("p0"), tmp_path, budget="full")["randomisation"] for _ in range(2))
    assert first == second and first["n"] == 1 and probe.studied == [["p0"]]  # kept in the cache as well
    probe.fingerprint = "e" * 16
    run_suite(probe, rows("p0"), tmp_path)
    run_suite(probe, [{"id": "p0", "explanation": "没有引用"}], tmp_path)
    assert probe.calls == ["p0"] * 4


def test_damaged_cache_is_made_again(probe, tmp_path):
    run_suite(probe, rows("p0", "p1"), tmp_path)
    first, second = sorted((tmp_path / "cache").iterdir())
    first.write_text('{"id": "p0"', "utf-8")
    with pytest.raises(ProbeInputError, match="the same `probes run` command repairs it"):
        read_run(tmp_path)
    second.write_text("[]", "utf-8")
    with pytest.warns(ProbeWarning, match="made again") as said:
        run_suite(probe, rows("p0", "p1"), tmp_path)
    assert len(said) == 2
    assert sorted(probe.calls) == ["p0", "p0", "p1", "p1"]
    assert len(read_run(tmp_path).results) == 2


def test_redacted_run_holds_no_text(probe, tmp_path):
    run_suite(probe, rows(), tmp_path, redact=True)
    everything = b"\n".join(tree(tmp_path).values()).decode("utf-8", "replace")
    for result in WORLDS.values():
        for a, b in result.units:
            assert result.post is not None
            words = result.post[a : b - 1]
            assert words not in everything and json.dumps(words)[1:-1] not in everything
        assert "帖子提到" not in everything and "从来没有写过" not in everything
    run = read_run(tmp_path)
    assert all(r.post is None and r.explanation is None and r.label_text is None for r in run.results)
    assert all(c.text_hash == "" for r in run.results for c in r.citations)
    whole = dataclasses.replace(WORLDS["p1"], measured=run.results[1].measured)
    assert run.results[1].evidence().report == whole.evidence().report  # nothing the checks need is lost
    run_suite(probe, rows(), tmp_path, redact=True)
    assert len(probe.calls) == 6


def test_a_redacted_run_still_knows_which_posts_share_an_author(probe, tmp_path):
    given = [
        row | ({} if user is None else {"user": user}) for row, user in zip(rows(), ("ann", None, "ann"), strict=False)
    ]
    run_suite(probe, given, tmp_path, redact=True)
    assert [r.user for r in read_run(tmp_path).results] == ["author 0", None, "author 0"]
    assert b"ann" not in b"".join(tree(tmp_path / "cache").values())


def test_redaction_does_not_go_over_an_unredacted_run(probe, tmp_path):
    run_suite(probe, rows("p0"), tmp_path)
    with pytest.raises(ProbeInputError, match="holds an unredacted run"):
        run_suite(probe, rows("p0"), tmp_path, redact=True)


def test_rows_without_label_are_skipped_and_counted(probe, tmp_path):
    given = [{"id": "p0", "finish": "stop"}, {"id": "p1", "label_text": ""}]
    with pytest.warns(ProbeWarning, match="^1 of 2 rows left out: 1 no label was parsed from the output$"):
        summary = run_suite(probe, given, tmp_path)
    assert summary["n"] == 1 and summary["skipped"] == 1 and summary["cut_off"] == 0
    (skipped,) = read_manifest(tmp_path)["skipped"]
    assert (skipped["id"], skipped["reason"]) == ("p1", "no label was parsed from the output")
    with pytest.raises(ProbeInputError, match="none of the 1 rows can be probed: 1 no label was parsed"):
        run_suite(probe, [{"id": "p1", "label_text": ""}], tmp_path / "b")


@pytest.mark.parametrize("redact", [False, True])
def test_a_refused_row_is_left_out_and_counted_by_reason(probe, tmp_path, redact):
    given = [{"id": "bad"}, *rows("p0"), {"id": "bad"}, {"id": "p1", "label_text": ""}, *rows("p2")]
    told = "^3 of 5 rows left out: 2 the post is not in the prompt; 1 no label was parsed from the output$"
    with pytest.warns(ProbeWarning, match=told):
        summary = run_suite(probe, given, tmp_path, redact=redact)
    assert probe.calls == ["p0", "p2"] and summary["n"] == 2 and summary["skipped"] == 3
    assert summary["skipped_by_reason"] == {
        "the post is not in the prompt": 2, "no label was parsed from the output": 1
    }  # fmt: skip
    assert ("secret" in json.dumps(read_manifest(tmp_path)["skipped"])) != redact
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "2 the post is not in the prompt; 1 no label was parsed from the output" in page and "secret" not in page
    with pytest.raises(ProbeInputError, match=r"none of the 1 rows .*: 1 the post is not in the prompt .row 'bad'"):
        run_suite(probe, [{"id": "bad"}], tmp_path / "b")


def test_cut_answers_are_told(probe, tmp_path, capsys):
    summary = run_suite(probe, [{"id": "p0", "finish": "length"}, {"id": "p1", "finish": "stop"}], tmp_path)
    assert summary["cut_off"] == 1
    page = " ".join((tmp_path / "report.html").read_text("utf-8").split())
    assert re.search(r"<dt>Answers cut off</dt><dd[^>]*>1<", page)
    print_summary(summary)
    assert re.search(r"answers cut off by the token limit\W+1\b", capsys.readouterr().out)


def test_half_a_pair_is_a_post_like_any_other(probe, tmp_path):
    """The other half may be beyond the limit, or may have been refused: nothing else suffers."""
    given = [
        {"id": "p0", "pair": "a"}, {"id": "p1", "pair": "b"}, {"id": "p2", "pair": "b", "label_text": ""},
        {"id": "p3", "pair": "a"}
    ]  # fmt: skip
    with pytest.warns(ProbeWarning, match="1 of 3 rows left out"):
        summary = run_suite(probe, given, tmp_path, limit=3)
    assert summary["n"] == 2 and summary["no_pair"] == {"one row only": 2} and summary["swaps"] is None
    assert "2 one row only" in (tmp_path / "report.html").read_text("utf-8")


def test_row_without_explanation_abstains(probe, tmp_path):
    summary = run_suite(probe, [{"id": "p0"}, {"id": "p1", "explanation": None}], tmp_path)
    assert summary["abstained"] == 1
    assert {a.target for a in read_run(tmp_path).results[1].attributions} == {"label"}


def test_limit_and_bad_input(probe, tmp_path):
    assert run_suite(probe, rows(), tmp_path / "a", limit=2)["n"] == 2
    with pytest.raises(ProbeInputError, match="budget 'big': choose from fast, standard, full"):
        prepare(tmp_path / "b", "big")
    with pytest.raises(ProbeInputError, match="limit 0"):
        prepare(tmp_path / "b", limit=0)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ProbeInputError, match="a file is in the way"):
        prepare(file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(ProbeInputError, match="belongs to something else"):
        prepare(other)
    with pytest.raises(ProbeInputError, match="not written by `probes run`"):
        read_run(other)
    with pytest.raises(ProbeInputError, match="no manifest"):
        read_run(tmp_path)


def test_full_disk_is_one_line_and_keeps_the_old_run(probe, tmp_path, monkeypatch):
    run_suite(probe, rows("p0"), tmp_path)
    before = (tmp_path / "summary.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ProbeError, match="No space left on device"):
        run_suite(probe, rows("p1"), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "summary.json").read_bytes() == before
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]


def test_fast_budget_screens_but_never_judges(probe, tmp_path):
    summary = run_suite(probe, rows(), tmp_path, budget="fast")
    assert summary["verdicts"]["inconclusive"] == 6 and summary["conclusion"] == "inconclusive"
    assert summary["necessity"] is None  # not paid for
    assert "ig" not in summary["mass_ratio"] and summary["completeness_delta"]["mean"] is None


def test_lone_surrogates_survive(probe, tmp_path, monkeypatch):
    odd = post_result(0, name="odd")
    post = "\ud800" + (odd.post or "")[1:]
    monkeypatch.setitem(WORLDS, "odd", dataclasses.replace(odd, post=post))
    run_suite(probe, rows("odd"), tmp_path)
    assert read_run(tmp_path).results[0].post == post
    assert "U+D800" in (tmp_path / "report.html").read_text("utf-8")


def test_result_survives_json():
    for result in (post_result(1), post_result(1).redacted(), dataclasses.replace(post_result(1), cues=None)):
        again = PostResult.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again.to_dict() == result.to_dict() and again.evidence().report == result.evidence().report
    zeros = attribution("ig", "label", clause_map(np.zeros(2), [(0, 2), (2, 4)]))
    assert zeros.values.tolist() == [0, 0, 0, 0]


def test_tiny_model_end_to_end(tiny_probe, tiny_rows, tmp_path):
    """The real engine, both languages: every map lands on the post and every number is there."""
    summary = run_suite(tiny_probe, tiny_rows, tmp_path, n_boot=200)
    assert summary["n"] == len(tiny_rows) and summary["fabricated_quote_rate"] == 0.0 and summary["abstained"] == 0
    run = read_run(tmp_path)
    for row, result in zip(tiny_rows, run.results, strict=True):
        assert result.post == row["post"] and result.units[-1][1] == len(row["post"])
        cited = [row["post"][a:b] for c in result.citations for a, b in c.post_char]
        assert cited == [row["post"][slice(*row["cues"][0])]]
        by = {(a.method, a.target): a for a in result.attributions if "[" not in a.target}
        assert set(by) == {(m, t) for m in BUDGETS["standard"][0] for t in ("label", "explanation")}
        for a in by.values():
            assert len(a.char_values) == len(row["post"])
            assert a.char_values.sum() == pytest.approx(a.values.sum(), abs=1e-9)
        assert {c.name for c in result.measured} == {"necessity", "sufficiency"}
        ig = by["ig", "label"]
        if ig.converged:
            assert ig.values.sum() == pytest.approx(
                ig.f_input - ig.f_baseline, abs=0.06 * max(2, abs(ig.f_input - ig.f_baseline))
            )
    before = tree(tmp_path)
    run_suite(tiny_probe, tiny_rows, tmp_path, n_boot=200)
    assert {n for n, data in tree(tmp_path).items() if data != before[n]} <= {"manifest.json", "report.html"}
    assert (tmp_path / "manifest.json").stat().st_mode & 0o077 == 0  # ids, and why rows were left out


def test_copies_of_a_post_are_not_independent(probe):
    """Twenty rows of one post under other ids would make one post a significant result."""
    one, two = (example(result, user=None) for result in list(WORLDS.values())[:2])
    said = [dataclasses.replace(one, id=f"r{i}") for i in range(3)]
    found = _copies([*said, two])
    assert [e.user for e in found] == ["copies 0"] * 3 + [None]
    assert [dataclasses.replace(e, user=None).to_dict() for e in found] == [e.to_dict() for e in (*said, two)]
    # A copy by a named author, and of two authors one post: whoever shares it is no second witness.
    by = [dataclasses.replace(post, user=who) for post, who in ((one, "u2"), (two, "u2"), (one, "u1"), (two, None))]
    assert [e.user for e in _copies([*by, said[0]])] == ["u2"] * 5
    assert [e.user for e in _copies(by[1:3])] == ["u2", "u1"]
    spelt = [dataclasses.replace(post, user=who) for post, who in ((one, "Jos\u00e9"), (two, "jose\u0301\u200b"))]
    assert [e.user for e in _copies(spelt)] == ["Jos\u00e9"] * 2
