"""Anomaly scores: groups of features, their densities on normal images, and how they are combined.

The combined score is a weighted sum of −log p, as in Fisher's method, of four views that fail in different places:
*where* the likelihood comes from and what the network saw; the few numbers about the whole image, code lengths among
them; complexity; and how well the latent fits its prior, which finds small flaws. The weights were chosen on the
development sets of ``benchmarks/negatives.py``; ``benchmarks/anomaly.py`` reports on others, and docs/anomaly.md says
what was tried.

Shape legend: B images, T patches, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.anomaly.features import (
    Statistics,
    excess_bits,
    hidden_features,
    latent_features,
    patch_features,
    summary_features,
)
from model.anomaly.gaussian import MAD_TO_STD, ShrunkGaussian, robust_scale
from model.anomaly.mixture import GaussianMixture
from model.anomaly.rounding import CONSTANT, rounding
from model.anomaly.tail import Tail

Floats = NDArray[np.float64]

SCORES = ("combined", "nll", "typicality", "complexity", "latent", "gradient", "max_patch")
"""Scores that a request may choose; larger is more anomalous."""
CODE_FREE = "combined_without_codes"
"""Stands in for ``combined`` where codecs give other lengths than they did in the calibration."""
SUMMARY_WEIGHT, COMPLEXITY_WEIGHT, LATENT_WEIGHT = 0.5, 0.6, 0.3
"""Weights of these beside the first view, whose weight is one. The optimum is flat: the second digit means nothing."""
FOLDS = 5
TOP_PATCHES = 0.1
"""Share of the patches, the most remarkable ones, that ``max_patch`` is the mean of."""
LEAST_SPREAD = 0.05
"""Of the distances from a Gaussian, which are about one: those of images that are nearly the same have no spread."""
FEWEST_IMAGES = 10
"""Images without which nothing can be fitted."""


@dataclass(frozen=True)
class Detector:
    """Everything that was fitted on normal images."""

    patches: ShrunkGaussian
    hidden: ShrunkGaussian
    latent: ShrunkGaussian
    summary: GaussianMixture
    summary_without_codes: GaussianMixture
    shape_scale: Floats
    """Median and scale of the distances of ``patches`` and of ``hidden``, (2, 2)."""
    shape_tail: Tail
    latent_tail: Tail
    summary_tail: Tail
    summary_without_codes_tail: Tail
    complexity_tail: Tail
    bits_center: Floats
    """Median bits/dim, (1,)."""
    patch_center_T: Floats
    patch_scale_T: Floats

    @classmethod
    def fit(cls, statistics: Statistics, codes_BL: Floats) -> Detector:
        """Fit to the statistics and code lengths of normal images; ``ValueError`` for fewer than 10."""
        count = len(statistics["bits"])
        if count < FEWEST_IMAGES:
            raise ValueError(f"normal images: got {count} to fit to, allowed are {FEWEST_IMAGES} and more")
        # One group after the other: as float64 each is large.
        patches, patches_left_out = _gaussian(patch_features(statistics))
        hidden, hidden_left_out = _gaussian(hidden_features(statistics))
        latent, latent_left_out = _gaussian(latent_features(statistics))
        summary, without = summary_features(statistics, codes_BL), summary_features(statistics, None)
        shape_scale = np.stack([np.array(robust_scale(values)) for values in (patches_left_out, hidden_left_out)])
        shape_scale[:, 1] = np.maximum(shape_scale[:, 1], LEAST_SPREAD)
        patch_center_T, patch_scale_T = _patch_scale(statistics["patch_nll"])
        return cls(
            patches=patches,
            hidden=hidden,
            latent=latent,
            summary=GaussianMixture.fit(summary),
            summary_without_codes=GaussianMixture.fit(without),
            shape_scale=shape_scale,
            shape_tail=Tail.fit(_shape(shape_scale, patches_left_out, hidden_left_out)),
            latent_tail=Tail.fit(latent_left_out),
            summary_tail=Tail.fit(_left_out(summary, lambda part: GaussianMixture.fit(part).surprise)),
            summary_without_codes_tail=Tail.fit(_left_out(without, lambda part: GaussianMixture.fit(part).surprise)),
            complexity_tail=Tail.fit(excess_bits(statistics, codes_BL)),
            bits_center=np.array([np.median(statistics["bits"])], np.float64),
            patch_center_T=patch_center_T,
            patch_scale_T=patch_scale_T,
        )

    def patch_z(self, statistics: Statistics) -> Floats:
        """Robust z (B, T) of each patch's nats: positive where it is less likely there than normal images are."""
        off_BT = (statistics["patch_nll"].astype(np.float64) - self.patch_center_T) / self.patch_scale_T
        return np.nan_to_num(off_BT, nan=np.inf)

    def scores(self, statistics: Statistics, codes_BL: Floats | None) -> Mapping[str, Floats]:
        """Scores (B,) by name; those that need code lengths or the gradient only where these are given."""
        bits_B = statistics["bits"].astype(np.float64)
        shape_B = _shape(
            self.shape_scale,
            self.patches.distance(patch_features(statistics)),
            self.hidden.distance(hidden_features(statistics)),
        )
        latent_B = self.latent.distance(latent_features(statistics))
        base_B = self.shape_tail.surprise(shape_B) + LATENT_WEIGHT * self.latent_tail.surprise(latent_B)
        without_B = self.summary_without_codes.surprise(summary_features(statistics, None))
        top = max(1, round(TOP_PATCHES * statistics["patch_nll"].shape[1]))
        scores = {
            CODE_FREE: base_B + SUMMARY_WEIGHT * self.summary_without_codes_tail.surprise(without_B),
            "nll": bits_B,
            "typicality": np.abs(bits_B - self.bits_center[0]),
            "latent": latent_B,
            "max_patch": np.sort(np.abs(self.patch_z(statistics)), axis=1)[:, -top:].mean(axis=1),
        }
        if codes_BL is not None:
            excess_B = excess_bits(statistics, codes_BL)
            summary_B = self.summary.surprise(summary_features(statistics, codes_BL))
            scores["complexity"] = excess_B
            scores["combined"] = (
                base_B
                + SUMMARY_WEIGHT * self.summary_tail.surprise(summary_B)
                + COMPLEXITY_WEIGHT * self.complexity_tail.surprise(excess_B)
            )
        if "gradient" in statistics:
            scores["gradient"] = statistics["gradient"].astype(np.float64)
        # What the flow has no finite value for is as anomalous as anything.
        return {
            name: np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=np.inf) for name, values in scores.items()
        }


