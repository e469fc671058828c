"""Where an image is unusual: a map of its pixels with a scale that was calibrated on normal images.

Two views are added. A patch's share of −log p, as a robust z against the same place in normal images, is exact as a
sum and coarse as a place; both of its tails count, since a blank patch is *too* likely; it is smoothed and its
logarithm taken, because a patch may be a hundred deviations off. The denoising residual says at the resolution of
pixels what the model would change, in units of what it usually changes there. Their sum is divided by what one normal
image in a hundred has at the same place: corners and edges differ. Nothing is stretched image by image, so that a
colour means the same in every picture of a calibration. Chosen on the small occlusions of ``benchmarks/negatives.py``.

Shape legend: B images, C channels, H = W pixels, T patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.anomaly.features import Statistics, as_square
from model.anomaly.rounding import raised

if TYPE_CHECKING:
    from model.anomaly.detector import Detector

Floats = NDArray[np.float64]

NORMAL_SHARE = 0.95
"""Share of normal images whose map exceeds the threshold nowhere."""
BLUR = (0.25, 0.5, 0.25)
"""Binomial weights that smooth over neighbours: single pixels of noise are no defect."""
PATCH_SMOOTHINGS = 3
"""How often the patches' part is smoothed, so that its blocks do not show."""
RARE_SHARE = 0.99
"""Share of normal images that have less at a place than what is 1 on the map."""
LEAST_SHARE = 0.5
"""A pixel's usual residual is at least this share of that of all pixels: in corners next to nothing is usual."""
ROWS = 64
"""Images whose maps are made at a time: those of a whole calibration would take several times its memory."""


@dataclass(frozen=True)
class MapScale:
    """What is usual at every pixel, and beyond what a map shows a region."""

    shape: Floats
    """Channels and pixels a side, (2,)."""
    usual_HW: Floats
    """Usual size of the denoising residual."""
    rare_HW: Floats
    """What one normal image in a hundred has of the two views' sum, smoothed."""
    threshold: float
    """95% of normal images exceed this nowhere."""

    @property
    def channels(self) -> int:
        """Colour channels of the images."""
        return int(self.shape[0])

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self.shape[1])

    @classmethod
    def fit(
        cls, statistics: Statistics, images_M: NDArray[np.int64], detector: Detector, pixels_shape: tuple[int, ...]
    ) -> MapScale:
        """From the statistics of these normal images, with gradients, and the shape (N, C, H, W) of all pixels."""
        parts = _parts(statistics, images_M)
        mean_HW = np.sum([_size(part["residual"]).sum(axis=0) for part in parts], axis=0) / len(images_M)
        usual_HW = np.maximum(mean_HW, LEAST_SHARE * mean_HW.mean() + 1e-9)
        shape, ones_HW = np.array(pixels_shape[1:3], np.float64), np.ones_like(usual_HW)
        unscaled = cls(shape, usual_HW, ones_HW, 0.0)
        sums = (unscaled.maps(part, detector) for part in _parts(statistics, images_M))
        rare_HW = _smooth(upper_quantile(sums, len(images_M), RARE_SHARE)[None])[0]
        return cls(shape, usual_HW, rare_HW, 0.0)

    def with_threshold(self, statistics: Statistics, images_M: NDArray[np.int64], detector: Detector) -> MapScale:
        """The same with a threshold by these normal images, others than it was fitted to.

        Of m of them the ⌈0.95 (m + 1)⌉-th smallest peak, or the largest for fewer than 19: a further normal image
        exceeds it with a probability of at most 5%, or of 1/(m + 1), as a conformal p-value has it.
        """
        parts = _parts(statistics, images_M)
        peaks_M = np.concatenate([self.maps(part, detector).max(axis=(1, 2)) for part in parts])
        rank = min(len(peaks_M), math.ceil(NORMAL_SHARE * (len(peaks_M) + 1)))
        return replace(self, threshold=float(np.float32(raised(np.sort(peaks_M))[rank - 1])))

    def maps(self, statistics: Statistics, detector: Detector) -> Floats:
        """Maps (B, H, W): 1 where one normal image in a hundred has as much. The statistics must have ``residual``."""
        patches_BHW = self.patch_map(statistics, detector)
        for _ in range(PATCH_SMOOTHINGS):
            patches_BHW = _smooth(patches_BHW)
        sums_BHW = np.log1p(patches_BHW) + _size(statistics["residual"]) / self.usual_HW
        return np.nan_to_num(sums_BHW / self.rare_HW, nan=np.inf)

    def patch_map(self, statistics: Statistics, detector: Detector) -> Floats:
        """|z| of the patches at the resolution of pixels (B, H, W)."""
        square = as_square(np.abs(detector.patch_z(statistics)))
        times = self.image_size // square.shape[-1]
        return square.repeat(times, axis=-1).repeat(times, axis=-2)


def _parts(statistics: Statistics, images_M: NDArray[np.int64]) -> Iterator[Statistics]:
    """What maps are made of, of some of the images in turn."""
    for start in range(0, len(images_M), ROWS):
        rows = images_M[start : start + ROWS]
        yield {name: statistics[name][rows] for name in ("patch_nll", "residual")}


def upper_quantile(parts: Iterable[Floats], count: int, share: float) -> Floats:
    """Quantile (H, W) over ``count`` images that come in parts (B, H, W), interpolated; keeps those above it alone."""
    place = share * (count - 1)
    below = math.floor(place)
    largest_KHW: Floats | None = None
    for part_BHW in parts:
        together = part_BHW if largest_KHW is None else np.concatenate([largest_KHW, part_BHW])
        surplus = len(together) - (count - below)
        largest_KHW = np.partition(together, surplus, axis=0)[surplus:] if surplus > 0 else together
    ordered_KHW = np.sort(np.asarray(largest_KHW), axis=0)
    low_HW, high_HW = ordered_KHW[0], ordered_KHW[min(1, count - below - 1)]
    return np.asarray(low_HW + (place - below) * (high_HW - low_HW))


def _size(residual_BCHW: NDArray[np.float32]) -> Floats:
    """Length of the residual over the channels, smoothed (B, H, W)."""
    return _smooth(np.sqrt(np.square(residual_BCHW.astype(np.float64)).sum(axis=1)))


def _smooth(values_BHW: Floats) -> Floats:
    """Weighted means over 3 × 3 pixels; the border repeats itself."""
    for axis in (1, 2):
        padded = np.pad(values_BHW, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
        parts = [padded.take(range(i, i + values_BHW.shape[axis]), axis=axis) for i in range(3)]
        values_BHW = np.asarray(sum(w * part for w, part in zip(BLUR, parts, strict=True)))
    return values_BHW
