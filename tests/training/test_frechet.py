"""The Fréchet distance: closed forms, invariances, moments in a stream, and an honest standard error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.frechet import GROUPS, Moments, Reference, frechet_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(mean: Tensor, covariance: Tensor) -> Moments:
    """Moments that have exactly this mean and covariance."""
    return Moments(101, mean.double(), covariance.double() * 100)


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def covariance(size: int, seed: int) -> Tensor:
    x = normal(size, 2 * size, seed=seed)
    return x @ x.T / size


def test_commuting_covariances_have_a_closed_form() -> None:
    a, b, m, n = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0]), torch.zeros(3), torch.tensor([1.0, 2, 2])
    basis = rotation(3)
    expected = 9 + 1 + 1 + 9
    first, second = (exact(mean, basis @ torch.diag(v.double()) @ basis.T) for mean, v in ((m, a), (n, b)))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_two_dimensions_have_a_closed_form_without_eigenvalues() -> None:
    a, b = covariance(2, 1), covariance(2, 2)
    # The trace of a 2x2 root: √(tr M + 2 √det M), and tr M, det M are those of A·B.
    cross = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a) * torch.linalg.det(b))))
    expected = float(a.trace() + b.trace()) - 2 * cross
    zero = torch.zeros(2)
    assert frechet_distance(exact(zero, a), exact(zero, b)) == pytest.approx(expected, rel=1e-12)


def test_it_is_symmetric_zero_with_itself_and_moves_with_the_frame() -> None:
    first = exact(normal(6, seed=1), covariance(6, 2))
    second = exact(normal(6, seed=3), covariance(6, 4))
    distance = frechet_distance(first, second)
    assert distance > 1
    assert frechet_distance(second, first) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)
    turn, shift = rotation(6, seed=5), normal(6, seed=6)
    moved = [exact(3 * turn @ m.mean_F + shift, 9 * turn @ m.covariance @ turn.T) for m in (first, second)]
    assert frechet_distance(*moved) == pytest.approx(9 * distance, rel=1e-10)


def test_fewer_vectors_than_features_are_measured_as_they_are() -> None:
    x, y = normal(5, 4, seed=1), 2 * normal(6, 4, seed=2) + 1
    basis = rotation(40)[:, :4]
    low, high = ((Moments.of(a), Moments.of(b)) for a, b in ((x, y), (x @ basis.T, y @ basis.T)))
    # Nothing is added to a covariance of rank 4 in 40 dimensions.
    assert frechet_distance(*high) == pytest.approx(frechet_distance(*low), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=5), st.sampled_from([0.0, 1e6]))
def test_moments_do_not_depend_on_how_the_stream_was_cut(cuts: list[int], offset: float) -> None:
    x = normal(60, 3) + offset
    edges = [0, *sorted(cuts), 60]
    total = Moments.of(x[:0])
    for start, stop in itertools.pairwise(edges):
        total = total + Moments.of(x[start:stop])
    assert total.count == 60
    torch.testing.assert_close(total.mean_F, x.mean(dim=0), rtol=1e-12, atol=1e-12)
    # Far from zero, where a sum of squares would lose every digit.
    torch.testing.assert_close(total.covariance, (x - offset).T.cov(), rtol=1e-6, atol=1e-6)


def test_mistakes_are_refused() -> None:
    good = Moments.of(normal(10, 3))
    with pytest.raises(ValueError, match="got 3 and 4"):
        frechet_distance(good, Moments.of(normal(10, 4)))
    with pytest.raises(ValueError, match="got 1 vectors"):
        frechet_distance(good, Moments.of(normal(1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, Moments.of(normal(10, 3) / 0))
    with pytest.raises(ValueError, match="allowed is 1 to 3 for 10 real images"):
        Reference.fit("net", good, components=4)
    with pytest.raises(ValueError, match="samples: got 39, allowed is at least 40"):
        Reference.fit("net", good, components=3).measure(normal(39, 3))


def test_all_components_give_the_distance_of_the_features_themselves() -> None:
    real, fake = normal(200, 5, seed=1) @ covariance(5, 2) + 3, normal(80, 5, seed=3)
    reference = Reference.fit("net", Moments.of(real), components=5)
    expected = frechet_distance(Moments.of(real), Moments.of(fake))
    assert reference.measure(fake).uncorrected == pytest.approx(expected, rel=1e-9)


def test_the_components_are_those_of_largest_variance() -> None:
    real = normal(500, 4, seed=1) * torch.tensor([1.0, 10, 0.1, 5])
    reference = Reference.fit("net", Moments.of(real), components=2)
    assert reference.components_FK.abs().argmax(dim=0).tolist() == [1, 3]
    # A shift that the components see counts in full, one across them not at all.
    sample = normal(100, 4, seed=2) * torch.tensor([1.0, 10, 0.1, 5])
    seen, unseen = (sample + torch.tensor(shift) for shift in ([0.0, 0, 0, 1000], [0.0, 0, 1000, 0]))
    assert reference.measure(seen).value == pytest.approx(1e6, rel=0.01)
    assert reference.measure(unseen).value < 1000


def test_a_title_names_features_and_counts() -> None:
    reference = Reference.fit("some-net", Moments.of(normal(5000, 4)), components=3)
    assert reference.title(1000) == (
        "Fréchet distance (some-net/pca3, 1,000 samples against 5,000 real images); not comparable with FID"
    )


def test_the_jackknife_removes_the_bias_and_tells_the_spread() -> None:
    size, draws = 16, 100
    scales = torch.linspace(0.5, 3, size, dtype=torch.float64)
    real = exact(torch.zeros(size), torch.diag(scales.square()))
    reference = Reference.fit("net", real, components=size)
    truth = size * 0.25**2 + float((0.2 * scales).square().sum())
    figures = [reference.measure(normal(200, size, seed=seed) * 1.2 * scales + 0.25) for seed in range(draws)]
    values = torch.tensor([figure.value for figure in figures])
    raw = torch.tensor([figure.uncorrected for figure in figures])
    spread, error_of_mean = float(values.std()), float(values.std()) / math.sqrt(draws)
    # The 1/n term is many standard errors of the mean; without it hardly anything is left.
    assert float(raw.mean()) - truth > 10 * error_of_mean
    assert abs(float(values.mean()) - truth) < 0.1 * (float(raw.mean()) - truth)
    claimed = sum(figure.standard_error for figure in figures) / draws
    # A jackknife errs on the large side.
    assert 0.85 * spread < claimed < 1.4 * spread


def test_samples_of_the_same_seeds_have_a_smaller_error_of_their_difference() -> None:
    reference = Reference.fit("net", Moments.of(normal(2000, 8, seed=1)), components=8)
    noise = normal(400, 8, seed=2)
    first, second = reference.measure(1.5 * noise), reference.measure(1.6 * noise)
    difference = second - first
    assert difference.value == pytest.approx(second.value - first.value, rel=1e-9)
    apart = math.hypot(first.standard_error, second.standard_error)
    assert difference.standard_error < apart / 2
    assert difference.value > 5 * difference.standard_error
    assert len(difference.pseudo_values_G) == GROUPS
