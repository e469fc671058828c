"""The densities that scores are made of: against slow formulas, and on data whose law is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.anomaly.arrays import flatten, unflatten
from model.anomaly.gaussian import FAR, MAD_TO_STD, ShrunkGaussian, robust_scale
from model.anomaly.mixture import GaussianMixture
from model.anomaly.rounding import raised
from model.anomaly.tail import MOST, Tail


def ledoit_wolf(x: np.ndarray) -> np.ndarray:
    """The shrunk covariance by the formulas of the paper, one outer product at a time."""
    count, size = x.shape
    sample = sum(np.outer(row, row) for row in x) / count
    mean = np.trace(sample) / size
    spread = ((sample - mean * np.eye(size)) ** 2).sum()
    noise = sum(((np.outer(row, row) - sample) ** 2).sum() for row in x) / count**2
    shrinkage = min(noise, spread) / spread
    return shrinkage * mean * np.eye(size) + (1 - shrinkage) * sample


@settings(deadline=None, max_examples=30)
@given(count=st.integers(5, 60), size=st.integers(2, 20), seed=st.integers(0, 100))
def test_distances_are_mahalanobis_under_the_shrunk_covariance(count: int, size: int, seed: int) -> None:
    """Fewer images than features included."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    gaussian = ShrunkGaussian.fit(values)
    center, scale = robust_scale(values)
    scaled = np.clip((values - center) / scale, -FAR, FAR)
    precision = np.linalg.inv(ledoit_wolf(scaled - scaled.mean(0)))
    new = rng.normal(size=(7, size))
    off = np.clip((new - center) / scale, -FAR, FAR) - scaled.mean(0)
    expected = np.einsum("nf,fg,ng->n", off, precision, off) / size
    np.testing.assert_allclose(gaussian.distance(new), expected, rtol=1e-2)


def test_many_features_keep_only_the_largest_directions() -> None:
    values = np.random.default_rng(0).normal(size=(700, 400))
    gaussian = ShrunkGaussian.fit(values)
    assert gaussian.directions_RF.shape == (256, 400)
    # White noise: whatever is left out has the same variance, so the mean distance stays about one.
    assert gaussian.distance(np.random.default_rng(1).normal(size=(300, 400))).mean() == pytest.approx(1, abs=0.1)


def test_scales_ignore_outliers_and_never_vanish() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=(2001, 3))
    values[:100, 0] = 1e9
    values[:, 2] = 5.0
    center, scale = robust_scale(values[:, 1:])
    assert center == pytest.approx([3, 5], abs=0.2)
    assert scale[0] == pytest.approx(2, rel=0.1)
    assert scale[1] > 0
    values[0, 1] = 1e3
    assert robust_scale(values[:, 1:])[0][0] == pytest.approx(center[0], abs=0.01)
    assert pytest.approx(1 / 0.6745, rel=1e-3) == MAD_TO_STD


def test_rounding_is_no_deviation_of_what_is_constant() -> None:
    """Of any size, and whether it was exactly constant in the images fitted or but for its last digits."""
    rng = np.random.default_rng(0)
    level = np.array([0.0, 1.0, -30.0, 5e3])
    for digits in (0.0, 4.0):
        off = digits * np.finfo(np.float32).eps * (1 + np.abs(level)) * rng.uniform(-1, 1, (50, 4))
        gaussian, mixture = ShrunkGaussian.fit(level + off), GaussianMixture.fit(level + off)
        last = 4 * np.finfo(np.float32).eps * (1 + np.abs(level))
        near, far = level + last * np.array([[0], [1], [-1]]), level * 1.1 + 0.1
        assert np.ptp(gaussian.distance(near)) < 1e-4
        assert np.ptp(mixture.surprise(near)) < 1e-4
        assert gaussian.distance(far[None])[0] > 10
    tail = Tail.fit(1 + 1e-6 * rng.uniform(size=50))
    assert (tail.surprise(1 + 1e-5 * rng.uniform(-1, 1, 20)) == 0).all()
    assert tail.surprise(np.array([1.1]))[0] > 10


def test_raised_scores_keep_their_order() -> None:
    scores = np.sort(np.random.default_rng(0).normal(0, 100, 200))
    assert (np.diff(raised(scores)) > 0).all()
    assert (raised(scores) > scores).all()
    assert raised(np.array([-np.inf, np.inf])).tolist() == [-np.inf, np.inf]


