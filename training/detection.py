"""How well anomaly scores tell anomalous images from normal ones, with intervals, and how well maps tell where.

A larger score is more anomalous. A detector flags what scores at least t; every distinct score is one threshold t, so
images with equal scores are flagged together and no figure depends on their order. Infinite scores are the most or the
least anomalous ones; scores that are not numbers are refused.

- AUROC: P(anomalous > normal) + ½ P(anomalous = normal), the rank statistic of Mann and Whitney (Hanley and McNeil
  1982). 0.5 is a detector that knows nothing, whatever the share of anomalous images.
- AUPR: average precision with anomalous as the positive class, Σ (recall_k − recall_k−1) · precision_k, without
  interpolation (Davis and Goadrich 2006). A detector that knows nothing has the share of anomalous images.
- FPR@95TPR: the smallest share of normal images that are flagged where at least 95% of the anomalous ones are
  (Hendrycks and Gimpel, arXiv 1610.02136, and what followed it).
- F1max: the largest harmonic mean of precision and recall over all thresholds.
- AUPRO: area under the per-region overlap, the mean over ground-truth regions of the share of a region that is flagged,
  against the share of normal pixels that are flagged, up to 0.3, divided by 0.3 (Bergmann et al., "The MVTec Anomaly
  Detection Dataset", IJCV 2021). A region counts the same whatever its size.

Intervals are percentiles of a bootstrap (Efron 1979) that draws normal and anomalous images apart, since their numbers
were chosen. They account for the images that were scored, not for the training of the model.

Shape legend: N normal images (or maps), A anomalous images, K distinct scores, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.anomaly.regions import components

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

TRUE_POSITIVE_RATE = 0.95
"""Share of anomalous images that must be flagged for FPR@95TPR."""
MAX_FALSE_POSITIVE_RATE = 0.3
"""Where the area under the per-region overlap ends, as in the MVTec AD benchmark."""
RESAMPLES = 1000
"""Resamples of a bootstrap; percentiles of 95% intervals need some hundreds."""
INTERVAL = 0.95
"""Probability that the intervals are meant to cover."""
CHUNK = 2_000_000
"""Scores that a bootstrap draws at once, which bounds its memory to about 100 MB."""


@dataclass(frozen=True)
class DetectionFigures:
    """Figures of a detector, each between 0 and 1."""

    auroc: float
    """Area under the receiver operating characteristic; ties count half."""
    aupr: float
    """Average precision, anomalous being the positive class."""
    fpr_at_95_tpr: float
    """Smallest false-positive rate at a true-positive rate of at least 95%; smaller is better."""
    f1_max: float
    """Largest F1 over all thresholds."""

    def to_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


FIGURES = tuple(field.name for field in fields(DetectionFigures))
"""Names of the figures."""


def detection_figures(normal_N: ArrayLike, anomalous_A: ArrayLike) -> DetectionFigures:
    """The figures of scores of N normal and A anomalous images; raises ``ValueError`` for none, or for NaN."""
    counts = _Counts.of(normal_N, anomalous_A)
    return DetectionFigures(**{name: float(value) for name, value in counts.figures().items()})


def roc_curve(normal_N: ArrayLike, anomalous_A: ArrayLike) -> tuple[Floats, Floats]:
    """False- and true-positive rates (K + 1,), from (0, 0) to (1, 1), one point for each distinct score.

    The area under the straight lines between the points is the AUROC. Raises as :func:`detection_figures`.
    """
    counts = _Counts.of(normal_N, anomalous_A)
    return counts.false_K / counts.false_K[-1], counts.true_K / counts.true_K[-1]


def bootstrap_intervals(
    normal_N: ArrayLike,
    anomalous_A: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    probability: float = INTERVAL,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the figures by name, a function of the scores and ``seed`` alone.

    Raises as :func:`detection_figures`, and ``ValueError`` for no resamples or a probability outside (0, 1).
    """
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, allowed is at least 1")
    if not 0 < probability < 1:
        raise ValueError(f"probability: got {probability}, allowed is a number above 0 and below 1")
    normal_N, anomalous_A = _scores("normal", normal_N), _scores("anomalous", anomalous_A)
    distinct_K, level = np.unique(np.concatenate([normal_N, anomalous_A]), return_inverse=True)
    normal_level_N, anomalous_level_A = level[: len(normal_N)], level[len(normal_N) :]
    rng, at_once = np.random.default_rng(seed), max(1, CHUNK // len(level))
    figures: dict[str, list[Floats]] = {name: [] for name in FIGURES}
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        tables = [
            _histograms(of[rng.integers(0, len(of), (rows, len(of)))], len(distinct_K))
            for of in (normal_level_N, anomalous_level_A)
        ]
        for name, values_R in _Counts.cumulated(*tables).figures().items():
            figures[name].append(values_R)
    tail = (1 - probability) / 2
    bounds = {name: np.quantile(np.concatenate(values), [tail, 1 - tail]) for name, values in figures.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


@dataclass(frozen=True)
class _Counts:
    """How many images are flagged at each threshold, from none (..., 0) on to all (..., K)."""

    false_K: Counts
    """Normal images that are flagged (..., K + 1)."""
    true_K: Counts
    """Anomalous images that are flagged (..., K + 1)."""

    @classmethod
    def of(cls, normal_N: ArrayLike, anomalous_A: ArrayLike) -> _Counts:
        normal_N, anomalous_A = _scores("normal", normal_N), _scores("anomalous", anomalous_A)
        distinct_K, level = np.unique(np.concatenate([normal_N, anomalous_A]), return_inverse=True)
        levels = level[: len(normal_N)], level[len(normal_N) :]
        return cls.cumulated(*(np.bincount(of, minlength=len(distinct_K)) for of in levels))

    @classmethod
    def cumulated(cls, normal_K: Counts, anomalous_K: Counts) -> _Counts:
        """From how many images have each distinct score (..., K), rising."""
        pad = [(0, 0)] * (normal_K.ndim - 1) + [(1, 0)]
        return cls(*(np.pad(np.cumsum(of[..., ::-1], axis=-1), pad) for of in (normal_K, anomalous_K)))

    def figures(self) -> dict[str, Floats]:
        """The figures (...) by name."""
        false_K, true_K = self.false_K, self.true_K
        normal, anomalous = false_K[..., -1], true_K[..., -1]
        # Twice the number of pairs in the right order, ties counting half: whole numbers, so nothing is rounded.
        pairs = (np.diff(false_K) * (true_K[..., 1:] + true_K[..., :-1])).sum(axis=-1)
        # Where nothing is flagged there is no precision, and no recall that would count it.
        precision_K = true_K[..., 1:] / np.maximum(1, true_K[..., 1:] + false_K[..., 1:])
        enough_K = true_K / anomalous[..., None] >= TRUE_POSITIVE_RATE
        first = np.argmax(enough_K, axis=-1)[..., None]
        return {
            "auroc": pairs / (2 * normal * anomalous),
            "aupr": (np.diff(true_K) * precision_K).sum(axis=-1) / anomalous,
            "fpr_at_95_tpr": np.take_along_axis(false_K, first, axis=-1)[..., 0] / normal,
            "f1_max": (2 * true_K / (true_K + false_K + anomalous[..., None])).max(axis=-1),
        }


def _scores(name: str, scores_N: ArrayLike) -> Floats:
    """Scores as float64 (N,); raises ``ValueError`` for other shapes, none at all, or NaN."""
    values_N = np.asarray(scores_N, np.float64)
    if values_N.ndim != 1 or not len(values_N):
        raise ValueError(f"scores of {name} images: got shape {values_N.shape}, allowed is (N,) with N of at least 1")
    wrong = np.flatnonzero(np.isnan(values_N))
    if len(wrong):
        raise ValueError(
            f"scores of {name} images: got NaN {len(wrong)} times, first for image {wrong[0]}, "
            "allowed are numbers and infinities"
        )
    return values_N


def _histograms(levels_RN: Counts, num_levels: int) -> Counts:
    """How often each level occurs in each row, (R, K)."""
    rows = len(levels_RN)
    offset_R1 = np.arange(rows)[:, None] * num_levels
    return np.bincount((levels_RN + offset_R1).ravel(), minlength=rows * num_levels).reshape(rows, num_levels)


def pixel_auroc(maps_NHW: ArrayLike, masks_NHW: NDArray[np.bool_]) -> float:
    """AUROC of the pixels of all maps (N, H, W), those in the masks (N, H, W) being the anomalous ones.

    Raises ``ValueError`` for different shapes, masks that are not boolean, no pixel inside or outside, or NaN.
    """
    values_NHW, masks_NHW = _maps(maps_NHW, masks_NHW)
    return float(_Counts.of(values_NHW[~masks_NHW], values_NHW[masks_NHW]).figures()["auroc"])


def aupro(
    maps_NHW: ArrayLike, masks_NHW: NDArray[np.bool_], max_false_positive_rate: float = MAX_FALSE_POSITIVE_RATE
) -> float:
    """Area under the per-region overlap of maps (N, H, W) up to a false-positive rate, divided by that rate.

    Regions are the 8-connected components of the masks (N, H, W); images without any count through their normal
    pixels. Between thresholds the curve is straight, also where it is cut off. Raises as :func:`pixel_auroc`, and
    ``ValueError`` for a rate outside (0, 1].
    """
    limit = max_false_positive_rate
    if not 0 < limit <= 1:
        raise ValueError(f"max_false_positive_rate: got {limit}, allowed is a number above 0 and at most 1")
    values_NHW, masks_NHW = _maps(maps_NHW, masks_NHW)
    label_NHW, num_regions = components(masks_NHW)
    distinct_K, level = np.unique(values_NHW, return_inverse=True)
    level_P, label_P = level.ravel(), label_NHW.ravel()
    # A pixel inside adds its share of its region, one outside its share of all normal pixels.
    share = 1 / (num_regions * np.bincount(label_P)[1:])
    inside_P = label_P > 0
    overlap_K = np.bincount(level_P[inside_P], share[label_P[inside_P] - 1], minlength=len(distinct_K))
    normal_K = np.bincount(level_P[~inside_P], minlength=len(distinct_K))
    overlap_K = np.concatenate([[0], np.cumsum(overlap_K[::-1])])
    rate_K = np.concatenate([[0], np.cumsum(normal_K[::-1])]) / normal_K.sum()
    kept = int(np.searchsorted(rate_K, limit, side="right"))
    x, y = rate_K[:kept], overlap_K[:kept]
    if kept < len(rate_K):
        slope = (overlap_K[kept] - y[-1]) / (rate_K[kept] - x[-1])
        x, y = np.append(x, limit), np.append(y, y[-1] + slope * (limit - x[-1]))
    return float(np.trapezoid(y, x)) / limit


def _maps(maps_NHW: ArrayLike, masks_NHW: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """Maps as float64 and their masks; raises ``ValueError`` for what :func:`pixel_auroc` refuses."""
    values_NHW, masks_NHW = np.asarray(maps_NHW, np.float64), np.asarray(masks_NHW)
    if values_NHW.ndim != 3 or values_NHW.shape != masks_NHW.shape:
        raise ValueError(f"maps, masks: got shapes {values_NHW.shape} and {masks_NHW.shape}, allowed is (N, H, W) both")
    if masks_NHW.dtype != np.bool_:
        raise ValueError(f"masks: got {masks_NHW.dtype}, allowed is bool")
    inside = int(np.count_nonzero(masks_NHW))
    if not 0 < inside < masks_NHW.size:
        raise ValueError(f"masks: got {inside} of {masks_NHW.size} pixels inside, allowed is some inside and some not")
    wrong = np.flatnonzero(np.isnan(values_NHW).any(axis=(1, 2)))
    if len(wrong):
        raise ValueError(
            f"maps: got NaN in {len(wrong)} maps, first in map {wrong[0]}, allowed are numbers and infinities"
        )
    return values_NHW, masks_NHW
