"""A Gaussian over many features from few images: robust scaling, then a shrunk covariance.

The Mahalanobis distance under it is the classic score of a group of features that belong together. Ledoit and Wolf,
"A well-conditioned estimator for large-dimensional covariance matrices" (J. Multivariate Analysis, 2004), say how far
to shrink the sample covariance towards a multiple of the identity; plain numpy.

Shape legend: N images, F features, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.anomaly.rounding import CONSTANT, rounding

Floats = NDArray[np.float64]

MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_SCALE = 0.1
"""A scale is at least this share of the standard deviation: features that are mostly constant have no spread else."""
LEAST_VARIANCE = 1e-4
"""Of any direction of scaled features: where features depend on each other, only rounding is left of them."""
FAR = 20.0
"""Scaled features are cut off here; one wild value must not hide what the others say."""
MOST_DIRECTIONS = 256
"""Directions of largest variance that are kept; the others count with their mean variance."""
ROWS, COLUMNS = 1024, 256
"""Images, or features, that are worked on at a time: many thousand images take next to no memory beside themselves."""


def robust_scale(values_NF: ArrayLike) -> tuple[Floats, Floats]:
    """Median (F,) and scale (F,): 1.4826 · MAD, with a floor that is far above rounding for what is constant."""
    values = np.asarray(values_NF, np.float64)
    if values.ndim == 2 and values.shape[1] > COLUMNS:
        parts = [robust_scale(values[:, start : start + COLUMNS]) for start in range(0, values.shape[1], COLUMNS)]
        return np.concatenate([center for center, _ in parts]), np.concatenate([scale for _, scale in parts])
    center = np.median(values, axis=0)
    spread = MAD_TO_STD * np.median(np.abs(values - center), axis=0)
    spread = np.maximum(spread, LEAST_SCALE * values.std(axis=0))
    return center, np.where(spread > rounding(center), spread + rounding(center), CONSTANT * rounding(center))


@dataclass(frozen=True)
class ShrunkGaussian:
    """Robust scaling and a covariance λ₀ I + Σ_r (λ_r − λ₀) v_r v_rᵀ of the scaled features."""

    center_F: Floats
    scale_F: Floats
    mean_F: Floats
    """Mean of the scaled features."""
    directions_RF: Floats
    """v_r, orthonormal."""
    variances_R: Floats
    """λ_r."""
    base_variance: float
    """λ₀, of every direction that is not kept."""

    @classmethod
    def fit(cls, values_NF: ArrayLike) -> ShrunkGaussian:
        """Fit to features (N, F) of at least two images; values that are not finite are refused."""
        values = np.asarray(values_NF, np.float64)
        if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"values_NF: got shape {values.shape}, allowed are finite features of two images or more")
        center_F, scale_F = robust_scale(values)
        count, num_features = values.shape

        def parts(mean_F: Floats | float = 0.0) -> Iterator[Floats]:
            return (scaled(values[start : start + ROWS], center_F, scale_F) - mean_F for start in range(0, count, ROWS))

        mean_F = np.sum([part_MF.sum(axis=0) for part_MF in parts()], axis=0) / count
        sample_R, directions_RF = _principal(lambda: parts(mean_F), count, num_features)
        norm_N = np.concatenate([np.square(part_MF).sum(axis=1) for part_MF in parts(mean_F)])
        total, mean_variance = float(sample_R.sum()), float(sample_R.sum()) / num_features
        spread = float((sample_R**2).sum()) - num_features * mean_variance**2
        # Σ_k ‖x_k x_kᵀ − S‖² / N², the sampling variance of S.
        noise = (float(norm_N @ norm_N) / count - float((sample_R**2).sum())) / count
        shrinkage = 1.0 if spread <= 0 else min(1.0, max(0.0, noise / spread))
        kept = min(MOST_DIRECTIONS, len(sample_R))
        rest = num_features - kept
        others = (1 - shrinkage) * (total - float(sample_R[:kept].sum())) / rest if rest else 0.0
        floor = shrinkage * mean_variance + LEAST_VARIANCE
        # A copy: a view would keep all directions.
        return cls(
            center_F,
            scale_F,
            mean_F,
            directions_RF[:kept].copy(),
            (1 - shrinkage) * sample_R[:kept] + floor,
            others + floor,
        )

    def distance(self, values_NF: ArrayLike) -> Floats:
        """Squared Mahalanobis distance over the number of features (N,): about one for images like those fitted.

        Values that are not finite count as far.
        """
        values = np.asarray(values_NF, np.float64)
        if len(values) > ROWS:
            return np.concatenate([self.distance(values[i : i + ROWS]) for i in range(0, len(values), ROWS)])
        off_NF = scaled(values, self.center_F, self.scale_F) - self.mean_F
        along_NR = off_NF @ self.directions_RF.T
        outside_N = (off_NF**2).sum(axis=1) - (along_NR**2).sum(axis=1)
        inside_N = (along_NR**2 / self.variances_R).sum(axis=1)
        return np.asarray((inside_N + outside_N / self.base_variance) / len(self.center_F))


def _principal(parts: Callable[[], Iterator[Floats]], count: int, num_features: int) -> tuple[Floats, Floats]:
    """Variances (R,), largest first, and directions (R, F) of centred features that come in parts (M, F)."""
    if count < num_features:
        # Few images: through their singular values, without a covariance that is larger than they are.
        _, singular_R, directions_RF = np.linalg.svd(np.concatenate(list(parts())), full_matrices=False)
        return singular_R**2 / count, directions_RF
    covariance_FF = np.zeros((num_features, num_features))
    for part_MF in parts():
        covariance_FF += part_MF.T @ part_MF
    # It squares the condition, which costs digits of variances far below LEAST_VARIANCE alone.
    variance_R, direction_FR = np.linalg.eigh(covariance_FF)
    return np.maximum(variance_R[::-1], 0) / count, direction_FR.T[::-1]


def scaled(values_NF: Floats, center_F: Floats, scale_F: Floats) -> Floats:
    """Features off their centres in units of their scales, cut off at :data:`FAR`; not finite is far."""
    off_NF = values_NF - center_F
    off_NF /= scale_F
    return np.nan_to_num(np.clip(off_NF, -FAR, FAR, out=off_NF), copy=False, nan=FAR)
