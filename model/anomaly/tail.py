"""How surprising a score is, in nats: −log of the share of normal images that score as high, beyond all that was seen.

Below the knee the share is counted; above it scores are taken to fall off exponentially, the simplest of the tails of
extreme value theory (Pickands 1975), so that far and very far still differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.anomaly.rounding import raised

Floats = NDArray[np.float64]

KNEE = 0.9
"""Share of the normal images below the knee."""
MOST = 60.0
"""Largest surprise; no number of images could confirm a rarer event."""
EQUAL = 1e-3
"""Share of their size by which scores may differ and count as equal: ranks would make much of the last digits."""


@dataclass(frozen=True)
class Tail:
    """Scores of normal images, and where and how fast they fall off."""

    sorted_N: Floats
    knee: Floats
    """Score at the knee and mean excess over it, (2,)."""

    @classmethod
    def fit(cls, scores_N: Floats) -> Tail:
        """From the scores of normal images; larger is more anomalous."""
        sorted_N = raised(np.sort(np.asarray(scores_N, np.float64)), EQUAL)
        above_N = sorted_N[int(KNEE * len(sorted_N)) :]
        start = above_N[0]
        # Of few images none may be beyond the knee; what all of them spread is a bound then.
        least = max(1e-4 * (1 + abs(start)), 0.05 * (start - sorted_N[len(sorted_N) // 2]))
        return cls(sorted_N, np.array([start, max((above_N - start).mean(), least)]))

    def surprise(self, scores_B: Floats) -> Floats:
        """−log p (B,) in nats, between 0 and 60; scores that are not finite are the most surprising."""
        count = len(self.sorted_N)
        scores_B = np.nan_to_num(scores_B, nan=np.inf, posinf=np.inf)
        at_least_B = count - np.searchsorted(self.sorted_N, scores_B, side="left")
        counted_B = -np.log((1 + at_least_B) / (1 + count))
        start, mean_excess = self.knee
        # Cut off before the division, which could overflow.
        fallen_B = -np.log(1 - KNEE) + (np.clip(scores_B, start, start + MOST * mean_excess) - start) / mean_excess
        return np.minimum(np.where(scores_B > start, fallen_B, counted_B), MOST)
