"""Exact log-likelihood of images: dequantization, prior, patch terms, bits per dimension.

Everything is in nats summed per image, on the [-1, 1] pixel scale of the model, until
:func:`bits_per_dim` converts. Formulas: TarFlow (arXiv 2412.06329), section 2 and appendix;
uniform dequantization and its bound: Theis et al. (arXiv 1511.01844), Burda et al. (arXiv 1509.00519).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import NoiseKind, NoiseProtocol
from model.flow import Flow

LOG_2PI = math.log(2 * math.pi)
LAST = 1 - 2.0**-16
"""Largest fraction that float32 can add to every 8-bit value."""


def to_model_range(pixels: Tensor) -> Tensor:
    """8-bit values 0…255 to float32 in [-1, 1], without noise."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_pixels(image: Tensor, kind: NoiseKind = "gaussian") -> Tensor:
    """Float image on the [-1, 1] scale to 8-bit values, clipped; the inverse of :func:`add_noise`.

    Gaussian noise: the nearest value. Uniform dequantization: the value whose unit interval it is in.
    """
    levels = ((image + 1) * 128).floor() if kind == "uniform" else ((image + 1) * 127.5).round()
    return levels.clamp(0, 255).to(torch.uint8)


def centre_draw(kind: NoiseKind) -> float:
    """The ``draw`` of :func:`add_noise` that adds no noise: 0, or the centre of the unit interval."""
    return 0.5 if kind == "uniform" else 0.0


def add_noise(pixels: Tensor, noise: NoiseProtocol, draw: Tensor | float) -> Tensor:
    """Make 8-bit images continuous as the model's training did, or add its noise to latents of a codec.

    ``draw`` has the shape of ``pixels``: standard normal values for a Gaussian-noise model,
    values in [0, 1) for uniform dequantization. Returns float32 images on the [-1, 1] scale, or latents.
    """
    if noise.space == "latents":
        return pixels + noise.std * draw
    if noise.kind == "gaussian":
        return to_model_range(pixels) + noise.std * draw
    # Beyond LAST, float32 would round 255 + draw up to the next 8-bit value.
    return 2 * (pixels.to(torch.float32) + torch.as_tensor(draw).clamp(max=LAST)) / 256 - 1


def prior_terms(z_BTD: Tensor, variance_TD: Tensor) -> Tensor:
    """log N(z; 0, variance) of every dimension, (B, T, D)."""
    return -0.5 * (z_BTD.square() / variance_TD + LOG_2PI + variance_TD.log())


def log_likelihood(flow: Flow, x_BTD: Tensor, y_B: Tensor | None = None) -> Tensor:
    """log p(x | y) of continuous patches, (B,) in nats summed over dimensions."""
    z_BTD, logdet_B = flow(x_BTD, y_B)
    return prior_terms(z_BTD, flow.prior_variance).sum(dim=(1, 2)) + logdet_B


@torch.no_grad()
def encode(flow: Flow, x_BTD: Tensor, y_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Patches to latents u (B, T, D) with a standard normal prior, and log p(x | y) (B,) in nats.

    Decoding without guidance (:class:`model.sampling.sampler.Sampler`) inverts it.
    """
    z_BTD, logdet_B = flow(x_BTD, y_B)
    nats_B = prior_terms(z_BTD, flow.prior_variance).sum(dim=(1, 2)) + logdet_B
    return z_BTD / flow.prior_variance.sqrt(), nats_B


def patch_terms(flow: Flow, x_BTD: Tensor, y_B: Tensor | None = None) -> Tensor:
    """Additive terms ℓ (B, T) in nats with Σ_i ℓ_i = −log p(x | y), in image order.

    ℓ_i sums the prior's terms of patch i and its log-scales α over all blocks. As a sum the
    attribution is exact; as a location it is approximate, since patches mix between blocks.
    """
    steps = flow.trace(x_BTD, y_B)
    terms_BTD = -prior_terms(steps[-1][0], flow.prior_variance)
    for _, alpha_BTD in steps:
        terms_BTD = terms_BTD + alpha_BTD
    return terms_BTD.sum(dim=2)


def combine_draws(log_likelihood_KB: Tensor, noise: NoiseProtocol) -> Tensor:
    """One number per image from K noise draws: (K, B) to (B,).

    Uniform dequantization: log-mean-exp, which tightens the bound on the discrete likelihood as K
    grows. Gaussian noise: the mean, since each draw is the density of another noised image.
    """
    if noise.kind == "uniform":
        return torch.logsumexp(log_likelihood_KB, dim=0) - math.log(log_likelihood_KB.shape[0])
    return log_likelihood_KB.mean(dim=0)


def bits_per_dim(log_likelihood_nats: Tensor | float, num_dims: int, noise: NoiseProtocol) -> Tensor | float:
    """Nats per image to bits per dimension on the 8-bit scale.

    A step of the 8-bit scale is 1/128 of the [-1, 1] scale under uniform dequantization, which maps
    [0, 256) to it, and 1/127.5 for Gaussian noise, which maps [0, 255]. Latents have no such scale: theirs is the
    density's own.
    """
    steps_per_unit = 128.0 if noise.kind == "uniform" else 127.5
    log_step = math.log(steps_per_unit) if noise.space == "pixels" else 0.0
    return (-log_likelihood_nats / num_dims + log_step) / math.log(2)
