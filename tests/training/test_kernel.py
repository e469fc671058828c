"""The kernel distance: its definition, no bias, an error that is right, and what torchmetrics makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from training.frechet import Moments, frechet_distance
from training.kernel import kernel_distance


class Unchanged(nn.Module):
    """torchmetrics' way of being given features."""

    num_features = 6

    def forward(self, features_NF: Tensor) -> Tensor:
        return features_NF


def draw(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) + shift


def test_it_is_the_mean_over_pairs_of_different_images() -> None:
    x, y = draw(41, 0), draw(7, 1, 0.5)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double() / 6 + 1) ** 3)

    xx = [k(x[i], x[j]) for i in range(41) for j in range(41) if i != j]
    yy = [k(y[i], y[j]) for i in range(7) for j in range(7) if i != j]
    xy = [k(a, b) for a in x for b in y]
    expected = sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)
    assert kernel_distance(x, y).uncorrected == pytest.approx(expected)


def test_the_jackknife_leaves_out_groups() -> None:
    x, y = draw(45, 0), draw(30, 1, 0.5)
    figure = kernel_distance(x, y, groups=5)
    for group in range(5):
        kept = torch.arange(45) % 5 != group
        without = kernel_distance(x[kept], y, groups=2).uncorrected
        assert float(figure.pseudo_values_G[group]) == pytest.approx(5 * figure.uncorrected - 4 * without)


def test_it_is_unbiased_and_its_error_is_that_of_repeated_draws() -> None:
    real = draw(2000, 1)
    same = [kernel_distance(draw(60, seed), real) for seed in range(10, 40)]
    values = torch.tensor([figure.value for figure in same])
    # The mean of thirty is within three of its own errors around the distance of all from the real ones, which is zero.
    assert values.mean().abs() < 3 * values.std() / 30**0.5 + 0.02
    shifted = [kernel_distance(draw(60, seed, 1.0), real) for seed in range(10, 40)]
    spread = torch.tensor([figure.value for figure in shifted]).std()
    errors = torch.tensor([figure.standard_error for figure in shifted]).mean()
    assert 0.7 < errors / spread < 1.4
    assert min(figure.value for figure in shifted) > values.max()


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_torchmetrics_agrees() -> None:
    x, y = draw(60, 0, 0.3).double(), draw(60, 1).double()
    kernel = KernelInceptionDistance(feature=Unchanged(), subsets=1, subset_size=60).set_dtype(torch.float64)
    kernel.update(x, real=False)
    kernel.update(y, real=True)
    assert kernel_distance(x, y).uncorrected == pytest.approx(float(kernel.compute()[0]), rel=1e-5)
    frechet = FrechetInceptionDistance(feature=Unchanged())
    frechet.update(x, real=False)
    frechet.update(y, real=True)
    ours = frechet_distance(Moments.of(x), Moments.of(y))
    assert ours == pytest.approx(float(frechet.compute()), rel=1e-5)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="samples: got 39"):
        kernel_distance(draw(39, 0), draw(10, 1))
    with pytest.raises(ValueError, match="features: got 6 and 5"):
        kernel_distance(draw(50, 0), draw(10, 1)[:, :5])
