"""Nearest neighbours: precision and recall of samples, and whether samples are copies of training images.

Improved precision and recall: Kynkäänniemi et al. (arXiv 1904.06991). A set of images is taken as the union of balls
around its feature vectors, each as wide as the distance of its k-th nearest neighbour. Precision is the share of the
samples inside of the real images' balls (do they look real?), recall that of the real images inside of the samples'
(is all of the data there?). Both depend on the numbers of images, which therefore stand beside them.

Shape legend: N samples, M real images, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.accuracy import wilson_interval

NEIGHBOURS = 3
ROWS_PER_PRODUCT = 1024


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Shares, with the counts that they are of."""

    neighbours: int
    """k."""
    precise: int
    """Samples inside of the real images' balls."""
    num_samples: int
    recalled: int
    """Real images inside of the samples' balls."""
    num_real: int

    @property
    def precision(self) -> float:
        return self.precise / self.num_samples

    @property
    def recall(self) -> float:
        return self.recalled / self.num_real

    @property
    def precision_interval(self) -> tuple[float, float]:
        """95% (Wilson), of the choice of the samples."""
        return wilson_interval(self.precise, self.num_samples)

    @property
    def recall_interval(self) -> tuple[float, float]:
        """95% (Wilson), of the choice of the real images."""
        return wilson_interval(self.recalled, self.num_real)


def precision_recall(samples_NF: Tensor, real_MF: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Precision and recall of samples; raises ``ValueError`` for sets that have no k-th neighbour."""
    for name, features in (("samples", samples_NF), ("real images", real_MF)):
        if len(features) <= neighbours:
            raise ValueError(f"{name}: got {len(features)}, allowed is more than neighbours = {neighbours}")
    x_NF, y_MF = samples_NF.double(), real_MF.double()
    return PrecisionRecall(
        neighbours=neighbours,
        precise=_covered(x_NF, y_MF, neighbours),
        num_samples=len(x_NF),
        recalled=_covered(y_MF, x_NF, neighbours),
        num_real=len(y_MF),
    )


def _covered(x_NF: Tensor, y_MF: Tensor, neighbours: int) -> int:
    """How many x lie in a ball around some y."""
    # The nearest of all is the vector itself.
    radii = [torch.cdist(rows, y_MF).kthvalue(neighbours + 1, dim=1).values for rows in y_MF.split(ROWS_PER_PRODUCT)]
    radius_M = torch.cat(radii)
    return sum(int((torch.cdist(rows, y_MF) <= radius_M).any(dim=1).sum()) for rows in x_NF.split(ROWS_PER_PRODUCT))


@dataclass(frozen=True)
class Nearest:
    """For each of some images the nearest of others."""

    index: NDArray[np.int64]
    """Which one, (N,)."""
    distance: NDArray[np.float64]
    """Root mean square difference of their values in 8-bit steps, (N,)."""


def nearest_images(
    images_NCHW: NDArray[np.uint8],
    others_MCHW: NDArray[np.uint8],
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda count: None,
) -> Nearest:
    """The nearest of the others by their pixels; raises ``ValueError`` when there are none, or of another size."""
    if not len(others_MCHW) or images_NCHW.shape[1:] != others_MCHW.shape[1:]:
        raise ValueError(f"others: got shape {others_MCHW.shape}, allowed is images of shape {images_NCHW.shape[1:]}")
    x_NF, y_MF = images_NCHW.reshape(len(images_NCHW), -1), others_MCHW.reshape(len(others_MCHW), -1)
    indices, distances = [], []
    for first in range(0, len(x_NF), ROWS_PER_PRODUCT):
        rows = x_NF[first : first + ROWS_PER_PRODUCT]
        a_RF = _centred(rows, device)
        best_R = torch.full((len(rows),), torch.inf, device=device)
        index_R = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in range(0, len(y_MF), 8 * ROWS_PER_PRODUCT):
            b_KF = _centred(y_MF[start : start + 8 * ROWS_PER_PRODUCT], device)
            squared_RK = b_KF.square().sum(dim=1) - 2 * a_RF @ b_KF.T
            value_R, at_R = squared_RK.min(dim=1)
            closer_R = value_R < best_R
            best_R, index_R = torch.where(closer_R, value_R, best_R), torch.where(closer_R, start + at_R, index_R)
        found = index_R.cpu().numpy()
        # Anew from the pixels: the expanded square has lost the digits of small distances.
        difference_RF = rows.astype(np.float64) - y_MF[found]
        indices.append(found)
        distances.append(np.sqrt(np.square(difference_RF).mean(axis=1)))
        advance(len(rows))
    return Nearest(np.concatenate(indices), np.concatenate(distances))


def _centred(pixels_NF: NDArray[np.uint8], device: torch.device | str) -> Tensor:
    """Values around zero, of which less is rounded away; a copy, since a file's own bytes cannot be written to."""
    return torch.from_numpy(pixels_NF.copy()).to(device).float() - 127.5
