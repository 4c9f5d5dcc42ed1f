"""Statistics that survive a reviewer: exactness, error rates, coverage; and the tempting shortcuts shown failing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from probes.errors import ProbeInputError
from probes.stats import (
    arrangements,
    auroc,
    average_precision,
    band,
    bootstrap_ci,
    circular_cosine,
    density_ratio,
    diagnosticity,
    holm,
    mass_share,
    mean_test,
    p_greater,
    placement_null,
    require_null,
    rotations,
    shift_null,
    shifted_sums,
)

VALUES = arrays(np.float64, st.integers(1, 25), elements=st.floats(-10, 10).map(lambda x: round(x, 2)))


def with_mask(values: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(len(values)) < 0.4


@settings(max_examples=150, deadline=None)
@given(VALUES, st.integers(0, 1000))
def test_all_shifts_equal_rolling_the_map(values, seed):
    mask = with_mask(values, seed)
    rolled = [np.roll(values, k) for k in range(len(values))]
    np.testing.assert_allclose(shifted_sums(values, mask), [r[mask].sum() for r in rolled], atol=1e-9)
    np.testing.assert_allclose(shift_null(values, mask), [mass_share(r, mask) for r in rolled], atol=1e-9)
    np.testing.assert_allclose(shift_null(values, mask, "auroc"), [auroc(r, mask) for r in rolled], atol=1e-9)
    if np.any(values > 0):
        assert shift_null(values, mask).mean() == pytest.approx(mask.mean())  # chance is the length share, exactly


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(0, 1000))
def test_rotating_the_citation_over_units(values, seed):
    cited = with_mask(values, seed)
    lengths = np.random.default_rng(seed).integers(1, 30, len(values)).astype(float)
    null = rotations(values, lengths, cited)
    if not np.any(values > 0):
        assert np.isnan(null).all()
        return
    for r in range(len(values)):
        moved = np.roll(cited, r)
        expected = mass_share(values, moved) - lengths[moved].sum() / lengths.sum()
        assert null[r] == pytest.approx(expected, abs=1e-9)
    assert null.mean() == pytest.approx(0, abs=1e-9)


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


def test_p_counts_identity_and_ties():
    assert p_greater(np.array([1.0, 0.0, 0.0, 0.0])) == 0.25  # nothing reaches it: 1 / n, never 0
    assert p_greater(np.array([1.0, 1.0 - 1e-13, 0.0, 0.0])) == 0.5
    assert p_greater(np.zeros(7)) == 1.0


def test_cosine_under_all_shifts():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 8):
        a, b = rng.normal(size=n), rng.normal(size=n)
        expected = [a @ np.roll(b, k) / np.linalg.norm(a) / np.linalg.norm(b) for k in range(n)]
        np.testing.assert_allclose(circular_cosine(a, b), expected, atol=1e-12)
    assert np.isnan(circular_cosine(np.zeros(3), np.ones(3))).all()


def test_band_is_the_quantiles():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 6, 20, 21, 100):
        values = rng.normal(size=n)
        assert band(values) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])))


def test_arrangements_keep_runs_whole_and_hold_the_citation():
    cited = np.array([0, 1, 1, 0, 0, 1], bool)
    placed = arrangements(cited)
    assert len(placed) == len({tuple(row) for row in placed.tolist()}) and cited.tolist() in placed.tolist()
    ways = {frozenset((a, a + 1, b)) for a in range(5) for b in range(6) if b not in (a, a + 1)}
    assert {frozenset(np.flatnonzero(row).tolist()) for row in placed} == ways
    assert arrangements(np.eye(1, 5, 2, dtype=bool)[0]).tolist() == np.eye(5, dtype=bool)[::-1].tolist()
    many = arrangements(np.arange(40) % 4 == 0, most=300)
    assert many.shape == (301, 40) and (many.sum(1) == 10).all()
    np.testing.assert_array_equal(many[0], np.arange(40) % 4 == 0)  # drawn, it would hardly ever be among them


def test_token_shuffle_is_refused_with_the_reason():
    with pytest.raises(ProbeInputError, match="not exchangeable"):
        require_null("shuffle")
    with pytest.raises(ProbeInputError, match="unknown"):
        require_null("bootstrap")
    require_null("circular")


# Type-I error -----------------------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, n: int, scale: float = 4.0) -> np.ndarray:
    """Circularly stationary Gaussian noise with a correlation length of about ``scale`` characters."""
    lag = np.minimum(np.arange(n), n - np.arange(n))
    kernel = np.exp(-0.5 * (lag / scale) ** 2)
    return np.fft.irfft(np.fft.rfft(rng.normal(size=n)) * np.fft.rfft(kernel), n)


def contiguous(rng: np.random.Generator, n: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    length = int(rng.integers(6, 20))
    start = int(rng.integers(0, n - length))
    mask[start : start + length] = True
    return mask


def p_by_shuffling(rng: np.random.Generator, values: np.ndarray, mask: np.ndarray) -> float:
    positive = np.maximum(values, 0)
    draws = rng.permuted(np.tile(positive, (199, 1)), axis=1)[:, mask].sum(1)
    return (1 + np.sum(draws >= positive[mask].sum())) / 200


@pytest.mark.parametrize("statistic", ["mass", "auroc"])
def test_type_one_error_of_the_circular_shift_and_that_shuffling_fails(statistic):
    rng = np.random.default_rng(11)
    shift, shuffle = [], []
    for _ in range(2000):
        n = int(rng.integers(60, 220))
        values, mask = smooth_noise(rng, n), contiguous(rng, n)
        shift.append(p_greater(shift_null(values, mask, statistic)))
        if statistic == "mass" and len(shuffle) < 1000:
            shuffle.append(p_by_shuffling(rng, values, mask))
    assert np.mean(np.array(shift) <= 0.05) <= 0.075
    assert np.mean(np.array(shift) <= 0.05) >= 0.02  # and it is not just never rejecting
    if shuffle:
        assert np.mean(np.array(shuffle) <= 0.05) > 0.12


def test_type_one_error_of_random_placement():
    rng = np.random.default_rng(5)
    p = []
    for i in range(1000):
        n = int(rng.integers(60, 160))
        null = placement_null(smooth_noise(rng, n), contiguous(rng, n), draws=99, seed=i)
        p.append(p_greater(null))
    assert np.mean(np.array(p) <= 0.05) <= 0.075


def clause_world(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map that lives on whole clauses and a citation of one clause, drawn independently: nothing is true here."""
    lengths = rng.integers(6, 18, size=int(rng.integers(5, 9))).astype(float)
    return rng.gamma(0.3, size=len(lengths)), lengths, np.arange(len(lengths)) == rng.integers(len(lengths))


