"""Guidance of the affine parameters: pure functions on tensors, one weight per row and patch.

Each patch is x = z·exp(α) + μ, a Gaussian with mean μ and standard deviation σ = exp(α) given the patches
before it. Guidance compares it with that of a second pass (without class, or with tempered attention), α_u and μ_u.

- linear: v + w (v − v_u) for α and μ (TarFlow, arXiv 2412.06329, section 2.6);
- closed form: the mean and deviation of the Gaussian ∝ p·(p/p_u)^w where that is one, with the ratio of variances
  s = min(σ/σ_u, 1)² bounded (STARFlow, arXiv 2506.06276): σ/√d and ((1+w)μ − w·s·μ_u)/d with d = 1 + w − w·s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ramps(num_patches: int, like: Tensor) -> Tensor:
    """Share of the weight for each patch k in 0…T−1 of a block's own order, (schedules, T): see ``SCHEDULES``.

    In the order of ``SCHEDULES``: constant 1, linear k/(T−1), cosine (1 − cos(π·k/(T−1)))/2.
    """
    part_T = torch.arange(num_patches, dtype=torch.float64) / (num_patches - 1)
    cosine_T = (1 - torch.cos(math.pi * part_T)) / 2
    return torch.stack([torch.ones_like(part_T), part_T, cosine_T]).to(like)


def patch_weights(scale_B: Tensor, schedule_B: Tensor, num_patches: int) -> Tensor:
    """Weight w_k of every patch, (B, T), from each row's weight w and the index of its schedule."""
    return scale_B.unsqueeze(1) * ramps(num_patches, scale_B)[schedule_B]


def guide_linear(value: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """v + w (v − v_u); exactly v where w = 0."""
    return torch.lerp(other, value, 1 + weight)


def guide_closed_form(
    alpha: Tensor, mu: Tensor, other_alpha: Tensor, other_mu: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Guided (α, μ) of the closed-form rule; exactly (α, μ) where w = 0."""
    ratio = torch.exp(2 * (alpha - other_alpha).clamp(max=0))
    divisor = 1 + weight - weight * ratio
    return alpha - torch.log(divisor) / 2, ((1 + weight) * mu - weight * ratio * other_mu) / divisor
