"""Bayes classification: the laws of a posterior, against the formula written out slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.bayes import class_log_likelihoods, every_label, posterior
from model.config import NoiseProtocol
from model.flow import NO_CLASS, Flow
from model.likelihood import combine_draws, log_likelihood
from model.noise import latents

MakeFlow = Callable[..., Flow]
GAUSSIAN, UNIFORM = NoiseProtocol(kind="gaussian", std=0.1), NoiseProtocol(kind="uniform")
NOISES = st.sampled_from([GAUSSIAN, UNIFORM])


@st.composite
def cases(draw: st.DrawFn, spread: float = 5000.0) -> tuple[Tensor, list[float]]:
    """Log-likelihoods (K, B, Y) of up to ``spread`` nats either way, and a prior over the classes."""
    draws, rows, classes = (draw(st.integers(1, 4)) for _ in range(3))
    count = draws * rows * classes
    nats = draw(st.lists(st.floats(-spread, spread), min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(1e-3, 1), min_size=classes, max_size=classes))
    total = math.fsum(weights)
    return torch.tensor(nats, dtype=torch.float64).view(draws, rows, classes), [w / total for w in weights]


@settings(deadline=None)
@given(cases(), NOISES)
def test_a_posterior_sums_to_one(case: tuple[Tensor, list[float]], noise: NoiseProtocol) -> None:
    nats_KBY, prior = case
    found = posterior(nats_KBY, prior, noise)
    assert found.probability_BY.dtype == found.log_marginal_B.dtype == torch.float64
    assert (found.probability_BY >= 0).all()
    torch.testing.assert_close(found.probability_BY.sum(dim=1), torch.ones(nats_KBY.shape[1], dtype=torch.float64))
    # The marginal is a mean of likelihoods: between the smallest and the largest.
    if len(nats_KBY) == 1:
        assert (found.log_marginal_B <= nats_KBY[0].amax(dim=1) + 1e-9).all()
        assert (found.log_marginal_B >= nats_KBY[0].amin(dim=1) - 1e-9).all()


def slow(nats_BY: Sequence[Sequence[float]], prior: Sequence[float]) -> tuple[list[list[float]], list[float]]:
    """p(y | x) and log Σ p(y) p(x | y) as they are written in books; for likelihoods near 1 only."""
    rows = [[p * math.exp(nats) for nats, p in zip(row, prior, strict=True)] for row in nats_BY]
    return [[value / sum(row) for value in row] for row in rows], [math.log(sum(row)) for row in rows]


@settings(deadline=None)
@given(cases(spread=20.0), NOISES)
def test_it_is_the_direct_formula(case: tuple[Tensor, list[float]], noise: NoiseProtocol) -> None:
    nats_KBY, prior = case
    found = posterior(nats_KBY, prior, noise)
    torch.testing.assert_close(found.log_likelihood_BY, combine_draws(nats_KBY, noise))
    if noise.kind == "uniform":
        copies = [slow(nats_KBY.exp().mean(dim=0).log().tolist(), prior)]
    else:
        copies = [slow(nats_BY.tolist(), prior) for nats_BY in nats_KBY]
    probabilities = torch.tensor([p for p, _ in copies], dtype=torch.float64).mean(dim=0)
    marginals = torch.tensor([m for _, m in copies], dtype=torch.float64).mean(dim=0)
    torch.testing.assert_close(found.probability_BY, probabilities, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(found.log_marginal_B, marginals, atol=1e-9, rtol=1e-7)


@settings(deadline=None)
@given(cases(), NOISES, st.floats(-5000, 5000))
def test_a_common_shift_changes_only_the_marginal(
    case: tuple[Tensor, list[float]], noise: NoiseProtocol, shift: float
) -> None:
    nats_KBY, prior = case
    before, after = posterior(nats_KBY, prior, noise), posterior(nats_KBY + shift, prior, noise)
    torch.testing.assert_close(after.probability_BY, before.probability_BY, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(after.log_marginal_B, before.log_marginal_B + shift, atol=1e-8, rtol=1e-9)


@settings(deadline=None)
@given(cases(), NOISES)
def test_equal_likelihoods_leave_the_prior(case: tuple[Tensor, list[float]], noise: NoiseProtocol) -> None:
    nats_KBY, prior = case
    same = nats_KBY[..., :1].expand_as(nats_KBY)
    found = posterior(same, prior, noise)
    expected = torch.tensor(prior, dtype=torch.float64).expand(nats_KBY.shape[1], -1)
    torch.testing.assert_close(found.probability_BY, expected)
    torch.testing.assert_close(found.log_marginal_B, combine_draws(same, noise)[:, 0])


@pytest.mark.parametrize("noise", [GAUSSIAN, UNIFORM])
def test_prior_odds_multiply_the_likelihood_ratio(noise: NoiseProtocol) -> None:
    nats = torch.tensor([[[-2000.0, -2001.0]]])
    [row] = posterior(nats, (0.2, 0.8), noise).probability_BY.tolist()
    assert row[0] / row[1] == pytest.approx(math.e * 0.2 / 0.8)


@pytest.mark.parametrize("noise", [GAUSSIAN, UNIFORM])
def test_a_single_class_is_certain(noise: NoiseProtocol) -> None:
    nats = torch.tensor([[[-3000.0]], [[-10.0]]])
    found = posterior(nats, (1.0,), noise)
    assert found.probability_BY.tolist() == [[1.0]]
    assert found.log_marginal_B.tolist() == combine_draws(nats.double(), noise)[:, 0].tolist()


def test_values_that_are_not_finite_stay_with_their_image() -> None:
    nats = torch.tensor([[[math.nan, 0.0], [-math.inf, 0.0], [1.0, 1.0]]])
    found = posterior(nats, (0.5, 0.5), UNIFORM)
    assert found.probability_BY[0].isnan().all()
    assert found.probability_BY[1:].tolist() == [[0, 1], [0.5, 0.5]]


def test_a_prior_for_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="prior: got 2 classes, allowed is 3"):
        posterior(torch.zeros(1, 1, 3), (0.5, 0.5), GAUSSIAN)


@pytest.mark.parametrize("rows_per_pass", [1, 3, 5, 100])
def test_every_class_is_scored_however_the_rows_are_cut(make_flow: MakeFlow, rows_per_pass: int) -> None:
    flow = make_flow()
    x_BTD = latents(range(4), flow.config.num_patches, flow.config.patch_dim).double()
    labels = every_label(3)
    assert labels == (NO_CLASS, 0, 1, 2)
    found = class_log_likelihoods(flow, x_BTD, labels, rows_per_pass)
    expected = torch.stack([log_likelihood(flow, x_BTD, torch.full((4,), label)) for label in labels], dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, 0], log_likelihood(flow, x_BTD))