def test_clause_shaped_maps_need_clause_rotations():
    """Why a clause map is not shifted by characters: the shift breaks an alignment that map and citation share."""
    rng = np.random.default_rng(3)
    by_character, by_clause = [], []
    for _ in range(1000):
        values, lengths, cited = clause_world(rng)
        repeat = lengths.astype(int)
        by_character.append(p_greater(shift_null(np.repeat(values / lengths, repeat), np.repeat(cited, repeat))))
        by_clause.append(p_greater(rotations(values, lengths, cited)))
    assert np.mean(np.array(by_character) <= 0.05) > 0.10
    assert np.mean(np.array(by_clause) <= 0.20) <= 0.23
    assert min(by_clause) >= 1 / 8  # one short post alone cannot be significant


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


def test_placements_have_the_right_lengths_and_are_uniform():
    mask = np.array([1, 1, 0, 0, 1, 0], bool)
    null = placement_null(np.eye(6)[3], mask, draws=6000, seed=1)  # share = probability that position 3 is covered
    assert null[0] == 0.0 and set(np.unique(null)) == {0.0, 1.0}
    # spans of 2 and 1 in 6 positions, disjoint: C(3 + 2, 2) * 2 = 20 placements; position 3 is covered in 11 of them
    ways = [(a, b) for a in range(5) for b in range(6) if not a <= b < a + 2]
    covered = np.mean([a <= 3 < a + 2 or b == 3 for a, b in ways])
    assert len(ways) == 20
    assert null[1:].mean() == pytest.approx(covered, abs=0.03)


# Intervals and multiplicity ---------------------------------------------------------------------------------------


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
