"""A Gaussian mixture over a few features, fitted by expectation maximization: for shapes that one Gaussian misses.

Dempster, Laird and Rubin (1977); plain numpy, seeded, for tens of features and thousands of images.

Shape legend: N images, F features, J components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.anomaly.gaussian import robust_scale, scaled

Floats = NDArray[np.float64]

IMAGES_PER_COMPONENT = 200
MOST_COMPONENTS = 6
REGULARIZATION = 0.01
"""Added to every variance of the scaled features."""
ITERATIONS = 50


@dataclass(frozen=True)
class GaussianMixture:
    """Robust scaling and J Gaussians with full covariances."""

    center_F: Floats
    scale_F: Floats
    log_weight_J: Floats
    mean_JF: Floats
    precision_root_JFF: Floats
    """L with L Lᵀ the inverse covariance, lower triangular."""

    @classmethod
    def fit(cls, values_NF: ArrayLike, seed: int = 0) -> GaussianMixture:
        """Fit as many components as the images carry: one for every 200, at most 6."""
        values = np.asarray(values_NF, np.float64)
        center_F, scale_F = robust_scale(values)
        x_NF = scaled(values, center_F, scale_F)
        count = max(1, min(MOST_COMPONENTS, len(values) // IMAGES_PER_COMPONENT))
        share_NJ = _first_shares(x_NF, count, np.random.Generator(np.random.Philox(key=[seed, 0])))
        mixture = cls._from_shares(center_F, scale_F, x_NF, share_NJ)
        for _ in range(ITERATIONS if count > 1 else 0):
            log_joint_NJ = mixture._log_joint(x_NF)
            share_NJ = np.exp(log_joint_NJ - _logsumexp(log_joint_NJ)[:, None])
            mixture = cls._from_shares(center_F, scale_F, x_NF, share_NJ)
        return mixture

    @classmethod
    def _from_shares(cls, center_F: Floats, scale_F: Floats, x_NF: Floats, share_NJ: Floats) -> GaussianMixture:
        weight_J = share_NJ.sum(axis=0) + 1e-9
        mean_JF = (share_NJ.T @ x_NF) / weight_J[:, None]
        roots = []
        for share_N, weight, mean_F in zip(share_NJ.T, weight_J, mean_JF, strict=True):
            off_NF = x_NF - mean_F
            covariance = (off_NF * share_N[:, None]).T @ off_NF / weight + REGULARIZATION * np.eye(x_NF.shape[1])
            roots.append(np.linalg.cholesky(np.linalg.inv(covariance)))
        return cls(center_F, scale_F, np.log(weight_J / weight_J.sum()), mean_JF, np.stack(roots))

    def _log_joint(self, x_NF: Floats) -> Floats:
        """log of weight × density (N, J) of scaled features."""
        off_JNF = x_NF[None] - self.mean_JF[:, None]
        square_JN = np.square(off_JNF @ self.precision_root_JFF).sum(axis=2)
        log_det_J = np.log(np.diagonal(self.precision_root_JFF, axis1=1, axis2=2)).sum(axis=1)
        constant = -0.5 * x_NF.shape[1] * np.log(2 * np.pi)
        return np.asarray((self.log_weight_J + log_det_J + constant)[None] - 0.5 * square_JN.T)

    def surprise(self, values_NF: ArrayLike) -> Floats:
        """−log density (N,) of the scaled features; values that are not finite count as far."""
        return -_logsumexp(self._log_joint(scaled(np.asarray(values_NF, np.float64), self.center_F, self.scale_F)))


def _first_shares(x_NF: Floats, count: int, random: np.random.Generator) -> Floats:
    """Each image wholly in the component of its nearest centre, chosen by k-means++ and ten steps of Lloyd's."""
    centers = [x_NF[random.integers(len(x_NF))]]
    for _ in range(count - 1):
        nearest_N = np.min([np.square(x_NF - c).sum(axis=1) for c in centers], axis=0) + 1e-12
        centers.append(x_NF[random.choice(len(x_NF), p=nearest_N / nearest_N.sum())])
    center_JF = np.stack(centers)
    for _ in range(10):
        own_N = np.square(x_NF[:, None] - center_JF[None]).sum(axis=2).argmin(axis=1)
        center_JF = np.stack(
            [x_NF[own_N == j].mean(axis=0) if (own_N == j).any() else center_JF[j] for j in range(count)]
        )
    return np.eye(count)[own_N]


def _logsumexp(values_NJ: Floats) -> Floats:
    largest_N = values_NJ.max(axis=1)
    return np.asarray(largest_N + np.log(np.exp(values_NJ - largest_N[:, None]).sum(axis=1)))
