"""Guidance as the published samplers have it: one weight, schedule and temperature for all rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Guidance(NamedTuple):
    """v ← v + w_k (v − v_u) for α and μ of patch k (TarFlow, section 2.6); v_u takes a pass of its own."""

    scale: float
    """Weight w; 0 for no second pass."""
    linear: bool
    """Whether w_k = w·k/(T−1) rather than w."""
    attention_temperature: float
    """Temperature τ of the second pass."""

    def weight(self, index: int, num_patches: int) -> float:
        """w_k of patch ``index`` = k of 1…T−1 in the block's own order."""
        return self.scale * index / (num_patches - 1) if self.linear else self.scale

    def weights(self, first: int, end: int, num_patches: int, like: Tensor) -> Tensor:
        """w_k of the patches ``first`` … ``end − 1`` as a column (N, 1) beside α and μ (B, N, D)."""
        weights = [self.weight(index, num_patches) for index in range(first, end)]
        return torch.tensor(weights, dtype=like.dtype, device=like.device).unsqueeze(1)


Affine = tuple[Tensor, Tensor]
"""The log-scale α and the shift μ of the same patches."""


def combine(own: Affine, other: Affine, weight: float | Tensor) -> Affine:
    """α and μ of a pass, led away from those of the other pass."""
    alpha, mu = (mine + weight * (mine - its) for mine, its in zip(own, other, strict=True))
    return alpha, mu
