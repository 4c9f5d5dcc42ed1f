"""Necessity and sufficiency of cited spans, on a model whose answer is a sum."""

import numpy as np
import pytest

from probes.errors import ProbeInputError
from probes.faithfulness import cited_effects
from probes.model import Example, Probe
from probes.selftest import closed_form_probe

POST = "abcdexghijklymnopqrst"  # x and y count for the label, the rest does not


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


def test_null_is_the_spans_moved_round_the_post(probe: Probe) -> None:
    """One letter over all 20 other places: one of them is y, worth more than x; two letters find only themselves."""
    example = encoded(probe, POST)
    at, other = POST.index("x"), POST.index("y")
    one, _ = cited_effects(probe, example, [(at, at + 1)], n_null=20)
    assert one.n == 20 and one.p == pytest.approx(2 / 21) and one.null_mean == pytest.approx(3 / 20, abs=1e-5)
    two, enough = cited_effects(probe, example, [(at, at + 1), (other, other + 1)], n_null=20)
    assert two.p == enough.p == pytest.approx(1 / 21)
    nothing, _ = cited_effects(probe, example, [(0, 1)], n_null=20)
    assert nothing.value == pytest.approx(0.0, abs=1e-5) and nothing.p is not None and nothing.p > 0.9


def test_abstains_where_there_is_nothing_to_compare(probe: Probe) -> None:
    example = encoded(probe, POST)
    for spans in ([], [(0, len(POST))]):
        for check in cited_effects(probe, example, spans):
            assert (check.status, check.value, check.p, check.n) == ("abstain", None, None, 0)
    assert cited_effects(probe, encoded(probe, "xyz"), [(0, 1)])[0].status == "abstain"


def test_span_outside_the_post(probe: Probe) -> None:
    with pytest.raises(ProbeInputError, match="outside the post of 21"):
        cited_effects(probe, encoded(probe, POST), [(20, 22)])


def test_p_values_are_valid_for_spans_put_anywhere() -> None:
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstu"
    probe = closed_form_probe({letter: [float(rng.normal())] for letter in letters}, lambda seen: seen[..., 0])
    values = []
    for _ in range(60):
        example = encoded(probe, "".join(rng.permutation(list(letters))))
        start = int(rng.integers(0, 18))
        check, _ = cited_effects(probe, example, [(start, start + 3)])
        assert check.p is not None
        values.append(check.p)
    # 20 shifts: the best of 21 places has p = 1/21; 60 draws stray from 5 % and 50 % by at most this
    assert np.mean(np.array(values) <= 0.05) <= 0.12
    assert 0.35 <= np.mean(np.array(values) <= 0.5) <= 0.65
