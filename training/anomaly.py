"""How well a calibrated model tells sets of anomalous images from normal ones, and whether its guarantee holds.

Works on arrays, so that programs with images of their own use the same functions: :func:`score_set` lets a flow look
at a set, and :func:`compare` makes figures of what it saw. Every score of a calibration is compared with every set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.anomaly.calibration import Calibration
from model.anomaly.codec import code_lengths
from model.anomaly.conformal import AlphaTooSmall, beta_binomial_interval, threshold
from model.anomaly.detector import CODE_FREE, Detector
from model.anomaly.maps import MapScale
from model.config import NoiseProtocol
from model.flow import Flow
from training.calibrate import BATCH, all_statistics
from training.detection import (
    RESAMPLES,
    DetectionFigures,
    Floats,
    aupro,
    bootstrap_intervals,
    detection_figures,
    pixel_auroc,
)
from training.image_sets import ImageSet, Masks

ALPHAS = (0.01, 0.05, 0.1)
"""Levels at which the false-positive rate is looked at."""
CODED = ("combined", "complexity")
"""Scores that need code lengths."""


@dataclass(frozen=True, kw_only=True)
class ScoredSet:
    """What a calibrated model says about a set of N images."""

    name: str
    scores: Mapping[str, Floats]
    """Scores (N,) by name; larger is more anomalous."""
    maps: Floats | None = None
    """Anomaly maps (N, H, W), where they were asked for."""
    masks: Masks | None = None
    """Where the images are anomalous (N, H, W), where that is known."""

    def __len__(self) -> int:
        return len(next(iter(self.scores.values())))


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """One score on one set."""

    figures: DetectionFigures
    intervals: Mapping[str, tuple[float, float]]
    """95% intervals of the figures by name; empty where no resamples were asked for."""
    flagged: float
    """Share of the anomalous images that are flagged at the comparison's level."""


@dataclass(frozen=True, kw_only=True)
class PixelFigures:
    """How well the maps of a set tell where it is anomalous; pixels of normal images count as normal ones."""

    auroc: float
    aupro: float
    """Area under the per-region overlap up to a false-positive rate of 0.3."""


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """One set of anomalous images."""

    name: str
    num_images: int
    scores: Mapping[str, ScoreFigures]
    pixels: PixelFigures | None
    """None for a set without masks."""


@dataclass(frozen=True, kw_only=True)
class FalsePositives:
    """How many normal images one score flags at a level, and how many it should."""

    alpha: float
    flagged: int
    num_images: int
    expected: tuple[int, int]
    """Between these two it is with a probability of at least 99% (beta-binomial), for exchangeable images."""

    @property
    def rate(self) -> float:
        """Share of the normal images that are flagged."""
        return self.flagged / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of :attr:`expected` as shares."""
        return self.expected[0] / self.num_images, self.expected[1] / self.num_images

    @property
    def holds(self) -> bool:
        """Whether not more are flagged than was stated; fewer, as ties make it, break no promise."""
        return self.flagged <= self.expected[1]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of a calibrated model on normal images and on sets of anomalous ones."""

    calibration: Calibration
    alpha: float
    """Level at which images are flagged: the calibration's default."""
    normal: ScoredSet
    sets: tuple[SetFigures, ...]
    false_positives: Mapping[str, tuple[FalsePositives, ...]]
    """By score; levels that the calibration has too few images for are left out."""
    resamples: int
    seed: int
    """Seed of the bootstrap."""


def choose_scores(calibration: Calibration, text: str | None = None) -> tuple[str, ...]:
    """The names in a comma-separated text, or all scores that can be computed here, in their usual order.

    Where the codecs here give other lengths than in the calibration, ``combined_without_codes`` stands in for
    ``combined`` and there is no ``complexity``. Raises ``ValueError`` for other names.
    """
    known = calibration.scores
    if not calibration.codecs_match:
        known = tuple(CODE_FREE if name == "combined" else name for name in known if name != "complexity")
    if text is None:
        return known
    asked = [name.strip() for name in text.split(",")]
    names = {CODE_FREE if name == "combined" and name not in known else name for name in asked}
    if unknown := [name for name in asked if name not in {*known, "combined"}]:
        raise ValueError(f"scores: got {', '.join(map(repr, unknown))}, allowed is some of {', '.join(known)}")
    return tuple(name for name in known if name in names)


