"""Statistics that survive a reviewer: exactness, error rates of data sets, coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.nulls import p_greater, rotations
from probes.stats import (
    auroc,
    average_precision,
    bootstrap_ci,
    density_ratio,
    diagnosticity,
    holm,
    mass_share,
    mean_test,
)
from tests.probes.test_nulls import VALUES, clause_world, with_mask


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(0, 1000))
def test_auroc_and_average_precision_with_ties(values, seed):
    mask = with_mask(values, seed)
    pos, neg = values[mask], values[~mask]
    if not len(pos) or not len(neg):
        assert math.isnan(auroc(values, mask))
    else:
        pairs = [(p > q) + 0.5 * (p == q) for p in pos for q in neg]
        assert auroc(values, mask) == pytest.approx(np.mean(pairs))
    if len(pos):
        area, recall = 0.0, 0.0
        for threshold in sorted(set(values), reverse=True):
            taken = values >= threshold
            step = (taken & mask).sum() / mask.sum()
            area += (step - recall) * (taken & mask).sum() / taken.sum()
            recall = step
        assert average_precision(values, mask) == pytest.approx(area)
    else:
        assert math.isnan(average_precision(values, mask))


def test_constant_scores_are_chance():
    mask = np.array([True, False, False, False])
    assert auroc(np.ones(4), mask) == 0.5
    assert average_precision(np.ones(4), mask) == 0.25
    assert mass_share(np.ones(4), mask) == 0.25
    assert density_ratio(0.25, 0.25) == pytest.approx(1.0)


def test_undefined_is_nan_never_a_number():
    mask = np.array([True, False])
    assert math.isnan(mass_share(np.array([-1.0, 0.0]), mask))
    assert math.isnan(mass_share(np.array([np.nan, 1.0]), mask))
    assert math.isnan(auroc(np.array([np.nan, 1.0]), mask))
    assert math.isnan(density_ratio(0.5, 1.0)) and math.isnan(density_ratio(0.5, 0.0))
    assert density_ratio(1.0, 0.2) == math.inf and density_ratio(0.0, 0.2) == 0.0
    assert math.isnan(p_greater(np.full(3, np.nan)))
    assert mean_test([np.array([np.nan, 1.0])]) is None


def test_type_one_error_of_the_data_set_test():
    rng = np.random.default_rng(2)
    p = []
    for i in range(1000):
        nulls = [rotations(*clause_world(rng)) for _ in range(12)]
        test = mean_test(nulls, draws=199, seed=i)
        assert test is not None
        p.append(test.p)
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.075


def test_data_set_test_finds_what_single_posts_can_not():
    rng = np.random.default_rng(8)
    nulls = []
    for _ in range(20):
        values, lengths, _ = clause_world(rng)
        nulls.append(rotations(values, lengths, np.arange(len(values)) == values.argmax()))
    test = mean_test(nulls)
    assert test is not None
    assert test.p == 1 / 10_000  # no draw reaches it; a Monte-Carlo p is never 0
    assert test.value > test.null_q95 and test.null_mean == pytest.approx(0, abs=1e-9)
    assert all(p_greater(null) > 0.05 for null in nulls)


def test_bca_equals_scipy():
    """At the level that Student's quantile stands for."""
    from scipy.stats import bootstrap, norm, t

    data = np.random.default_rng(4).gamma(0.8, size=40)
    ours = bootstrap_ci(data, n_boot=20_000, seed=1)
    level = 2 * norm.cdf(t.ppf(0.975, 39) * np.sqrt(40 / 39)) - 1
    theirs = bootstrap(
        (data,), np.mean, n_resamples=20_000, method="BCa", confidence_level=level, rng=np.random.default_rng(9)
    )
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    plain = np.quantile(np.random.default_rng(0).choice(data, (20_000, 40)).mean(1), [1 - level, level])
    assert ours is not None
    assert ours[1] > plain[1] + 0.01  # a right-skewed sample: the correction is really applied


@pytest.mark.parametrize(("kind", "size", "least"), [("normal", 8, 0.91), ("exponential", 40, 0.91)])
def test_intervals_hold_what_they_say(kind: str, size: int, least: float) -> None:
    """Without Student's quantiles eight normal values are held in 87 %."""
    rng, truth = np.random.default_rng(6), {"normal": 0.0, "exponential": 1.0}[kind]
    inside = 0
    for i in range(600):
        ci = bootstrap_ci(getattr(rng, kind)(size=size), n_boot=400, seed=i)
        assert ci is not None
        inside += ci[0] <= truth <= ci[1]
    assert inside / 600 >= least


def test_clustered_bootstrap_is_wider_when_authors_repeat_themselves():
    rng = np.random.default_rng(0)
    author = np.repeat(np.arange(10), 8)
    data = rng.normal(size=10)[author] + 0.01 * rng.normal(size=80)
    free, clustered = bootstrap_ci(data), bootstrap_ci(data, clusters=author.tolist())
    assert free is not None and clustered is not None
    assert clustered[1] - clustered[0] > 1.8 * (free[1] - free[0])


def test_intervals_refuse_what_they_can_not_know():
    assert bootstrap_ci([0.2, 0.4, 0.1, 0.3]) is None
    assert bootstrap_ci([0.2, math.nan, 0.4, 0.1, 0.3]) is None
    assert bootstrap_ci([0.2, 0.4, 0.1, 0.3, 0.5, 0.6], clusters=list("aabbcd")) is None  # four authors
    assert bootstrap_ci([0.2, 0.3, 0.4, 0.5, 0.6], n_boot=0) is None
    assert bootstrap_ci([1.0] * 5) == (1.0, 1.0)
    one = [0.0, 0.0, 0.0, 0.0, 1e9]
    assert bootstrap_ci(one, seed=3) == bootstrap_ci(one, seed=3) and bootstrap_ci(one, level=1 - 1e-9)[0] == 0.0


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.04) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)
    assert holm([]) == []


def test_diagnosticity_counts_ties_half():
    result = diagnosticity([1.0, 1.0, 0.0, math.nan], [0.0, 1.0, 1.0, 0.0])
    assert result is not None and result.value == 0.5 and result.n == 3
    perfect = diagnosticity(np.ones(100), np.zeros(100))
    assert perfect is not None and perfect.value == 1.0
    assert 0.95 < perfect.ci[0] < 0.97 and perfect.ci[1] == 1.0  # not the point a bootstrap would give
    assert diagnosticity([math.nan], [1.0]) is None
    with pytest.raises(ValueError, match="pairs"):
        diagnosticity([1.0], [1.0, 2.0])
