"""Verdicts: whether images are normal by a calibration, how sure that is, and where they are not.

A question is checked before any work is done for it; a worker gives the statistics, code lengths are taken here, and
the calibration's densities and conformal p-values make verdicts of both. Plain numpy: the API imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.anomaly import conformal
from model.anomaly.calibration import Calibration
from model.anomaly.codec import code_lengths
from model.anomaly.detector import CODE_FREE
from model.anomaly.features import Statistics
from model.anomaly.regions import Region, regions
from service.errors import InvalidRequest
from service.jobs import STATISTICS

Score = Literal["combined", "nll", "typicality", "complexity", "latent", "gradient", "max_patch"]
Correction = Literal["none", "benjamini_hochberg"]
Direction = Literal["too_unlikely", "too_likely"]

MOST_REGIONS = 100
"""Regions of an image that are told; noise has them without end."""
STATISTICS_PASSES, GRADIENT_PASSES = 1, 3
"""Cost of the statistics in passes, and of the gradients beside it."""
CODEC_CHANGED = "this machine's image codecs give other code lengths than those that the calibration was made with; "


@dataclass(frozen=True, kw_only=True)
class Question:
    """What verdicts are asked of a calibration; made by :func:`ask`, which checks it."""

    calibration: Calibration
    name: str
    """Name of the calibration, as requests call it."""
    score: Score
    alpha: float
    """Level at which images are flagged."""
    threshold: float | None
    """Score above which an image is flagged; None where a correction decides about all of them together."""
    own_threshold: bool
    """Whether the caller gave the threshold."""
    correction: Correction
    maps: bool
    """Whether it is asked where images are unusual."""

    @property
    def gradient(self) -> bool:
        """Whether the answer takes gradients."""
        return self.maps or self.score == "gradient"

    @property
    def passes(self) -> int:
        """Cost of the statistics: passes of the flow for each image."""
        return STATISTICS_PASSES + (GRADIENT_PASSES if self.gradient else 0)

    @property
    def wanted(self) -> dict[str, Any]:
        """The field ``statistics`` of a score job's payload."""
        return {"seed": self.calibration.record.seed, "gradient": self.gradient}

    @property
    def used_score(self) -> str:
        """The score that decides: ``combined`` has a stand-in where codecs changed."""
        return _used_score(self.calibration, self.score)

    @property
    def notice(self) -> str | None:
        """What must be known of the answers."""
        if self.used_score == self.score:
            return None
        return f"{CODEC_CHANGED}the combined score is that without codes; calibrate anew for the full one"

    @property
    def false_positive_rate(self) -> tuple[float, float] | None:
        """Bounds, with 99% confidence, of the share of normal images that are flagged; None with a correction."""
        if self.threshold is None:
            return None
        count = self.calibration.record.num_calibration
        if self.own_threshold:
            # One that was chosen elsewhere is no score of this calibration: how many are above it is a binomial count.
            return conformal.exceedance_interval(round(self.alpha * (count + 1)) - 1, count)
        return conformal.false_positive_interval(self.alpha, count)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the calibration says of one image. Scores may be infinite, and are never nan."""

    is_anomaly: bool
    p_value: float
    score: float
    direction: Direction
    """By bits/dim against the median of normal images; blank images are too likely."""
    features: Mapping[str, float]
    """Every score that could be computed."""
    map_HW: NDArray[np.float32] | None
    regions: tuple[Region, ...]
    """Where the map exceeds its calibrated threshold, by falling peak."""


def _used_score(calibration: Calibration, score: Score) -> str:
    return CODE_FREE if score == "combined" and not calibration.codecs_match else score


def available_scores(calibration: Calibration) -> tuple[str, ...]:
    """The scores that can be asked of a calibration on this machine."""
    return tuple(name for name in calibration.scores if name != "complexity" or calibration.codecs_match)


def ask(
    calibration: Calibration,
    name: str,
    *,
    score: Score = "combined",
    alpha: float | None = None,
    threshold: float | None = None,
    correction: Correction = "none",
    maps: bool = False,
) -> Question:
    """Check what is asked; ``alpha`` is the calibration's default where neither it nor ``threshold`` is given.

    Raises ``InvalidRequest`` naming the field that is wrong. Blocks for some milliseconds, for the codecs' fingerprint.
    """
    if alpha is not None and threshold is not None:
        raise InvalidRequest(
            f"threshold: got {threshold:g} beside alpha {alpha:g}, allowed is one of them", param="threshold"
        )
    if threshold is not None and correction != "none":
        raise InvalidRequest(
            f"correction: got {correction!r} beside a threshold, allowed is 'none': it decides by p-values at a level "
            "alpha",
            param="correction",
        )
    allowed = available_scores(calibration)
    if score not in allowed:
        reason = CODEC_CHANGED if score == "complexity" and score in calibration.scores else ""
        raise InvalidRequest(
            f"score: got {score!r}; {reason}calibration {name!r} allows {', '.join(map(repr, allowed))}",
            param="score",
            code="codec_changed" if reason else "score_not_calibrated",
        )
    sorted_scores = calibration.sorted_scores[_used_score(calibration, score)]
    own_threshold = threshold is not None
    if threshold is not None:
        alpha = conformal.alpha_of_threshold(sorted_scores, threshold)
    else:
        alpha = calibration.record.default_alpha if alpha is None else alpha
        try:
            threshold = conformal.threshold(sorted_scores, alpha)
        except ValueError as error:
            code = "alpha_too_small" if isinstance(error, conformal.AlphaTooSmall) else None
            raise InvalidRequest(str(error), param="alpha", code=code) from error
    return Question(
        calibration=calibration,
        name=name,
        score=score,
        alpha=alpha,
        threshold=threshold if correction == "none" else None,
        own_threshold=own_threshold,
        correction=correction,
        maps=maps,
    )


def statistics_of(arrays: Mapping[str, NDArray[Any]]) -> Statistics:
    """The statistics in a score job's result."""
    return {name.removeprefix(STATISTICS): array for name, array in arrays.items() if name.startswith(STATISTICS)}


def judge(question: Question, statistics: Statistics, pixels_NCHW: NDArray[np.uint8]) -> list[Verdict]:
    """Answer a question about images with these statistics and pixels; takes a millisecond or two an image.

    Statistics that are not finite make an image as anomalous as can be.
    """
    calibration = question.calibration
    codes = code_lengths(pixels_NCHW) if calibration.codecs_match else None
    # Values that are not finite are seen to; numpy need not warn of them.
    with np.errstate(all="ignore"):
        every = calibration.detector.scores(statistics, codes)
        maps = calibration.maps.maps(statistics, calibration.detector).astype(np.float32) if question.maps else None
    scores = every[question.used_score]
    p_values = conformal.p_values(calibration.sorted_scores[question.used_score], scores)
    if question.threshold is None:
        flagged = conformal.benjamini_hochberg(p_values, question.alpha)
    else:
        flagged = scores > question.threshold
    unlikely = every["nll"] > calibration.detector.bits_center[0]
    verdicts = []
    for i in range(len(pixels_NCHW)):
        map_HW = None if maps is None else maps[i]
        found = [] if map_HW is None else regions(map_HW.astype(np.float64), calibration.maps.threshold)
        verdicts.append(
            Verdict(
                is_anomaly=bool(flagged[i]),
                p_value=float(p_values[i]),
                score=float(scores[i]),
                direction="too_unlikely" if unlikely[i] else "too_likely",
                features={name: float(values[i]) for name, values in every.items()},
                map_HW=map_HW,
                regions=tuple(found[:MOST_REGIONS]),
            )
        )
    return verdicts
