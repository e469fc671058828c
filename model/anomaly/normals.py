"""Normal images before they are divided: each counts once.

A conformal p-value holds when the scores of calibration images are exchangeable with that of a new image, and the
densities know none of them. An image that is in both halves breaks both: its score is that of an image the densities
were fitted to. Plain numpy.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def distinct(pixels_NCHW: NDArray[np.uint8], known_MCHW: NDArray[np.uint8] | None = None) -> NDArray[np.int64]:
    """Indices, rising, of the first of each image among 8-bit images (N, C, H, W) that is not among the known ones.

    Images are the same where all pixels are: an image and its copy in another file format, if that is lossless.
    """
    known = set() if known_MCHW is None else {_digest(pixels) for pixels in known_MCHW}
    first: dict[bytes, int] = {}
    for index, pixels in enumerate(pixels_NCHW):
        first.setdefault(_digest(pixels), index)
    return np.array([index for digest, index in first.items() if digest not in known], np.int64)


def _digest(pixels_CHW: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels_CHW).data).digest()
