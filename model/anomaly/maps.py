"""Where an image is unusual: a map of its pixels with a scale that was calibrated on normal images.

Two views are added. A patch's share of −log p, as a robust z against the same place in normal images, is exact as a
sum and coarse as a place; both of its tails count, since a blank patch is *too* likely. The gradient ∇_x log p, which
is Tweedie's denoising step over σ², says at the resolution of pixels what the model would change. Each is in units of
what is usual at that place, and so is their sum: its colours mean the same in every picture of a calibration.

Shape legend: B images, C channels, H = W pixels, T patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.anomaly.features import Statistics, as_square
from model.anomaly.gaussian import MAD_TO_STD

if TYPE_CHECKING:
    from model.anomaly.detector import Detector

Floats = NDArray[np.float64]

NORMAL_SHARE = 0.95
"""Share of normal images whose map exceeds the threshold nowhere."""
BLUR = (0.25, 0.5, 0.25)
"""Binomial weights that smooth gradients over neighbours: single pixels of noise are no defect."""


@dataclass(frozen=True)
class MapScale:
    """What is usual at every pixel, and beyond what a map shows a region."""

    shape: Floats
    """Channels and pixels a side, (2,)."""
    center_HW: Floats
    """Median of the gradient's magnitude."""
    scale_HW: Floats
    """Its robust scale."""
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
    def fit(cls, statistics: Statistics, detector: Detector, pixels_shape: tuple[int, ...]) -> MapScale:
        """From the statistics of normal images, with gradients, and the shape (N, C, H, W) of their pixels."""
        magnitude_BHW = _magnitude(statistics["gradient"])
        center_HW = np.median(magnitude_BHW, axis=0)
        mad_HW = np.median(np.abs(magnitude_BHW - center_HW), axis=0)
        scale_HW = np.maximum(MAD_TO_STD * mad_HW, 0.05 * np.median(mad_HW) + 1e-9)
        shape = np.array(pixels_shape[1:3], np.float64)
        unfinished = cls(shape, center_HW, scale_HW, 0.0)
        peaks_B = unfinished.maps(statistics, detector).max(axis=(1, 2))
        return cls(shape, center_HW, scale_HW, float(np.quantile(peaks_B, NORMAL_SHARE)))

    def maps(self, statistics: Statistics, detector: Detector) -> Floats:
        """Maps (B, H, W): about 1 where an image is as unusual as normal images are now and then."""
        z_BHW = self.patch_map(statistics, detector)
        off_BHW = np.maximum(0.0, (_magnitude(statistics["gradient"]) - self.center_HW) / self.scale_HW)
        return np.nan_to_num(z_BHW + off_BHW, nan=np.inf)

    def patch_map(self, statistics: Statistics, detector: Detector) -> Floats:
        """|z| of the patches at the resolution of pixels (B, H, W)."""
        square = as_square(np.abs(detector.patch_z(statistics)))
        times = self.image_size // square.shape[-1]
        return square.repeat(times, axis=-1).repeat(times, axis=-2)


def _magnitude(gradient_BCHW: NDArray[np.float32]) -> Floats:
    """Length of the gradient over the channels, smoothed over 3 × 3 pixels (B, H, W)."""
    length_BHW = np.sqrt(np.square(gradient_BCHW.astype(np.float64)).sum(axis=1))
    for axis in (1, 2):
        padded = np.pad(length_BHW, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
        parts = [padded.take(range(i, i + length_BHW.shape[axis]), axis=axis) for i in range(3)]
        length_BHW = np.asarray(sum(w * part for w, part in zip(BLUR, parts, strict=True)))
    return length_BHW