def _shape(scale_22: Floats, patches_B: Floats, hidden_B: Floats) -> Floats:
    """Sum of both distances, each in its own robust units."""
    (first, first_scale), (second, second_scale) = scale_22
    return np.asarray((patches_B - first) / first_scale + (hidden_B - second) / second_scale)


def _gaussian(values_NF: Floats) -> tuple[ShrunkGaussian, Floats]:
    """A density of images, and the distance (N,) of each from one that was fitted without it.

    A density flatters the images that it was fitted to: what is usual is measured on images left out in turn.
    """
    return ShrunkGaussian.fit(values_NF), _left_out(values_NF, lambda part: ShrunkGaussian.fit(part).distance)


def _left_out(values_NF: Floats, fit: Callable[[Floats], Callable[[Floats], Floats]]) -> Floats:
    """What each image is given by a density that was fitted without it, in five folds."""
    fold_N = np.arange(len(values_NF)) % FOLDS
    result_N = np.empty(len(values_NF))
    for fold in range(FOLDS):
        result_N[fold_N == fold] = fit(values_NF[fold_N != fold])(values_NF[fold_N == fold])
    return result_N


def _patch_scale(patch_nll_BT: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Median and scale of each position; corners that are always alike have next to none of their own."""
    values = patch_nll_BT.astype(np.float64)
    center_T = np.median(values, axis=0)
    mad_T = np.median(np.abs(values - center_T), axis=0)
    return center_T, np.maximum(np.maximum(MAD_TO_STD * mad_T, 0.05 * np.median(mad_T)), CONSTANT * rounding(center_T))
