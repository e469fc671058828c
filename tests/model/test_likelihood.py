"""Likelihoods: units, noise protocols and draws, against hand calculations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.config import NoiseProtocol
from model.flow import NO_CLASS, Flow
from model.likelihood import (
    add_noise,
    bits_per_dim,
    combine_draws,
    encode,
    log_likelihood,
    patch_terms,
    prior_terms,
    to_model_range,
    to_pixels,
)
from model.noise import input_noise, latents

MakeFlow = Callable[..., Flow]
GAUSSIAN, UNIFORM = NoiseProtocol(kind="gaussian", std=0.1), NoiseProtocol(kind="uniform")
VARIANTS: list[dict[str, Any]] = [{}, {"num_classes": 0}, {"volume_preserving": True}, {"channels": 3, "image_size": 4}]
ALL_VALUES = torch.arange(256, dtype=torch.uint8)


def test_prior_is_the_normal_density() -> None:
    z, variance = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64) + 0.5
    expected = torch.distributions.Normal(0, variance.sqrt()).log_prob(z)
    torch.testing.assert_close(prior_terms(z, variance), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
class TestDensity:
    def test_patch_terms_sum_to_minus_log_p(self, make_flow: MakeFlow, variant: dict[str, Any]) -> None:
        flow = make_flow(**variant)
        x_BTD = latents(range(4), flow.config.num_patches, flow.config.patch_dim).double()
        y = torch.tensor([0, 1, 2, NO_CLASS])
        terms_BT = patch_terms(flow, x_BTD, y)
        assert terms_BT.shape == (4, flow.config.num_patches)
        assert (terms_BT.sum(1) + log_likelihood(flow, x_BTD, y)).abs().max() < 1e-9

    def test_change_of_variables(self, make_flow: MakeFlow, variant: dict[str, Any]) -> None:
        """log p(x) = log N(u; 0, 1) + log |du/dx| for the latents that encode returns."""
        flow = make_flow(**variant)
        x_BTD = latents([1], flow.config.num_patches, flow.config.patch_dim).double()
        u_BTD, nats = encode(flow, x_BTD)
        assert torch.equal(nats, log_likelihood(flow, x_BTD))
        scale = flow.prior_variance.sqrt()
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0] / scale, x_BTD)
        logdet = torch.linalg.slogdet(jacobian.reshape(flow.config.num_dims, -1))[1]
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(u_BTD).sum() + logdet
        torch.testing.assert_close(nats[0], expected, atol=1e-9, rtol=1e-9)

    def test_patch_terms_are_in_image_order(self, make_flow: MakeFlow, variant: dict[str, Any]) -> None:
        """Each patch's term holds its own prior term and its own log-scales of every block."""
        flow = make_flow(**variant)
        x_BTD = latents([2], flow.config.num_patches, flow.config.patch_dim).double()
        terms_BT = patch_terms(flow, x_BTD)
        z_BTD = x_BTD
        expected = torch.zeros_like(terms_BT)
        for block in flow.blocks:
            order = z_BTD.flip(1) if block.reverse else z_BTD
            alpha, mu = block.affine(order, None)
            z_BTD = (order - mu) * torch.exp(-alpha)
            if block.reverse:
                z_BTD, alpha = z_BTD.flip(1), alpha.flip(1)
            expected += alpha.sum(2)
        expected -= torch.distributions.Normal(0, flow.prior_variance.sqrt()).log_prob(z_BTD).sum(2)
        torch.testing.assert_close(terms_BT, expected)


