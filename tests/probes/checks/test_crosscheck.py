"""Checks and verdicts on posts whose truth is known, and on posts where nothing is true."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from probes.checks import agreement
from probes.checks.crosscheck import char_mask, cross_check, unit_sums, units_hit
from probes.checks.verdict import FAMILIES, gate
from probes.errors import ProbeInputError
from probes.records import Citation, Example
from probes.results.posts import PostResult
from tests.probes.worlds import attribution, clause_map, post_result

JUDGES = ("ig", "erase")


def verdict(result: PostResult) -> str:
    return result.evidence().report.verdict


def check(result: PostResult, name: str, method: str) -> Any:
    (found,) = [c for c in result.evidence().report.checks if c.name == name and c.method == method]
    return found


def with_maps(result: PostResult, **changes: np.ndarray | None) -> PostResult:
    """The result with the label map of a method replaced (by clause weights) or taken out (None)."""
    maps = []
    for a in result.attributions:
        if a.target == "label" and a.method in changes:
            weights = changes[a.method]
            if weights is None:
                continue
            units = result.units if a.unit == "clause" else None
            a = attribution(a.method, "label", clause_map(weights, result.units), units, example_id=result.id)
        maps.append(a)
    return dataclasses.replace(result, attributions=tuple(maps))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_known_truths(language):
    faithful = [verdict(post_result(s, true=(1,), cite=(1,), language=language)) for s in range(12)]
    decoy = [verdict(post_result(s, true=(1,), cite=(3,), language=language)) for s in range(12)]
    assert faithful.count("supported") >= 11
    assert decoy.count("contradicted") >= 9 and "supported" not in decoy
    both = [verdict(post_result(s, true=(1, 4), cite=(1, 4), k=8, language=language)) for s in range(12)]
    assert both.count("supported") >= 10


def test_noise_maps_seldom_get_a_verdict():
    noise = [verdict(post_result(s, true=(), noise=0.3, methods=JUDGES)) for s in range(80)]
    assert noise.count("supported") <= 5 and noise.count("contradicted") <= 8


def test_random_citations_earn_as_many_verdicts_as_coincidence_says():
    """The calibration of the number printed beside every verdict."""
    rng = np.random.default_rng(1)
    results = [post_result(s, true=(1,), cite=(int(rng.integers(6)),), methods=JUDGES) for s in range(90)]
    evidence = [r.evidence() for r in results]
    got = sum(e.report.verdict == "supported" for e in evidence)
    expected = sum(e.chance["supported"] for e in evidence)
    assert 12 <= expected <= 18
    assert abs(got - expected) <= 3 * np.sqrt(90 * (1 / 6) * (5 / 6))


def test_what_coincidence_forbids_is_not_counted_as_earned():
    """Where more than a quarter of the places would agree, no citation is supported, so none is by chance either."""
    result = post_result(2, k=4, true=(0, 1, 2), cite=(0, 1), noise=0.001)
    chance = result.evidence().chance
    assert result.evidence().report.verdict != "supported"
    assert (chance["supported"] == 0.0) == (chance["coincidence"] > 0.25)


def test_coincidence_is_the_share_of_places_that_would_agree():
    result = post_result(2, noise=0.001)
    assert check(result, "coincidence", "ig+erase").value == pytest.approx(1 / 6)
    assert check(result, "coincidence", "ig+erase").n == 6
    wanted = {"supported": 1 / 6, "contradicted": 5 / 6, "coincidence": 1 / 6}
    assert result.evidence().chance == pytest.approx(wanted)
    two = check(post_result(2, k=8, true=(1, 4), cite=(1, 4), noise=0.001), "coincidence", "ig+erase")
    assert two.n == 28  # 8 choose 2 places for two clauses


def test_too_few_clauses_can_not_be_supported():
    report = post_result(1, k=3, noise=0.001).evidence().report
    assert report.verdict == "inconclusive"
    assert any("would have agreed as well" in note for note in report.notes)


def test_two_families_are_needed():
    result = post_result(4)
    assert verdict(result) == "supported"
    assert verdict(with_maps(result, erase=None)) == "inconclusive"
    assert verdict(with_maps(result, ig=None)) == "inconclusive"  # erase and gradnorm left
    assert verdict(post_result(4, methods=("erase", "gradnorm"))) == "inconclusive"


def test_both_families_have_to_agree():
    result = post_result(4)
    other = np.array([0.0, 0, 0, 0, 5, 0])
    assert verdict(with_maps(result, erase=other)) == "inconclusive"
    assert verdict(with_maps(result, ig=other)) == "inconclusive"
    assert verdict(with_maps(result, ig=other, erase=other)) == "contradicted"


def test_agreeing_on_the_top_clause_only_contradicts_nothing():
    result = post_result(4, cite=(0,), noise=0.0)
    ig, erase = np.array([0.0, 0, 3, 2.9, 0, 0]), np.array([0.0, 2.9, 3, 0, 2.9, 0])
    assert verdict(with_maps(result, ig=ig, erase=erase)) == "inconclusive"
    assert verdict(with_maps(result, ig=ig, erase=ig)) == "contradicted"


def test_an_inconclusive_verdict_says_why_first():
    other = np.array([0.0, 0, 0, 0, 5, 0])
    split = with_maps(post_result(4, noise=0.0), erase=other).evidence().report
    assert (
        split.notes[0] == "of the label's saliency 100% (integrated gradients) and 0% (erasure) is in the cited clauses"
    )
    blocked = post_result(6, converged=False).evidence().report
    assert blocked.notes[0] == "integrated gradients: the completeness error did not converge"


def test_screening_method_never_changes_a_verdict():
    rng = np.random.default_rng(0)
    for cite in (1, 3):
        result = post_result(5, cite=(cite,))
        for _ in range(5):
            assert verdict(with_maps(result, gradnorm=rng.gamma(0.3, size=6))) == verdict(result)
    assert "gradnorm" not in FAMILIES


def test_unconverged_ig_may_not_speak():
    result = post_result(6, converged=False)
    maps = {a.method: a for a in result.attributions if a.target == "label"}
    assert gate(maps["ig"]) == "the completeness error did not converge"
    assert verdict(result) == "inconclusive"
    assert check(result, "mass_ratio", "ig").status == "failed_gate"
    assert check(result, "cue_auroc", "ig").status == "failed_gate"
    assert check(result, "mass_ratio", "ig").value is not None  # shown, but it does not count
    assert "ig" not in result.evidence().excess


def test_a_post_that_does_not_matter_gets_no_verdict():
    result = post_result(6)
    tiny = np.array([0.0, 0.02, 0, 0, 0, 0])
    silent = with_maps(result, ig=tiny, erase=tiny)
    assert verdict(silent) == "inconclusive"
    assert any("less than 0.1 nats" in note for note in silent.evidence().report.notes)


def test_nan_maps_are_gated_and_never_reach_a_number():
    report = with_maps(post_result(6), ig=np.full(6, np.nan)).evidence().report
    assert report.verdict == "inconclusive"
    assert all(c.value is None or np.isfinite(c.value) for c in report.checks)


def test_nothing_cited_abstains():
    result = dataclasses.replace(post_result(7), citations=())
    evidence = result.evidence()
    assert evidence.report.verdict == "inconclusive" and evidence.excess == {} and evidence.chance == {}
    assert check(result, "mass_ratio", "ig") == check(result, "mass_ratio", "ig")
    assert check(result, "mass_ratio", "ig").status == "abstain"
    assert check(result, "fabricated_quote_rate", "align").status == "abstain"
    assert "the explanation cites nothing that is in the post" in evidence.report.notes


def test_invented_quotes_are_counted():
    result = post_result(8, invent=True)
    found = check(result, "fabricated_quote_rate", "align")
    assert found.value == 0.5 and found.n == 2
    assert "1 of 2 quotes are not in the post" in result.evidence().report.notes


def test_citing_everything_is_no_support():
    report = post_result(9, cite=range(6)).evidence().report
    assert report.verdict == "inconclusive"
    assert any("cites every clause" in note for note in report.notes)


def test_the_right_clause_but_the_wrong_words():
    """Saliency on the first half of the clause, citation of the second half."""
    result = post_result(10, k=8)
    a, b = result.units[1]
    middle = (a + b) // 2
    values = np.zeros(result.length)
    values[a:middle] = 1.0
    citation = dataclasses.replace(result.citations[0], post_char=((middle, b),))
    maps = tuple(
        attribution("ig", "label", values, example_id=result.id) if (m.method, m.target) == ("ig", "label") else m
        for m in result.attributions
    )
    wrong = dataclasses.replace(result, citations=(citation,), attributions=maps)
    assert wrong.evidence().report.verdict == "inconclusive"
    assert any("not in the cited words" in note for note in wrong.evidence().report.notes)
    right = dataclasses.replace(wrong, citations=(dataclasses.replace(citation, post_char=((a, middle),)),))
    assert right.evidence().report.verdict == "supported"


def test_nulls_are_honest_about_their_resolution():
    result = post_result(11)
    ig, erase = check(result, "mass_ratio", "ig"), check(result, "mass_ratio", "erase")
    assert ig.n == result.length and erase.n == 6  # a map on clauses has as many shifts as clauses
    assert erase.p == pytest.approx(1 / 6) and ig.p >= 1 / result.length
    mask = char_mask([s for c in result.citations for s in c.post_char], result.length)
    assert ig.null_mean == pytest.approx(mask.mean())
    assert ig.value > ig.null_q95 or ig.p > 0.05
    notes = " ".join(result.evidence().report.notes)
    assert "erasure: 6 shifts, so no p-value below 0.17" in notes and "integrated gradients: p = " in notes


def test_cue_and_decoy_auroc_are_on_clauses():
    result = dataclasses.replace(post_result(12), decoys=(post_result(12).units[3],))
    for method in ("ig", "erase", "gradnorm"):
        found = check(result, "cue_auroc", method)
        assert found.value == 1.0 and found.n == 6 and found.p == pytest.approx(1 / 6)
    assert check(result, "decoy_auroc", "ig").value < 0.9
    inside = dataclasses.replace(result, cues=((result.units[1][0] + 2, result.units[1][0] + 4),))
    assert check(inside, "cue_auroc", "erase").value == 1.0  # a cue inside a clause marks the clause
    assert not [c for c in dataclasses.replace(result, cues=None).evidence().report.checks if c.name == "cue_auroc"]


def test_label_and_explanation_maps_agree_or_not():
    same, other = post_result(13, cite=(1,)), post_result(13, cite=(4,))
    for method in ("ig", "erase"):
        assert check(same, "cosine", method).value > 0.9 > 0.3 > check(other, "cosine", method).value
        assert check(same, "pearson", method).value > 0.9 > 0.0 > check(other, "pearson", method).value
    assert check(same, "agreement", "ig~erase").value > 0.95


def test_verdict_ignores_scale_and_order():
    result = post_result(14)
    scaled = tuple(
        dataclasses.replace(a, values=a.values * 3, char_values=a.char_values * 3)
        for a in reversed(result.attributions)
    )
    assert verdict(dataclasses.replace(result, attributions=scaled)) == verdict(result) == "supported"


def test_units_hit_ignores_slivers():
    units = [(0, 10), (10, 20), (20, 30)]
    assert units_hit([(8, 19)], units).tolist() == [False, True, False]
    assert units_hit([(12, 14)], units).tolist() == [False, True, False]
    assert units_hit([(0, 30)], units).all() and not units_hit([], units).any()
    np.testing.assert_allclose(unit_sums(np.arange(30.0), units), [45, 145, 245])


def test_wrong_maps_and_nulls_are_refused():
    result = post_result(15)
    with pytest.raises(ProbeInputError, match="the post has"):
        dataclasses.replace(result, length=result.length + 1).evidence()
    with pytest.raises(ProbeInputError, match="got a map of 'p15'"):
        dataclasses.replace(result, id="other").evidence()
    with pytest.raises(ProbeInputError, match="not exchangeable"):
        result.evidence(null="token-shuffle")
    placed = result.evidence(null="placement", n_boot=99).report
    assert next(c for c in placed.checks if c.name == "mass_ratio" and c.method == "ig").n == 100
    assert placed.verdict == "supported"


def test_cross_check_takes_an_example():
    result = post_result(16)
    example = Example(
        id=result.id,
        task=result.task,
        post=result.post or "",
        ids=(1,),
        prompt_len=1,
        byte_spans=((0, 1),),
        char_bytes=(0, 1),
        segments=(),
        post_char=(0, result.length),
        text=result.post or "",
        label="high",
        label_text="",
        candidates={},
        explanation=result.explanation,
        cues=result.cues,
        decoys=None,
    )
    report = cross_check(list(result.attributions), list(result.citations), example)
    assert report == result.evidence().report
    no_erase = [a for a in result.attributions if a.method != "erase"]  # clauses are then cut anew
    assert cross_check(no_erase, list(result.citations), example).verdict == "inconclusive"
    none = cross_check([], [Citation("c1", (0, 2), (), "quote", 0.1, "")], example)
    assert [c.name for c in none.checks] == ["fabricated_quote_rate", "coverage"] and none.verdict == "inconclusive"


def test_what_people_marked_is_plausibility_and_decides_nothing():
    base = post_result(0, true=(1,), cite=(1,), noise=0.0)
    right, wrong = (dataclasses.replace(base, rationales=(base.units[i],)) for i in (1, 4))
    for method in ("ig", "erase"):
        assert check(right, "plausibility_mass", method).value == pytest.approx(1.0)
        assert check(right, "plausibility_auroc_clause", method).value == 1.0
        assert check(wrong, "plausibility_mass", method).value == pytest.approx(0.0, abs=1e-9)
    assert [check(r, "plausibility_citations", "align").value for r in (right, wrong)] == [1.0, 0.0]
    assert verdict(right) == verdict(wrong) == verdict(base)
    assert not [c for c in base.evidence().report.checks if c.name.startswith("plausibility")]


def test_iou_f1_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        k = int(rng.integers(2, 14))
        ends = np.cumsum(rng.integers(1, 9, k))
        units = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        values, cited = rng.normal(size=k), rng.random(k) < 0.4
        if not 0 < cited.sum() < k:
            assert np.isnan(agreement.iou_f1(values, cited, units))
            continue
        runs = []
        for mask in (agreement.top(values, int(cited.sum())), cited):
            parts = [list(group) for marked, group in itertools.groupby(range(k), mask.__getitem__) if marked]
            runs.append([set(range(units[part[0]][0], units[part[-1]][1])) for part in parts])
        match = [[len(p & c) / len(range(min(p | c), max(p | c) + 1)) >= 0.5 for c in runs[1]] for p in runs[0]]
        hit = sum(map(any, match)) / max(1, len(match))
        found = sum(map(any, zip(*match, strict=True))) / len(runs[1])
        wanted = 2 * hit * found / (hit + found) if hit + found else 0.0
        assert agreement.iou_f1(values, cited, units) == pytest.approx(wanted)