def score_set(
    flow: Flow,
    noise: NoiseProtocol,
    calibration: Calibration,
    images: ImageSet,
    scores: Sequence[str],
    *,
    with_maps: bool = False,
    batch_size: int = BATCH,
    advance: Callable[[int], None] = lambda count: None,
) -> ScoredSet:
    """Scores by name of all images of a set, and their maps if asked for.

    ``advance`` is told the number of images after each batch. Raises ``ValueError`` for no images.
    """
    statistics = all_statistics(
        flow,
        noise,
        images.pixels,
        seed=calibration.record.seed,
        gradient=with_maps or "gradient" in scores,
        batch_size=batch_size,
        advance=advance,
    )
    codes = code_lengths(images.pixels) if set(CODED) & set(scores) else None
    detector: Detector = calibration.detector
    scale: MapScale = calibration.maps
    found = detector.scores(statistics, codes)
    return ScoredSet(
        name=images.name,
        scores={name: found[name] for name in scores},
        maps=scale.maps(statistics, detector) if with_maps else None,
        masks=images.masks,
    )


def pooled(sets: Sequence[ScoredSet], name: str) -> ScoredSet:
    """Several sets as one, with the maps of those that have masks."""
    located = [(s.maps, s.masks) for s in sets if s.maps is not None and s.masks is not None]
    return ScoredSet(
        name=name,
        scores={score: np.concatenate([s.scores[score] for s in sets]) for score in sets[0].scores},
        maps=np.concatenate([maps for maps, _ in located]) if located else None,
        masks=np.concatenate([masks for _, masks in located]) if located else None,
    )


def compare(
    calibration: Calibration,
    normal: ScoredSet,
    anomalous: Sequence[ScoredSet],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """The figures of every score on every set, with bootstrap intervals unless ``resamples`` is 0."""
    alpha = calibration.record.default_alpha
    sets = []
    for images in anomalous:
        by_score = {}
        for name, values_A in images.scores.items():
            values_N, intervals = normal.scores[name], {}
            if resamples:
                intervals = bootstrap_intervals(values_N, values_A, resamples=resamples, seed=seed)
            limit = threshold(calibration.sorted_scores[name], alpha)
            by_score[name] = ScoreFigures(
                figures=detection_figures(values_N, values_A),
                intervals=intervals,
                flagged=float((values_A > limit).mean()),
            )
        pixels = pixel_figures(normal, images)
        sets.append(SetFigures(name=images.name, num_images=len(images), scores=by_score, pixels=pixels))
    return Comparison(
        calibration=calibration,
        alpha=alpha,
        normal=normal,
        sets=tuple(sets),
        false_positives={name: false_positives(calibration, name, values) for name, values in normal.scores.items()},
        resamples=resamples,
        seed=seed,
    )


def pixel_figures(normal: ScoredSet, anomalous: ScoredSet) -> PixelFigures | None:
    """Figures of the maps of anomalous images and, where they have maps, normal ones; None without maps or masks.

    As MVTec AD does it, the pixels of normal images are among those that may be flagged wrongly.
    """
    maps, masks = anomalous.maps, anomalous.masks
    if maps is None or masks is None or not masks.any():
        return None
    if normal.maps is not None:
        maps = np.concatenate([normal.maps, maps])
        masks = np.concatenate([np.zeros(normal.maps.shape, np.bool_), masks])
    return PixelFigures(auroc=pixel_auroc(maps, masks), aupro=aupro(maps, masks))


def false_positives(
    calibration: Calibration, score: str, values_N: Floats, alphas: Sequence[float] = ALPHAS
) -> tuple[FalsePositives, ...]:
    """How many of N normal images a score flags at each level that the calibration has enough images for."""
    known, found = calibration.sorted_scores[score], []
    for alpha in alphas:
        try:
            limit = threshold(known, alpha)
        except AlphaTooSmall:
            continue
        found.append(
            FalsePositives(
                alpha=alpha,
                flagged=int((values_N > limit).sum()),
                num_images=len(values_N),
                expected=beta_binomial_interval(alpha, len(known), len(values_N)),
            )
        )
    return tuple(found)