class TestBitsPerDim:
    def test_uniform_by_hand(self) -> None:
        """A density of 1 on [-1, 1)^D costs 7 bits a value: a step of 8-bit values is 1/128 of that scale."""
        assert bits_per_dim(0.0, 10, UNIFORM) == pytest.approx(7)
        # The uniform density on that cube, 2^-D, costs exactly 8 bits.
        assert bits_per_dim(-10 * math.log(2), 10, UNIFORM) == pytest.approx(8)

    def test_gaussian_by_hand(self) -> None:
        assert bits_per_dim(0.0, 10, GAUSSIAN) == pytest.approx(math.log2(127.5))
        nats, dims = -123.4, 784
        assert bits_per_dim(nats, dims, GAUSSIAN) == pytest.approx(123.4 / (784 * math.log(2)) + math.log2(127.5))

    def test_published_formula(self, make_flow: MakeFlow) -> None:
        """[−Σ log N(z)/D + ln 128 − logdet/D] / ln 2, as the paper's program computes it."""
        flow = make_flow()
        x_BTD, dims = latents([0, 1], 16, 4).double(), 64
        z_BTD, logdet_B = flow(x_BTD)
        prior_B = (0.5 * z_BTD.square() + 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2))
        expected = (prior_B / dims + math.log(128) - logdet_B / dims) / math.log(2)
        torch.testing.assert_close(bits_per_dim(log_likelihood(flow, x_BTD), dims, UNIFORM), expected)

    def test_a_known_discrete_distribution(self) -> None:
        """The bound is tight where the density is constant in every bin: the entropy of known odds."""
        odds = torch.tensor([0.5, 0.25, 0.25])
        nats = (odds * torch.log(odds * 128)).sum()
        assert float(bits_per_dim(nats, 1, UNIFORM)) == pytest.approx(1.5)


class TestDraws:
    def test_uniform_is_log_mean_exp(self) -> None:
        nats = torch.tensor([[-1000.0, 3.0], [-1002.0, 3.0], [-1001.0, 3.0]])
        expected = -1000 + math.log((1 + math.exp(-2) + math.exp(-1)) / 3)
        torch.testing.assert_close(combine_draws(nats, UNIFORM), torch.tensor([expected, 3.0]))

    def test_gaussian_is_the_mean(self) -> None:
        nats = torch.tensor([[-10.0, 3.0], [-20.0, 3.0]])
        assert torch.equal(combine_draws(nats, GAUSSIAN), torch.tensor([-15.0, 3.0]))

    @pytest.mark.parametrize("noise", [UNIFORM, GAUSSIAN])
    def test_one_draw_is_itself(self, noise: NoiseProtocol) -> None:
        nats = torch.randn(1, 5)
        torch.testing.assert_close(combine_draws(nats, noise), nats[0])

    def test_more_draws_tighten_the_bound(self) -> None:
        nats = torch.randn(64, 20, dtype=torch.float64)
        assert (combine_draws(nats, UNIFORM) >= nats.mean(0)).all()


class TestAddNoise:
    def test_gaussian(self) -> None:
        pixels = torch.tensor([0, 255, 51], dtype=torch.uint8)
        noised = add_noise(pixels, GAUSSIAN, torch.tensor([0.0, 1.0, -2.0]))
        torch.testing.assert_close(noised, torch.tensor([-1.0, 1.1, 51 / 127.5 - 1.2]))

    def test_uniform(self) -> None:
        pixels = torch.tensor([0, 255, 128], dtype=torch.uint8)
        noised = add_noise(pixels, UNIFORM, torch.tensor([0.0, 0.5, 0.25]))
        torch.testing.assert_close(noised, torch.tensor([-1.0, 2 * 255.5 / 256 - 1, 2 * 128.25 / 256 - 1]))

    @pytest.mark.parametrize("draw", [0.0, 2.0**-53, 2.0**-24, 0.5, 1 - 2.0**-15, 1 - 2.0**-17, 1 - 2.0**-24])
    def test_uniform_noise_never_leaves_its_bin(self, draw: float) -> None:
        """Float rounding must not carry a value to its neighbour, whose likelihood is another."""
        noised = add_noise(ALL_VALUES, UNIFORM, torch.full((256,), draw))
        assert noised.dtype == torch.float32
        assert (noised < 1).all()
        bins = ((noised.double() + 1) * 128).floor()
        assert torch.equal(bins, ALL_VALUES.double())

    def test_seeded_uniform_noise_never_leaves_its_bin(self) -> None:
        draw = input_noise("uniform", 0, 400, (256,))
        bins = ((add_noise(ALL_VALUES, UNIFORM, draw).double() + 1) * 128).floor()
        assert torch.equal(bins, ALL_VALUES.double().expand_as(bins))


def test_pixels_survive_the_models_range() -> None:
    assert torch.equal(to_pixels(to_model_range(ALL_VALUES)), ALL_VALUES)
    assert torch.equal(to_pixels(torch.tensor([-3.0, 3.0, 0.0])), torch.tensor([0, 255, 128], dtype=torch.uint8))
