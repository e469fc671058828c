"""Laws of conformal p-values, by simulation and by arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.anomaly.conformal import (
    AlphaTooSmall,
    alpha_of_threshold,
    benjamini_hochberg,
    beta_binomial_interval,
    beta_quantile,
    exceedance_interval,
    false_positive_interval,
    p_values,
    rank_of,
    smallest_alpha,
    threshold,
)


@given(
    scores=st.lists(st.integers(-5, 5), min_size=2, max_size=40),
    alpha=st.floats(0.01, 0.99),
)
def test_at_most_alpha_of_exchangeable_images_are_flagged(scores: list[int], alpha: float) -> None:
    """Exactly, ties included: each image in turn is the new one, and the others are its calibration."""
    values = np.array(scores, np.float64)
    p = [p_values(np.sort(np.delete(values, i)), values[i : i + 1])[0] for i in range(len(values))]
    assert np.mean(np.array(p) <= alpha) <= alpha + 1e-12


def test_without_ties_p_values_are_uniform_on_their_grid() -> None:
    values = np.random.default_rng(0).normal(size=20)
    p = [p_values(np.sort(np.delete(values, i)), values[i : i + 1])[0] for i in range(20)]
    np.testing.assert_allclose(np.sort(p), np.arange(1, 21) / 20)


@given(
    scores=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    new=st.floats(allow_nan=True, allow_infinity=True),
)
def test_p_values_are_the_definition(scores: list[float], new: float) -> None:
    counted = sum(1 for s in scores if s >= new) if not math.isnan(new) else 0
    assert p_values(np.sort(scores), np.array([new]))[0] == pytest.approx((1 + counted) / (len(scores) + 1))


@given(
    scores=st.lists(st.integers(-50, 50), min_size=3, max_size=60),
    new=st.integers(-60, 60),
    alpha=st.floats(0.02, 0.98),
)
def test_the_threshold_says_the_same_as_the_p_value(scores: list[int], new: int, alpha: float) -> None:
    sorted_scores = np.sort(np.array(scores, np.float64))
    try:
        limit = threshold(sorted_scores, alpha)
    except AlphaTooSmall:
        assert alpha < smallest_alpha(len(scores))
        return
    # Levels within rounding of the grid may fall on either side.
    if min(alpha * (len(scores) + 1) % 1, 1 - alpha * (len(scores) + 1) % 1) > 1e-9:
        flagged = p_values(sorted_scores, np.array([float(new)]))[0] <= alpha
        assert flagged == (new > limit)


@pytest.mark.parametrize(
    ("alpha", "count", "rank"), [(0.05, 99, 5), (0.07, 99, 7), (0.29, 99, 29), (0.01, 99, 1), (0.5, 1, 1)]
)
def test_levels_on_the_grid_are_not_lost_to_rounding(alpha: float, count: int, rank: int) -> None:
    assert rank_of(alpha, count) == rank


def test_a_level_that_nothing_can_reach_is_refused_with_the_reason() -> None:
    with pytest.raises(AlphaTooSmall, match=r"got 0.005, allowed is 0.01 and more: with 99 calibration images"):
        rank_of(0.005, 99)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_a_level_outside_the_unit_interval_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        rank_of(alpha, 99)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(-1, 21))
def test_a_threshold_has_the_level_of_the_smallest_score_above_it(scores: list[int], limit: int) -> None:
    values = np.sort(np.array(scores, np.float64))
    assert alpha_of_threshold(values, limit) == p_values(values, np.array([limit + 0.5]))[0]


def test_beta_quantiles_are_those_of_uniform_order_statistics() -> None:
    assert beta_quantile(0.3, 1, 1) == pytest.approx(0.3)
    assert beta_quantile(0.3, 3, 1) == pytest.approx(0.3 ** (1 / 3))
    assert beta_quantile(0.3, 1, 4) == pytest.approx(1 - 0.7 ** (1 / 4))
    # The 5th smallest of 20 uniform numbers is Beta(5, 16).
    fifth = np.sort(np.random.default_rng(0).random((200_000, 20)), axis=1)[:, 4]
    for probability in (0.005, 0.5, 0.995):
        assert np.mean(fifth <= beta_quantile(probability, 5, 16)) == pytest.approx(probability, abs=0.003)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5])
def test_intervals_cover_as_often_as_they_say(alpha: float) -> None:
    """Many calibrations of 199 images; the rate each really has, and what it flags of 300 further images."""
    rng, scores = np.random.default_rng(1), 199
    low, high = false_positive_interval(alpha, scores)
    fewest, most = beta_binomial_interval(alpha, scores, 300)
    rates, counts = [], []
    for _ in range(4000):
        limit = threshold(np.sort(rng.random(scores)), alpha)
        # Scores are uniform, so that the true rate is known.
        rates.append(1 - limit)
        counts.append(int(np.sum(rng.random(300) > limit)))
    within = np.mean((np.array(rates) >= low) & (np.array(rates) <= high))
    assert within == pytest.approx(0.99, abs=0.006)
    covered = np.mean((np.array(counts) >= fewest) & (np.array(counts) <= most))
    assert 0.985 < covered <= 1
    assert np.mean(rates) <= alpha + 0.002


def test_a_threshold_of_ones_own_has_the_exact_binomial_interval() -> None:
    assert exceedance_interval(0, 500)[0] == 0
    assert exceedance_interval(500, 500)[1] == 1
    assert exceedance_interval(0, 500)[1] == pytest.approx(1 - 0.005 ** (1 / 500))
    rng = np.random.default_rng(3)
    for rate in (0.01, 0.1, 0.6):
        counts = rng.binomial(200, rate, 3000)
        covered = [low <= rate <= high for low, high in (exceedance_interval(int(k), 200) for k in counts)]
        assert np.mean(covered) >= 0.985


def test_a_level_next_to_one_flags_nearly_all() -> None:
    assert threshold(np.arange(10.0), 1 - 1e-13) == 0


def test_beta_binomial_bounds_are_tight() -> None:
    """For one calibration image at 1/2 every count is equally likely."""
    assert beta_binomial_interval(0.5, 1, 999, 0.9) == (49, 949)


@settings(max_examples=50)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20), st.floats(0.01, 0.5))
def test_benjamini_hochberg_is_its_definition(p: list[float], alpha: float) -> None:
    flagged = benjamini_hochberg(np.array(p), alpha)
    largest = max((k for k in range(1, len(p) + 1) if sorted(p)[k - 1] <= alpha * k / len(p)), default=0)
    assert flagged.sum() == largest
    assert set(np.nonzero(flagged)[0]) == set(np.argsort(p, kind="stable")[:largest]) or len(set(p)) < len(p)


def test_benjamini_hochberg_keeps_its_rate_where_raw_levels_do_not() -> None:
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(300):
        calibration = np.sort(rng.normal(size=999))
        normals, odd = rng.normal(size=90), rng.normal(4, 1, size=10)
        flagged = benjamini_hochberg(p_values(calibration, np.concatenate([normals, odd])), 0.1)
        shares.append(flagged[:90].sum() / max(1, flagged.sum()))
    assert np.mean(shares) <= 0.1
    assert np.mean(shares) > 0.03
