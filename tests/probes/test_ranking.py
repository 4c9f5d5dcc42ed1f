"""Ranking explanations by saliency: by hand where maps are given, and on a model whose cue is known."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from probes import cli, ranking
from probes.checks.verdict import Voice
from probes.errors import ProbeError, ProbeInputError
from probes.ranking import Answer, Group, Rules, pairs_of, rank
from probes.validation.selftest import closed_form_probe
from tests.probes.planted import planted_rows, train_planted
from tests.probes.tiny import make_row

LENGTHS = np.array([10.0, 10.0, 10.0, 10.0])
CUE = np.array([0.05, 0.9, 0.05, 0.0])


def answer(cited: str, invented: float = 0.0, quotes: int = 1, tokens: int = 10) -> Answer:
    return Answer({"id": cited}, tuple(range(tokens)), np.array([c == "1" for c in cited]), invented, quotes)


def group(*answers: Answer, maps=(CUE, CUE)) -> Group:
    voices = tuple(Voice(name, (), mass, mass) for name, mass in zip(("gradient", "erasure"), maps, strict=False))
    return Group("post", answers, (voices,) * len(answers), LENGTHS)


def test_scores_are_excess_over_length_with_penalties():
    given = [answer("0100"), answer("1000"), answer("1100"), answer("1111"), answer("0000", invented=1.0),
             answer("0100", invented=0.5, quotes=2)]  # fmt: skip
    found = group(*given).scores(given)
    np.testing.assert_allclose(found[:, 0], [0.65, -0.2, 0.45, -0.5, -0.5, 0.4], atol=1e-12)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    scaled = group(*given, maps=(7 * CUE, CUE)).scores(given)
    np.testing.assert_allclose(scaled[:, 0], found[:, 0])  # a map's size says nothing


def test_a_pair_needs_both_families():
    one, other = answer("0100"), answer("1000")
    (pair,), reason = pairs_of(group(one, other), (one, other), Rules())
    assert (pair.chosen, pair.rejected, reason) == (0, 1, "") and pair.margin == pytest.approx(0.85)
    against = np.array([0.9, 0.05, 0.05, 0.0])
    assert pairs_of(group(one, other, maps=(CUE, against)), (one, other), Rules()) == ([], ranking.CHANCE)
    # By one family alone.
    (pair,), _ = pairs_of(group(one, other, maps=(CUE,)), (one, other), Rules(by="gradient"))
    assert pair.margins == (pytest.approx(0.85),)
    less = np.array([0.3, 0.45, 0.25, 0.0])
    (pair,), _ = pairs_of(group(one, other, maps=(CUE, less)), (one, other), Rules(margin=0.1))
    assert pair.margin == pytest.approx(0.15)
    assert pairs_of(group(one, other, maps=(CUE, less)), (one, other), Rules(margin=0.2)) == ([], ranking.DISAGREE)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([answer("0100")], ranking.ALONE),
        ([answer("1111"), answer("0000", 1.0)], ranking.UNGROUNDED),
        ([answer("0100", 0.5, 2), answer("1000", 0.5, 2)], ranking.UNGROUNDED),
        ([answer("1000"), answer("0010")], ranking.CHANCE),
        ([answer("0010"), answer("0000", 1.0)], ranking.CHANCE),  # less bad by 0.3, and still no reason
        ([answer("0100"), answer("0100", tokens=11)], ranking.CLOSE),
        ([answer("0100", tokens=10), answer("1000", tokens=16)], ranking.UNEVEN),
        ([answer("0100"), answer("0000", quotes=0)], ranking.CLOSE),  # silence is not rejected for being silent
    ],
)
def test_posts_without_a_pair_say_why(answers, reason):
    assert pairs_of(group(*answers), answers, Rules()) == ([], reason)


def test_a_post_whose_maps_may_not_speak_has_no_pair():
    given = [answer("0100"), answer("1000")]
    silent = Group("post", tuple(given), ((), ()), LENGTHS)
    assert pairs_of(silent, given, Rules()) == ([], ranking.SHUT)


def test_every_pair_of_a_post_rejects_another_answer():
    given = [answer("0100"), answer("1000"), answer("0010"), answer("0001"), answer("1100")]
    found, _ = pairs_of(group(*given), given, Rules(per_post=3))
    assert [(pair.chosen, pair.rejected) for pair in found] == [(0, 3), (0, 1), (0, 2)]
    assert len(pairs_of(group(*given), given, Rules(per_post=1))[0]) == 1


def test_an_answer_that_quotes_the_post_is_rejected_before_one_that_invents():
    """Though the invention has the wider margin."""
    given = [answer("0100"), answer("0000", 1.0), answer("1000")]
    found, _ = pairs_of(group(*given), given, Rules())
    assert [pair.rejected for pair in found] == [2, 1] and found[0].margin < found[1].margin
    (first,), _ = pairs_of(group(*given), given, Rules(per_post=1))
    assert first.rejected == 2


def test_the_likeliest_answer_is_rejected_first_and_chosen_of_equals():
    often, seldom, late = (dataclasses.replace(answer("0100"), drawn=n) for n in (3, 1, 9))
    given = [seldom, answer("1000"), often, dataclasses.replace(answer("0000", 1.0), drawn=5),
             dataclasses.replace(late, whole=False)]  # fmt: skip
    found, _ = pairs_of(group(*given), given, Rules())
    assert [(pair.chosen, pair.rejected) for pair in found] == [(2, 3), (2, 1)]


def test_an_answer_without_an_end_is_not_chosen():
    cut = dataclasses.replace(answer("0100"), whole=False)
    assert pairs_of(group(cut, answer("1000")), (cut, answer("1000")), Rules()) == ([], ranking.CHANCE)


def test_an_answer_that_quotes_with_other_letters_is_not_chosen():
    near = dataclasses.replace(answer("0100"), inexact=True)
    assert pairs_of(group(near, answer("1000")), (near, answer("1000")), Rules())[0] == []
    given = [near, answer("0100"), answer("1000")]
    assert {pair.chosen for pair in pairs_of(group(*given), given, Rules())[0]} == {1}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"by": "saliency"}, "choose from both, gradient, erasure"),
        ({"margin": 0.0}, "above 0"),
        ({"margin": float("nan")}, "above 0"),
        ({"length_ratio": 0.5}, "from 1 on"),
        ({"per_post": 0}, "at least 1"),
    ],
)
def test_rules_that_are_none(given, says):
    with pytest.raises(ProbeInputError, match=says):
        Rules(**given)


# ---- on a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """A model whose cue decides, and answers that quote the cue, another clause, nothing of the post, or all of it."""
    probe = train_planted(steps=80)
    tokenizer = probe.tokenizer
    rows = []
    for index, row in enumerate(planted_rows(tokenizer, 6, seed=5)):
        (a, b) = row["cues"][0]
        others = [part for part in row["post"].rstrip("。").split("，") if part != row["post"][a:b]]
        for number, quoted in enumerate((row["post"][a:b], others[0], others[1], "从来没有说过的话")):
            made = make_row(tokenizer, index, "zh", row["post"], quoted, row["label"], cues=None)
            rows.append(made | {"id": f"{row['id']}#{number}", "sample": number})
    return SimpleNamespace(probe=probe, rows=rows)


def written(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def ranked(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranked") / "pairs.jsonl"
    return SimpleNamespace(found=rank(world.probe, world.rows, out), pairs=written(out), out=out)


def test_the_cue_is_chosen(world, ranked):
    pairs, found = ranked.pairs, ranked.found
    by_id = {row["id"]: row for row in world.rows}
    assert found["pairs"] == len(pairs) >= 3 * found["posts_with_pairs"] - 2 and found["posts_with_pairs"] >= 4
    for pair in pairs:
        chosen, rejected = (by_id[name] for name in pair["id"].split(" > "))
        assert chosen["sample"] == 0 and rejected["sample"] != 0
        assert (pair["prompt_ids"], pair["chosen_ids"]) == (chosen["prompt_ids"], chosen["output_ids"])
        assert pair["rejected_ids"] == rejected["output_ids"]
        assert pair["margin"] == min(a - b for a, b in pair["scores"].values()) >= 0.2
        assert sum(pair["cited"]["chosen"]) == 1 and len(pair["cited"]["chosen"]) == len(pair["cited"]["rejected"])
        assert set(pair) == {"id", "task", "prompt_ids", "chosen_ids", "rejected_ids", "scores", "margin", "cited"}
    assert ranked.out.stat().st_mode & 0o77 == 0
    assert found["posts"] == 6 and sum(found["no_pair"].values()) == 6 - found["posts_with_pairs"]
    assert not ranked.out.with_name("pairs.jsonl.maps").exists()


def test_citations_at_random_make_fewer_and_narrower_pairs(ranked):
    null = ranked.found["null"]
    assert null["pairs"] < 0.8 * ranked.found["pairs"]
    assert null["margin"] < ranked.found["margin"]


def test_the_null_moves_the_answers_of_a_post_together():
    """Two that cite the same clause, or one beside the other, still do: apart they would differ by chance."""
    one, same, beside = answer("0100"), answer("0100", tokens=11), answer("0010")
    seen = set()
    for draw in range(40):
        a, b, c = ranking._moved(group(one, same, beside), np.random.default_rng(draw))
        np.testing.assert_array_equal(a.cited, b.cited)
        np.testing.assert_array_equal(np.roll(a.cited, 1), c.cited)
        seen.add(int(np.flatnonzero(a.cited)[0]))
    assert seen == {0, 1, 2, 3}


@pytest.mark.slow
def test_two_processes_rank_as_one_does(world, ranked, tmp_path, monkeypatch):
    from probes.saliency import attribute

    model, data, made, real = tmp_path / "model", tmp_path / "rows.jsonl", [], attribute.attribute
    world.probe.model.save_pretrained(model)
    world.probe.tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in world.rows), "utf-8")
    monkeypatch.setattr(attribute, "attribute", lambda *given: (made.append(given[1].post), real(*given))[1])
    out = tmp_path / "pairs.jsonl"
    cli.main(["rank", str(model), "--in", str(data), "--out", str(out), "--device", "cpu", "--processes", "2"])
    posts = list(dict.fromkeys(row["post"] for row in world.rows))
    assert set(made) == set(posts[::2])  # the maps of the others were made by the other process
    assert written(out) == ranked.pairs and not out.with_name("pairs.jsonl.maps").exists()


@pytest.mark.parametrize("rests", [False, True])
def test_pairs_that_chance_makes_too_are_said_to_be_none(rests):
    """Which of two clauses is cited, and which of them the label rests on, may have nothing to do with each other."""
    rng, rules, found = np.random.default_rng(0), Rules(), []
    for post in range(40):
        given = [dataclasses.replace(answer(cited), row={"prompt_ids": [post]}) for cited in ("0100", "1000")]
        mass = CUE if rests else np.roll(CUE, int(rng.integers(4)))
        one = dataclasses.replace(group(*given, maps=(mass, mass)), post=str(post))
        found.append((one, *pairs_of(one, given, rules)))
    summary = ranking._summary(found, rules, 0)
    assert summary["pairs"] > 10 and (summary["null"]["p"] <= ranking.LEVEL) == rests
    assert ("NO MORE THAN BY CHANCE" in ranking.told(summary)) != rests


def test_maps_are_kept_and_used_again(world, ranked, tmp_path, monkeypatch):
    from probes.saliency import attribute

    maps, seen = tmp_path / "maps", []
    made = attribute.attribute
    monkeypatch.setattr(attribute, "attribute", lambda *given: (seen.append(given[2]), made(*given))[1])
    rank(world.probe, world.rows, tmp_path / "one.jsonl", Rules(by="gradient"), maps)
    assert seen == [("ig",)] * 6  # once per post and label, whatever the number of answers
    rank(world.probe, world.rows, tmp_path / "both.jsonl", Rules(), maps)
    assert sorted(seen) == sorted([("ig",), ("erase",), ("erase_resample",)] * 6)
    assert written(tmp_path / "both.jsonl") == ranked.pairs
    rank(world.probe, world.rows, tmp_path / "again.jsonl", Rules(), maps)
    assert len(seen) == 18
    kept = sorted((maps / "cache").glob("*.json"))
    kept[0].write_text("{}")
    with pytest.warns(UserWarning, match="made again"):
        rank(world.probe, world.rows, tmp_path / "again.jsonl", Rules(), maps)
    assert len(seen) == 19 and written(tmp_path / "again.jsonl") == ranked.pairs


def test_maps_are_kept_by_how_the_model_is_called(world, ranked, tmp_path, monkeypatch):
    from probes.saliency import attribute

    maps, seen = tmp_path / "maps", []
    made = attribute.attribute
    monkeypatch.setattr(attribute, "attribute", lambda *given: (seen.append(given[2]), made(*given))[1])
    rank(world.probe, world.rows, tmp_path / "one.jsonl", Rules(by="erasure"), maps)
    assert len(seen) == 12
    before = world.probe.scorer.can
    monkeypatch.setattr(world.probe.scorer, "can", dataclasses.replace(before, packs=not before.packs))
    rank(world.probe, world.rows, tmp_path / "one.jsonl", Rules(by="erasure"), maps)
    assert len(seen) == 24
    monkeypatch.setattr(world.probe.scorer, "can", before)
    rank(world.probe, world.rows, tmp_path / "one.jsonl", Rules(by="erasure"), maps)
    assert len(seen) == 24


def test_an_interrupted_ranking_goes_on(world, ranked, tmp_path, monkeypatch):
    def stop(done: float, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "pairs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rank(world.probe, world.rows, out, progress=stop)
    assert not out.exists() and len(list((tmp_path / "pairs.jsonl.maps" / "cache").iterdir())) == 9
    rank(world.probe, world.rows, out)
    assert written(out) == ranked.pairs and [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_where_there_is_no_pair_nothing_is_written(world, tmp_path):
    rows = [row for row in world.rows if row["sample"] == 1]
    before = '{"id": "a > b", "task": "", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}\n'
    (tmp_path / "pairs.jsonl").write_text(before)
    with pytest.raises(ProbeError, match=r"no pair: of 6 posts 6 one answer with this label; sample more"):
        rank(world.probe, rows, tmp_path / "pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_text() == before


def test_the_command(world, ranked, tmp_path, capsys):
    world.probe.model.save_pretrained(tmp_path / "model")
    world.probe.tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps(row, ensure_ascii=False) for row in world.rows]
    lost = world.rows[0] | {"id": "lost", "post": "not in the prompt"}
    (tmp_path / "candidates.jsonl").write_text("\n".join([*lines, json.dumps(lost)]) + "\n", "utf-8")
    command = ["rank", str(tmp_path / "model"), "--in", str(tmp_path / "candidates.jsonl"), "--out",
               str(tmp_path / "pairs.jsonl")]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 3 and found["skipped_by_reason"] == {"the post is not in the prompt": 1}
    assert found["pairs"] == ranked.found["pairs"] and found["margin"] == pytest.approx(ranked.found["margin"])
    with pytest.raises(SystemExit):
        cli.main(command)
    said = capsys.readouterr().out
    assert "with citations at random" in said and world.rows[0]["post"][:6] not in said


@pytest.mark.parametrize(
    ("row", "whole", "drawn"), [({"finish": "length", "drawn": 3}, False, 3), ({"finish": "stop"}, True, 1)]
)
def test_a_row_says_whether_it_came_to_its_end_and_how_often(row: dict[str, Any], whole: bool, drawn: int) -> None:
    encode = (probe := closed_form_probe({"x": [1.0, 0.0]}, lambda seen: seen.sum(-1))).token_bytes.encode
    given = {"id": "a#1", "post": "x", "prompt_ids": encode("p x ?"), "output_ids": encode("A"), "label_text": "A"}
    example = probe.encode(given | {"candidates": {"a": "A", "b": "B"}})
    found = ranking._Said(example, (), ((0, 1),), 0.0, 1, False).answer({"a#1": row}, [(0, 1)])
    assert (found.whole, found.drawn, list(found.ids)) == (whole, drawn, given["output_ids"])
