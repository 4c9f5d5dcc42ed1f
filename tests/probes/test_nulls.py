"""Nulls that survive a reviewer: exactness and error rates; and the tempting shortcuts shown failing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from probes.errors import ProbeInputError
from probes.nulls import (
    arrangements,
    band,
    circular_cosine,
    p_greater,
    placement_null,
    require_null,
    rotations,
    shift_null,
    shifted_sums,
)
from probes.stats import auroc, mass_share

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


def test_arrangements_are_all_that_keep_the_runs():
    """Against every mask of the same number of units whose runs are as long."""

    def runs_of(mask):
        return sorted(map(len, "".join("x" if one else " " for one in mask).split()))

    rng = np.random.default_rng(0)
    for _ in range(40):
        cited = rng.random(int(rng.integers(1, 10))) < rng.random()
        masks = itertools.product([False, True], repeat=len(cited))
        placed = {tuple(row) for row in arrangements(cited).tolist()}
        wanted = {mask for mask in masks if runs_of(mask) == runs_of(cited)}
        assert wanted <= placed and tuple(cited) in placed
        assert all(sum(row) == cited.sum() for row in placed)


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


def test_placements_have_the_right_lengths_and_are_uniform():
    mask = np.array([1, 1, 0, 0, 1, 0], bool)
    null = placement_null(np.eye(6)[3], mask, draws=6000, seed=1)  # share = probability that position 3 is covered
    assert null[0] == 0.0 and set(np.unique(null)) == {0.0, 1.0}
    # spans of 2 and 1 in 6 positions, disjoint: C(3 + 2, 2) * 2 = 20 placements; position 3 is covered in 11 of them
    ways = [(a, b) for a in range(5) for b in range(6) if not a <= b < a + 2]
    covered = np.mean([a <= 3 < a + 2 or b == 3 for a, b in ways])
    assert len(ways) == 20
    assert null[1:].mean() == pytest.approx(covered, abs=0.03)
