"""How often a class-conditional flow's exact posterior names an image's class: Bayes accuracy with its interval.

The class with the highest p(y | x) ∝ p(x | y) p(y) is compared with the label (:mod:`model.bayes`). The interval is
Wilson's, "Probable inference, the law of succession, and statistical inference" (JASA 1927): unlike the normal
approximation it holds near 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.bayes import class_log_likelihoods, posterior
from model.config import NoiseProtocol
from model.flow import Flow
from training.data import Images
from training.noisy import noisy_batches

Z_95 = 1.959964
"""Two-sided 95% point of the standard normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Which images were recognized, and under which prior."""

    correct: NDArray[np.bool_]
    """Whether the most probable class of each image is its label, (N,)."""
    prior: tuple[float, ...]
    """p(y) of each class, in label order."""

    @property
    def value(self) -> float:
        """Share of the images that were recognized."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval (Wilson)."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


def wilson_interval(successes: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The shares of successes that ``count`` trials leave possible, by default at 95%."""
    share, weight = successes / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    # At the ends the bounds are 0 and 1 exactly, but for rounding.
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.inference_mode()
def recognize_images(
    flow: Flow,
    images: Images,
    noise: NoiseProtocol,
    prior: Sequence[float],
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    advance: Callable[[int], None] = lambda count: None,
) -> Accuracy:
    """Classify every image and compare with its label; draws are combined as :func:`model.bayes.posterior` does.

    Images have the same noise as when they are scored, the same for every class. At most ``batch_size`` rows go
    through the flow together. ``advance`` is told the number of images after each batch, each counted once for every
    class. An image whose posterior is not finite counts as not recognized. Raises ``ValueError`` when seed + N is not
    a seed.
    """
    device, classes = flow.prior_variance.device, range(flow.config.num_classes)
    results = []
    for copies, labels in noisy_batches(images, noise, draws=draws, seed=seed, batch_size=batch_size, device=device):
        nats_KBY = torch.stack(
            [class_log_likelihoods(flow, flow.patchify(copy_BCHW), classes, batch_size) for copy_BCHW in copies]
        )
        probability_BY = posterior(nats_KBY, prior, noise).probability_BY
        correct_B = (probability_BY.argmax(dim=1) == labels) & probability_BY.isfinite().all(dim=1)
        results.append(correct_B.cpu().numpy())
        advance(len(labels) * len(classes))
    return Accuracy(correct=np.concatenate(results), prior=tuple(prior))
