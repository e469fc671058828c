"""What rounding does to statistics, and how scores are kept from telling it.

A flow's float32 statistics differ in their last digits from batch to batch and from device to device. Of normal images
that are nearly the same, as of a camera on a static scene, these digits may be all that differs; in units of that, the
same image in another batch would be far off. So what varies no more than rounding counts as constant and has a scale
far above it, and scores that are as good as equal count as equal. Plain numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ROUNDING = 100 * float(np.finfo(np.float32).eps)
"""Share of their size by which statistics may be off: errors add up over many layers."""
CONSTANT = 1000.0
"""The scale of what is constant, in its rounding: errors then count for next to nothing, and one part in a hundred is
a deviation as large as any."""
SLACK = 1e-4
"""Share of their size by which scores of calibration images are raised: far below what normal images differ by."""


def rounding(values: ArrayLike) -> Floats:
    """By how much statistics of this size may be off; those about zero are mostly differences of values about one."""
    return ROUNDING * (1 + np.abs(np.asarray(values, np.float64)))


def raised(scores: Floats, share: float = SLACK) -> Floats:
    """Scores as high as others may be and still count as equal; in the same order.

    A p-value that counts raised scores of calibration images is no smaller than it was, so that it holds as before.
    """
    size = np.where(np.isfinite(scores), np.abs(scores), 0.0)
    return np.asarray(scores + share * (1 + size))
