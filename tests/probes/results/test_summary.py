"""The data-set numbers: conclusions on known worlds, the position habit, and pairs of runs."""

import dataclasses
import json

import numpy as np
import pytest

from probes.checks.mismatched import transfer_citation, transfer_map
from probes.results.summary import VERDICTS, compare, summarise
from probes.terminal import print_comparison
from tests.probes.worlds import post_result

N = 18


@pytest.fixture(scope="module")
def faithful():
    return [post_result(s, k=4 + s % 4, true=(s % 4,), cite=(s % 4,), language=("zh", "en")[s % 2]) for s in range(N)]


@pytest.fixture(scope="module")
def unfaithful():
    return [
        post_result(s, k=4 + s % 4, true=(s % 4,), cite=((s + 1) % 4,), language=("zh", "en")[s % 2]) for s in range(N)
    ]


@pytest.fixture(scope="module")
def at_random():
    return [post_result(s, true=(s % 6,), cite=((s // 6 + s) % 6,)) for s in range(N)]


def test_keys_and_json(faithful):
    summary = summarise(faithful, n_boot=200, draws=199)
    names = "n cue_auroc cue_auroc_ci mass_ratio mass_ratio_null p completeness_delta fabricated_quote_rate abstained"
    assert {*names.split(), "verdicts"} <= set(summary)
    assert set(summary["completeness_delta"]) == {"mean", "max", "converged"}
    assert set(summary["verdicts"]) == set(VERDICTS)
    assert list(summary["mass_ratio"]) == ["ig", "erase", "gradnorm"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summarise(faithful, n_boot=200, draws=199) == summary  # deterministic


def test_faithful_world(faithful):
    summary = summarise(faithful)
    assert summary["conclusion"] == "supported"
    assert summary["verdicts"]["supported"] >= N - 2
    assert summary["verdicts_by_chance"]["supported"] < N / 4
    for method in ("ig", "erase"):
        assert summary["p"][method] <= 0.001 and summary["p_holm"][method] <= 0.002
        assert summary["p_position"][method] <= 0.01
        low, high = summary["mass_ratio_ci"][method]
        assert summary["mass_ratio_null"][method] < 0.25 < low <= summary["mass_ratio"][method] <= high
        assert summary["cue_auroc"][method] >= 0.99
        assert summary["cosine"][method] > 0.9 > 0.6 > summary["cosine_mismatched"][method]
        assert summary["cosine_p"][method] <= 0.01
    assert "gradnorm" not in summary["p_holm"]


def test_unfaithful_world(unfaithful):
    few = summarise(unfaithful)  # each post misses with 3 to 6 of its 4 to 7 clauses: 18 misses are no proof yet
    assert few["conclusion"] == "inconclusive" and max(ci[1] for ci in few["excess_ci"].values()) < 0
    more = [post_result(s, k=4 + s % 4, true=(s % 4,), cite=((s + 1) % 4,), name=f"again{s}") for s in range(N)]
    summary = summarise([*unfaithful, *more])
    assert summary["conclusion"] == "contradicted"
    assert summary["verdicts"]["supported"] == 0 and summary["verdicts"]["contradicted"] >= N
    for method in ("ig", "erase"):
        assert summary["p_holm"][method] <= 0.05 and summary["excess_ci"][method][1] < 0
        assert summary["cosine_p"][method] > 0.3
        assert summary["cue_auroc"][method] >= 0.99  # the saliency is right, the explanation is not


def test_random_citations_are_inconclusive(at_random):
    summary = summarise(at_random)
    assert summary["conclusion"] == "inconclusive"
    assert all(summary["p"][m] > 0.05 for m in ("ig", "erase"))
    got, chance = summary["verdicts"]["supported"], summary["verdicts_by_chance"]["supported"]
    assert abs(got - chance) <= 4


def test_a_shared_habit_of_position_is_told_apart():
    """Model and explanation both always point at the last clause: agreement, but not more than the habit explains."""
    results = [post_result(s, k=6, true=(5,), cite=(5,), noise=0.02) for s in range(N)]
    summary = summarise(results)
    assert summary["p"]["ig"] <= 0.001
    assert summary["p_position"]["ig"] > 0.05 and summary["cosine_p"]["erase"] > 0.05


def test_only_maps_that_may_speak_count(faithful):
    mixed = [*faithful[:12], *(post_result(100 + s, cite=(3,), converged=False) for s in range(6))]
    summary = summarise(mixed)
    assert summary["n_used"] == {"ig": 12, "erase": 18, "gradnorm": 18}
    assert summary["completeness_delta"]["converged"] == pytest.approx(12 / 18)
    assert summary["mass_ratio"]["ig"] > 0.8 > summary["mass_ratio"]["erase"]


def test_a_post_of_many_clauses_alone_is_no_test():
    """Of one with sixty, cited where its saliency is, p was 0.03, and the page called the hypothesis held."""
    for posts in (1, 4):
        summary = summarise([post_result(seed, k=60) for seed in range(posts)], n_boot=20)
        assert set(summary["p"].values()) == set(summary["p_position"].values()) == {None}
        assert not [test for test in summary["tests"] if test["p"] is not None or test["p_holm"] is not None]
    assert summarise([post_result(seed, k=60) for seed in range(5)], n_boot=20)["p"]["ig"] < 0.05


def test_few_posts_and_nothing_cited():
    one = summarise([post_result(0)])
    assert one["conclusion"] == "inconclusive" and one["mass_ratio_ci"]["ig"] is None
    silent = summarise([post_result(s, cite=(), invent=True) for s in range(6)])
    assert silent["abstained"] == 6 and silent["fabricated_quote_rate"] == 1.0
    assert silent["mass_ratio"]["ig"] is None and silent["p"]["ig"] is None and silent["cue_auroc"]["ig"] == 1.0
    assert summarise([])["n"] == 0
    json.dumps([one, silent, summarise([])], allow_nan=False)


def test_breakdown_by_label(faithful):
    more = [*faithful, *(post_result(200 + s, label="low", cite=(4,)) for s in range(5))]
    rows = {row["label"]: row for row in summarise(more, n_boot=0, draws=99)["by_label"]}
    assert rows["high"]["n"] == N and rows["low"]["n"] == 5
    assert rows["low"]["mass_ratio"]["ig"] < 0.2 < rows["high"]["mass_ratio"]["ig"]


def test_transfer_keeps_the_place_and_what_a_map_is_made_of():
    rng = np.random.default_rng(0)
    for k in range(1, 9):
        values, cited = rng.normal(size=k), np.arange(k) == rng.integers(k)
        np.testing.assert_array_equal(transfer_map(values, k), values)
        np.testing.assert_array_equal(transfer_citation(cited, k), cited)
        for m in range(1, 9):
            assert set(transfer_map(values, m)) <= set(values)  # no clause without a value, no sums
            assert transfer_citation(cited, m).sum() == 1
    assert transfer_map(np.array([1.0, 2, 3, 4]), 6).tolist() == [1, 2, 2, 3, 4, 4]
    assert transfer_citation(np.array([0, 0, 0, 1], bool), 6).tolist() == [0, 0, 0, 0, 0, 1]
    assert transfer_citation(np.array([1, 0, 0, 0, 0, 0], bool), 4).tolist() == [1, 0, 0, 0]


def test_one_author_is_one_pair(faithful, unfaithful):
    """The interval of a comparison does not get narrower by asking one author again and again."""
    alone = compare(faithful, unfaithful)["by_check"]["mass_ratio"]["ig"]
    users = [[dataclasses.replace(r, user=f"u{i % 3}") for i, r in enumerate(side)] for side in (faithful, unfaithful)]
    known = compare(*users)["by_check"]["mass_ratio"]["ig"]
    assert known["value"] == alone["value"] == 1.0 and known["n"] == alone["n"]
    assert known["ci"][0] < 0.5 < 0.8 < alone["ci"][0]


def test_paired_diagnosticity(faithful, unfaithful):
    found = compare(faithful, unfaithful[:-1])
    assert found["diagnosticity"] == 1.0 and found["n_pairs"] == N - 1 and found["unpaired"] == 1
    assert found["by_check"]["mass_ratio"]["erase"]["ci"][0] > 0.8
    assert found["by_check"]["cosine"]["ig"]["value"] == 1.0
    assert compare(unfaithful, faithful)["diagnosticity"] == 0.0
    assert compare(faithful, faithful)["diagnosticity"] == 0.5
    nothing = compare(faithful[:3], [post_result(s, name=f"other{s}") for s in range(3)])
    assert nothing["diagnosticity"] is None and nothing["unpaired"] == 6


def test_a_comparison_says_where_one_run_cut_and_the_other_hid(faithful, unfaithful, capsys):
    def erased(results, how):
        return [
            dataclasses.replace(r, attributions=tuple(dataclasses.replace(a, baseline=how) if a.method == "erase" else a
                                                      for a in r.attributions)) for r in results
        ]  # fmt: skip

    hid, cut = erased(faithful[:5], "attention"), erased(unfaithful[:5], "cut")
    line = (
        "erase: the {} run has erased tokens cut out of the sequence, the {} has them hidden from attention; such maps"
    )
    for pair, runs in (((cut, hid), ("first", "second")), ((hid, cut), ("second", "first"))):
        assert compare(*pair)["erased_otherwise"].startswith(line.format(*runs))
    print_comparison(compare(cut, hid))
    assert line.format("first", "second") in " ".join(capsys.readouterr().out.split())
    print_comparison(compare(cut, cut))
    assert "cut out" not in capsys.readouterr().out
    assert compare(cut, cut)["erased_otherwise"] is None and compare(hid, hid)["erased_otherwise"] is None
    assert compare(cut, erased(faithful[:5], "neutral"))["erased_otherwise"] is None  # that has a name of its own
