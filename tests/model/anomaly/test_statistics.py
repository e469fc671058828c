"""Statistics of a flow's passes: exact as sums, independent of the batch, finite for every picture."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from model.anomaly.features import (
    as_square,
    concatenate,
    excess_bits,
    hidden_features,
    latent_features,
    patch_features,
    summary_features,
)
from model.anomaly.statistics import flow_statistics, image_statistics
from model.config import NoiseProtocol
from model.flow import Flow
from model.likelihood import add_noise, bits_per_dim, centre_draw, log_likelihood, patch_terms
from model.noise import input_noise
from tests.model.conftest import tiny_flow

GAUSSIAN, UNIFORM = NoiseProtocol(kind="gaussian", std=0.1), NoiseProtocol(kind="uniform")


def make_flow(**changes: bool) -> Flow:
    return tiny_flow(dtype=torch.float32, **changes)


def random_images(flow: Flow, count: int) -> torch.Tensor:
    shape = (count, flow.config.channels, flow.config.image_size, flow.config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def patches(flow: Flow, pixels: torch.Tensor, noise: NoiseProtocol, seed: int) -> torch.Tensor:
    draw = input_noise(noise.kind, seed, 1, tuple(pixels.shape[1:]))[0]
    return flow.patchify(add_noise(pixels, noise, draw))


@pytest.mark.parametrize("noise", [GAUSSIAN, UNIFORM])
@pytest.mark.parametrize("volume_preserving", [False, True])
def test_patch_terms_sum_to_the_likelihood(noise: NoiseProtocol, volume_preserving: bool) -> None:
    flow = make_flow(volume_preserving=volume_preserving)
    pixels = random_images(flow, 5)
    found = image_statistics(flow, noise, pixels, None, seed=3)
    nats = log_likelihood(flow, patches(flow, pixels, noise, 3)).detach()
    np.testing.assert_allclose(found["patch_nll"].sum(axis=1), -nats.numpy(), rtol=1e-4, atol=1e-2)
    bits = bits_per_dim(nats, flow.config.num_dims, noise)
    np.testing.assert_allclose(found["bits"], bits, rtol=1e-4)
    expected = patch_terms(flow, patches(flow, pixels, noise, 3)).detach()
    np.testing.assert_allclose(found["patch_nll"], expected, rtol=1e-4, atol=1e-3)


def test_shapes_are_as_documented() -> None:
    flow = make_flow()
    config = flow.config
    found = image_statistics(flow, GAUSSIAN, random_images(flow, 4), None, seed=0, gradient=True)
    assert {name: value.shape for name, value in found.items()} == {
        "bits": (4,),
        "patch_nll": (4, config.num_patches),
        "log_scale": (4, config.num_blocks, config.num_patches),
        "energy": (4, config.num_blocks, config.num_patches),
        "latent": (4, 8),
        "hidden": (4, 3 * config.width),
        "gradient": (4,),
        "residual": (4, config.channels, config.image_size, config.image_size),
    }
    assert all(value.dtype == np.float32 for value in found.values())


def test_they_do_not_depend_on_the_batch() -> None:
    flow = make_flow()
    pixels = random_images(flow, 5)
    together = image_statistics(flow, GAUSSIAN, pixels, None, seed=1, gradient=True)
    alone = concatenate(
        [image_statistics(flow, GAUSSIAN, pixels[i : i + 1], None, seed=1, gradient=True) for i in range(5)]
    )
    for name, value in together.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("noise", [GAUSSIAN, UNIFORM])
def test_gradient_and_residual_are_those_of_tweedie(noise: NoiseProtocol) -> None:
    flow = make_flow()
    pixels = random_images(flow, 2)
    found = image_statistics(flow, noise, pixels, None, seed=0, gradient=True)
    x = patches(flow, pixels, noise, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(flow, x).sum(), x)
    np.testing.assert_allclose(found["gradient"], gradient.square().mean(dim=(1, 2)).log(), rtol=1e-3)
    variance = 0.01 if noise is GAUSSIAN else (1 / 128) ** 2 / 12
    clean = flow.patchify(add_noise(pixels, noise, centre_draw(noise.kind)))
    expected = flow.unpatchify((x + variance * gradient - clean).detach())
    np.testing.assert_allclose(found["residual"], expected, rtol=1e-3, atol=1e-5)


def test_a_class_changes_them() -> None:
    flow = make_flow()
    pixels = random_images(flow, 3)
    none = image_statistics(flow, GAUSSIAN, pixels, None, seed=0)
    given = image_statistics(flow, GAUSSIAN, pixels, torch.tensor([0, 1, 0]), seed=0)
    assert not np.allclose(none["bits"], given["bits"])


def test_white_noise_as_latent_fits_its_prior() -> None:
    """A new flow is the identity, so that normal pixels are their own latents; others miss in the way they should."""
    flow = Flow(make_flow().config)
    config = flow.config
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(200, config.num_patches, config.patch_dim, generator=generator)

    def latent(u: torch.Tensor) -> dict[str, float]:
        names = ("mean", "std", "skewness", "kurtosis", "ks", "horizontal", "vertical", "largest")
        return dict(zip(names, flow_statistics(flow, GAUSSIAN, u)[1]["latent"].mean(axis=0).tolist(), strict=True))

    flow.eval()
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    fine = latent(white)
    assert fine["mean"] == pytest.approx(0, abs=0.05)
    assert fine["std"] == pytest.approx(1, abs=0.05)
    assert fine["kurtosis"] == pytest.approx(3, abs=0.5)
    assert latent(2 * white)["std"] == pytest.approx(2, abs=0.1)
    assert latent(white + 1)["mean"] == pytest.approx(1, abs=0.05)
    assert latent(white.abs())["ks"] > 2 * fine["ks"]
    rows = flow.patchify(
        torch.randn(200, config.channels, 1, config.image_size, generator=generator).expand(
            -1, -1, config.image_size, -1
        )
    )
    assert latent(rows)["vertical"] == pytest.approx(1, abs=0.1)
    assert latent(rows)["horizontal"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("value", [0, 255, 128])
def test_flat_pictures_have_finite_features(value: int) -> None:
    flow = make_flow()
    pixels = torch.full_like(random_images(flow, 2), value)
    found = image_statistics(flow, GAUSSIAN, pixels, None, seed=0, gradient=True)
    codes = np.ones((2, 3))
    for features in (
        patch_features(found),
        hidden_features(found),
        latent_features(found),
        summary_features(found, codes),
        excess_bits(found, codes),
        found["gradient"],
        found["residual"],
    ):
        assert np.isfinite(features).all()


def test_large_grids_are_averaged_over_cells() -> None:
    side = 16
    values = np.arange(side * side, dtype=np.float32).reshape(1, 1, -1)
    found = {"log_scale": values, "energy": np.zeros_like(values)}
    features = patch_features(found)
    assert features.shape == (1, 2 * 7 * 7)
    edges = np.linspace(0, side, 8).astype(int)
    square = as_square(values)[0, 0]
    expected = [square[a:b, c:d].mean() for a, b in pairwise(edges) for c, d in pairwise(edges)]
    np.testing.assert_allclose(features[0, :49], expected)