def test_what_is_not_finite_is_far_and_stays_a_number() -> None:
    gaussian = ShrunkGaussian.fit(np.random.default_rng(0).normal(size=(50, 4)))
    near, *far = gaussian.distance([[0, 0, 0, 0], [np.nan] * 4, [np.inf] * 4, [-np.inf] * 4])
    assert np.isfinite(far).all()
    assert min(far) > 50 * max(near, 1)


@pytest.mark.parametrize("values", [np.zeros((1, 3)), np.full((4, 2), np.nan), np.zeros(5)])
def test_what_cannot_be_fitted_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="two images or more"):
        ShrunkGaussian.fit(values)


def test_one_component_is_one_gaussian() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(150, 3)) @ np.array([[2, 0, 0], [1, 1, 0], [0, 0.5, 0.3]])
    mixture = GaussianMixture.fit(values)
    assert len(mixture.log_weight_J) == 1
    center, scale = robust_scale(values)
    scaled = (values - center) / scale
    covariance = np.cov(scaled.T, bias=True) + 0.01 * np.eye(3)
    off = scaled - scaled.mean(0)
    expected = 0.5 * np.einsum("nf,fg,ng->n", off, np.linalg.inv(covariance), off)
    expected += 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    np.testing.assert_allclose(mixture.surprise(values), expected, rtol=1e-6)


def test_several_components_find_what_one_gaussian_cannot() -> None:
    """Two clusters: the empty middle is as near to the mean as anything, and yet no image is there."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-5, 1, (600, 2)), rng.normal(5, 1, (600, 2))])
    mixture = GaussianMixture.fit(values)
    assert len(mixture.log_weight_J) == 6
    assert np.exp(mixture.log_weight_J).sum() == pytest.approx(1)
    assert mixture.surprise([[0.0, 0.0]])[0] > np.quantile(mixture.surprise(values), 0.99)
    single = ShrunkGaussian.fit(values)
    assert single.distance([[0.0, 0.0]])[0] < np.median(single.distance(values))


def test_mixtures_are_densities() -> None:
    """Their integral over a grid is one."""
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(-1, 0.5, (300, 2)), rng.normal(1, 0.8, (300, 2))])
    mixture = GaussianMixture.fit(values)
    axis = np.linspace(-12, 12, 400)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2) * mixture.scale_F + mixture.center_F
    assert np.exp(-mixture.surprise(grid)).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_the_same_images_give_the_same_mixture() -> None:
    values = np.random.default_rng(0).normal(size=(900, 5))
    np.testing.assert_array_equal(GaussianMixture.fit(values).mean_JF, GaussianMixture.fit(values).mean_JF)


def test_surprise_counts_below_the_knee_and_grows_beyond_all_that_was_seen() -> None:
    scores = np.random.default_rng(0).exponential(size=1000)
    tail = Tail.fit(scores)
    order = np.sort(scores)
    # −log of the share that is at least as large, which for exponential scores is the score itself.
    assert tail.surprise(np.array([order[500]]))[0] == pytest.approx(np.log(2), abs=0.01)
    assert tail.surprise(np.array([3.0, 10.0, 20.0])) == pytest.approx([3.0, 10.0, 20.0], rel=0.15)
    assert (tail.surprise(np.array([np.nan, np.inf, 1e9])) == MOST).all()
    assert tail.surprise(np.array([-np.inf]))[0] == pytest.approx(0, abs=0.01)


@given(st.lists(st.floats(-1e3, 1e3), min_size=10, max_size=60), st.lists(st.floats(-2e3, 2e3), min_size=2, max_size=9))
def test_surprise_never_falls_as_scores_rise(scores: list[float], new: list[float]) -> None:
    surprise = Tail.fit(np.array(scores)).surprise(np.sort(new))
    assert (np.diff(surprise) >= -1e-9).all()
    assert (surprise >= 0).all()
    assert (surprise <= MOST).all()


def test_records_survive_a_flat_file() -> None:
    tail = Tail.fit(np.random.default_rng(0).normal(size=100))
    gaussian = ShrunkGaussian.fit(np.random.default_rng(0).normal(size=(50, 4)))
    again = unflatten(ShrunkGaussian, flatten(gaussian, "a/"), "a/")
    assert isinstance(again.base_variance, float)
    x = np.random.default_rng(1).normal(size=(5, 4))
    np.testing.assert_allclose(again.distance(x), gaussian.distance(x), rtol=1e-5)
    np.testing.assert_array_equal(unflatten(Tail, flatten(tail)).sorted_N, tail.sorted_N.astype(np.float32))
    with pytest.raises(KeyError, match="knee"):
        unflatten(Tail, {"sorted_N": np.zeros(3)})
