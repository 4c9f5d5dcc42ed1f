"""Necessity and sufficiency of cited spans, on a model whose answer is a sum."""

import dataclasses

import numpy as np
import pytest

from probes.checks.crosscheck import _missing_text
from probes.checks.faithfulness import _moved, cited_effects
from probes.checks.gates import _with_post
from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import Check, Example
from probes.validation.error_rates import erasure_rates
from probes.validation.selftest import closed_form_probe

POST = "a, bcd, ex, gh, ij, kl, y, mno, pq, r, st"  # x and y count for the label, the rest does not


@pytest.fixture(scope="module")
def probe() -> Probe:
    return closed_form_probe({"x": [2.0], "y": [3.0]}, lambda seen: seen[..., 0])


def encoded(probe: Probe, post: str) -> Example:
    ids = probe.token_bytes.encode
    row = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
    return probe.encode(row | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})


def test_values_are_the_drop_and_what_is_left(probe: Probe) -> None:
    example = encoded(probe, POST)
    at = POST.index("x")
    necessity, sufficiency = cited_effects(probe, example, [(at, at + 1)])
    assert necessity.value == pytest.approx(2.0, abs=1e-5)
    assert sufficiency.value == pytest.approx(-3.0, abs=1e-5)
    both = cited_effects(probe, example, [(at, at + 1), (POST.index("y"), POST.index("y") + 1)])
    assert both[0].value == pytest.approx(5.0, abs=1e-5) and both[1].value == pytest.approx(0.0, abs=1e-5)


def test_null_is_the_citation_moved_by_clauses(probe: Probe) -> None:
    """One clause over all 10 others: one of them is y, worth more than x; two find only themselves."""
    example = encoded(probe, POST)
    at, other = POST.index("x"), POST.index("y")
    for span in ((at, at + 1), (at - 1, at + 1), (at - 1, at + 2)):  # the half that counts; the whole; with its comma
        one, _ = cited_effects(probe, example, [span], n_null=20)
        assert one.value == pytest.approx(2.0, abs=1e-5)
        assert one.n == 10 and one.p == pytest.approx(2 / 11) and one.null_mean == pytest.approx(3 / 10, abs=1e-5)
    two, enough = cited_effects(probe, example, [(at, at + 1), (other, other + 1)], n_null=20)
    assert two.p == enough.p == pytest.approx(1 / 11)
    nothing, _ = cited_effects(probe, example, [(0, 1)], n_null=20)
    assert nothing.value == pytest.approx(0.0, abs=1e-5) and nothing.p is not None and nothing.p > 0.9
    assert cited_effects(probe, example, [(at, at + 1)], n_null=4)[0].n == 4


def test_a_part_of_a_clause_is_moved_to_that_part() -> None:
    cited = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0], bool)  # the second half of the first of three clauses
    places = [np.array([0, 1, 2, 3]), np.array([5, 6]), np.array([8])]  # 4 and 7 are commas
    assert np.flatnonzero(_moved(cited, places, 1)).tolist() == [6]
    assert np.flatnonzero(_moved(cited, places, 2)).tolist() == [8]
    np.testing.assert_array_equal(_moved(cited, places, 3), cited)


def test_without_clauses_there_is_a_value_and_no_null(probe: Probe) -> None:
    necessity, sufficiency = cited_effects(probe, encoded(probe, "abxcdefghy"), [(2, 3)])
    assert necessity.value == pytest.approx(2.0, abs=1e-5) and sufficiency.value == pytest.approx(-3.0, abs=1e-5)
    assert necessity.p is None and necessity.null_mean is None and not necessity.draws


def test_abstains_where_there_is_nothing_to_compare(probe: Probe) -> None:
    example = encoded(probe, POST)
    for spans in ([], [(0, len(POST))]):
        for check in cited_effects(probe, example, spans):
            assert (check.status, check.value, check.p, check.n) == ("abstain", None, None, 0)
    assert cited_effects(probe, encoded(probe, "xyz, ab"), [(3, 4)])[0].status == "abstain"  # only a comma


def test_span_outside_the_post(probe: Probe) -> None:
    with pytest.raises(ProbeInputError, match=f"outside the post of {len(POST)}"):
        cited_effects(probe, encoded(probe, POST), [(len(POST) - 1, len(POST) + 1)])


@pytest.mark.heavy
def test_p_values_are_valid_for_whole_clauses_at_random() -> None:
    """Clauses of many lengths, alone and in data sets, where shifts by tokens reject two to ten times too often."""
    rates = erasure_rates(100, 20)
    assert {name: n for name, (_, n) in rates.items()} == {
        "necessity": 100, "sufficiency": 100, "necessity, sets": 20, "sufficiency, sets": 20
    }  # fmt: skip
    assert max(rate for rate, _ in rates.values()) <= 0.1


@pytest.mark.parametrize(
    ("value", "other", "noted"), [(3.0, 2.5, True), (-3.0, -2.5, True), (-0.5, 0.6, False), (3.0, 1.0, False)]
)
def test_as_many_other_words_explain_only_what_has_their_sign(value: float, other: float, noted: bool) -> None:
    check = Check("necessity", "erase", value, other, None, None, 0.3, None, 20, "ok", ())
    assert bool(_missing_text([check])) == noted


@pytest.mark.parametrize("cut", ["word", "clause", None])
def test_an_edited_post_is_cut_as_it_was(probe: Probe, cut: str | None) -> None:
    example = dataclasses.replace(encoded(probe, POST), cut=cut)
    edited = _with_post(probe, example, POST.replace(",", ";"))
    assert edited is not None and edited.post == POST.replace(",", ";") and edited.cut == cut
