"""Seeded noise: the same numbers for a seed on every device, in every batch.

Philox counters come from numpy, whose bit generators' raw streams are guaranteed never to change
(NEP 19); turning bits into numbers is done here, because numpy gives no such promise for that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import MAX_SEED, NoiseKind


class Stream(IntEnum):
    """Independent streams of one seed; the numbers are part of what makes a seed reproducible."""

    LATENT = 0
    INPUT_NOISE = 1


def _uniform(seed: int, stream: Stream, draw: int, count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1) with 53 random bits, a function of (seed, stream, draw)."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: got {seed}, allowed is an integer in [0, {MAX_SEED}]")
    bits = np.random.Philox(key=[seed, int(stream) + (draw << 8)]).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _normal(seed: int, stream: Stream, draw: int, count: int) -> NDArray[np.float64]:
    """``count`` standard normal numbers by the Box-Muller transform."""
    u = _uniform(seed, stream, draw, 2 * ((count + 1) // 2)).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log1p(-u[0])), 2 * np.pi * u[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def latents(seeds: Sequence[int], num_patches: int, patch_dim: int) -> Tensor:
    """Standard normal latents u (B, T, D) float32, one row per seed."""
    rows = [_normal(seed, Stream.LATENT, 0, num_patches * patch_dim) for seed in seeds]
    return torch.from_numpy(np.stack(rows).astype(np.float32)).view(len(rows), num_patches, patch_dim)


def input_noise(kind: NoiseKind, seed: int, draws: int, shape: tuple[int, ...], first: int = 0) -> Tensor:
    """Noise for K scored copies of an image, (K, *shape) float32: standard normal, or U[0, 1).

    ``first`` is the number of the first draw. The noise depends on the seed and the draw, not on the
    image, so that an image's score does not depend on its place in a request.
    """
    count = int(np.prod(shape))
    make = _normal if kind == "gaussian" else _uniform
    rows = np.stack([make(seed, Stream.INPUT_NOISE, draw, count) for draw in range(first, first + draws)])
    noise = rows.astype(np.float32)
    if kind == "uniform":
        # Rounding to float32 can reach 1, which belongs to the next 8-bit value.
        noise = np.minimum(noise, np.float32(1 - 2.0**-24))
    return torch.from_numpy(noise).view(draws, *shape)
