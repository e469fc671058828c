"""Groups of features made of a flow's statistics and of code lengths: numpy only.

Statistics of B images travel as float32 arrays by name (:mod:`model.anomaly.statistics` computes them):

- ``bits`` (B,): bits/dim of the noised image;
- ``patch_nll`` (B, T): nats of each patch in image order; they sum to −log p;
- ``log_scale`` (B, K, T): Σ α over the values of each patch, by block; −Σ over T is the block's log-determinant;
- ``energy`` (B, K, T): Σ z² over the values of each patch after each block; after the last, of the standard normal u;
- ``latent`` (B, 8): moments of u, its Kolmogorov-Smirnov distance from N(0, 1), its correlation with its neighbours to
  the right and below, its largest value;
- ``hidden`` (B, 3W): what the last block's transformer gives to its output layer: means over the first and the second
  half of its patches, and the standard deviation over all;
- ``gradient`` (B,), only where it was asked for: log of the mean square of ∇_x log p;
- ``residual`` (B, C, H, W), with it: what Tweedie's denoising of the noised image leaves of the image itself,
  x̃ + σ² ∇ log p(x̃) − x: what the model would change.

Sources: Morningstar et al., "Density of States Estimation" (DoSE, arXiv 2006.09273) for a density over several
statistics of a model; Serrà et al. (arXiv 1909.11480) for complexity; Lee et al. (arXiv 1807.03888) for Mahalanobis
distances of hidden features; Choi et al. (arXiv 1810.01392) and Nalisnick et al. (arXiv 1906.02994) for typicality.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistics = dict[str, NDArray[np.float32]]

MOST_CELLS = 7
"""Patches are averaged to a grid of at most so many cells a side: few images don't fit thousands of features."""


def as_square(values_BT: NDArray[np.float32] | Floats) -> Floats:
    """(…, T) values of patches in raster order as (…, G, G) with T = G²."""
    side = math.isqrt(values_BT.shape[-1])
    return np.asarray(values_BT, np.float64).reshape(*values_BT.shape[:-1], side, side)


def _cells(values_BKT: NDArray[np.float32]) -> Floats:
    """Means over a grid of at most :data:`MOST_CELLS` cells a side, (B, K·cells²)."""
    square = as_square(values_BKT)
    side = square.shape[-1]
    edges = np.linspace(0, side, min(side, MOST_CELLS) + 1).astype(int)
    widths = np.diff(edges)
    sums = np.add.reduceat(np.add.reduceat(square, edges[:-1], axis=-1), edges[:-1], axis=-2)
    return np.asarray((sums / np.outer(widths, widths)).reshape(len(square), -1))


def patch_features(statistics: Statistics) -> Floats:
    """Where the likelihood comes from: log-scales of every block and the latent's energy, on a grid."""
    return np.concatenate([_cells(statistics["log_scale"]), _cells(statistics["energy"][:, -1:])], axis=1)


def hidden_features(statistics: Statistics) -> Floats:
    """What the network saw."""
    return np.asarray(statistics["hidden"], np.float64)


def latent_features(statistics: Statistics) -> Floats:
    """Goodness of fit of the latent, and its energy."""
    energy_B = statistics["energy"][:, -1].sum(axis=1, keepdims=True)
    return np.concatenate([statistics["latent"], energy_B], axis=1).astype(np.float64)


def summary_features(statistics: Statistics, codes_BL: Floats | None) -> Floats:
    """Few numbers about the whole image: bits/dim, log-determinants, energies; code lengths (B, L) if known."""
    parts = [
        statistics["bits"][:, None],
        statistics["log_scale"].sum(axis=2, dtype=np.float64),
        statistics["energy"].sum(axis=2, dtype=np.float64),
    ]
    return np.concatenate([*parts, *([] if codes_BL is None else [codes_BL])], axis=1).astype(np.float64)


def excess_bits(statistics: Statistics, codes_BL: Floats) -> Floats:
    """Bits/dim less those of the shortest lossless code (B,): large where the flow is worse than a codec should be."""
    return np.asarray(statistics["bits"].astype(np.float64) - codes_BL.min(axis=1))


def concatenate(parts: list[Statistics]) -> Statistics:
    """The statistics of several batches together."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
