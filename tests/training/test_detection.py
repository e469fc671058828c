"""Figures of a detector against their slow definitions, and the laws that they obey."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from training.detection import (
    FIGURES,
    DetectionFigures,
    aupro,
    bootstrap_intervals,
    detection_figures,
    pixel_auroc,
    roc_curve,
)

Scores = list[float]
# Few different values, so that most examples have ties.
score = st.integers(-4, 4).map(float) | st.sampled_from([-math.inf, math.inf, 0.5])
some_scores = st.lists(score, min_size=1, max_size=30)


def thresholds(normal: Scores, anomalous: Scores) -> list[float]:
    return sorted({*normal, *anomalous}, reverse=True)


def flagged(scores: Scores, limit: float) -> int:
    return sum(s >= limit for s in scores)


def slow_auroc(normal: Scores, anomalous: Scores) -> float:
    pairs = [1.0 if a > n else 0.5 if a == n else 0.0 for a in anomalous for n in normal]
    return sum(pairs) / len(pairs)


def slow_aupr(normal: Scores, anomalous: Scores) -> float:
    area, recall = 0.0, 0.0
    for limit in thresholds(normal, anomalous):
        true, false = flagged(anomalous, limit), flagged(normal, limit)
        area += (true / len(anomalous) - recall) * true / (true + false)
        recall = true / len(anomalous)
    return area


def slow_fpr(normal: Scores, anomalous: Scores) -> float:
    return min(
        flagged(normal, limit) / len(normal)
        for limit in thresholds(normal, anomalous)
        if 20 * flagged(anomalous, limit) >= 19 * len(anomalous)
    )


def slow_f1(normal: Scores, anomalous: Scores) -> float:
    scores = []
    for limit in thresholds(normal, anomalous):
        true = flagged(anomalous, limit)
        precision, recall = true / max(1, true + flagged(normal, limit)), true / len(anomalous)
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    return max(scores)


@given(some_scores, some_scores)
def test_figures_are_their_definitions(normal: Scores, anomalous: Scores) -> None:
    figures = detection_figures(normal, anomalous)
    assert figures.auroc == slow_auroc(normal, anomalous)
    assert figures.aupr == pytest.approx(slow_aupr(normal, anomalous), abs=1e-12)
    assert figures.fpr_at_95_tpr == slow_fpr(normal, anomalous)
    assert figures.f1_max == pytest.approx(slow_f1(normal, anomalous), abs=1e-12)


@given(some_scores, some_scores)
def test_only_the_order_of_scores_matters(normal: Scores, anomalous: Scores) -> None:
    def squeezed(scores: Scores) -> list[float]:
        return [math.atan(s) ** 3 * 1e-3 - 7 for s in scores]

    assert detection_figures(squeezed(normal), squeezed(anomalous)) == detection_figures(normal, anomalous)


@given(some_scores, some_scores)
def test_turning_scores_around_swaps_right_and_wrong_pairs(normal: Scores, anomalous: Scores) -> None:
    forward = detection_figures(normal, anomalous).auroc
    assert detection_figures([-s for s in normal], [-s for s in anomalous]).auroc == pytest.approx(1 - forward)
    assert detection_figures(anomalous, normal).auroc == pytest.approx(1 - forward)


@given(some_scores, some_scores)
def test_the_area_under_the_roc_curve_is_the_auroc(normal: Scores, anomalous: Scores) -> None:
    false, true = roc_curve(normal, anomalous)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert len(false) == len(thresholds(normal, anomalous)) + 1
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert np.trapezoid(true, false) == pytest.approx(detection_figures(normal, anomalous).auroc)


def test_perfect_inverted_and_constant_detectors() -> None:
    low, high = np.arange(30.0), np.arange(30.0, 40)
    assert detection_figures(low, high) == DetectionFigures(auroc=1, aupr=1, fpr_at_95_tpr=0, f1_max=1)
    inverted = detection_figures(high, low)
    assert (inverted.auroc, inverted.fpr_at_95_tpr) == (0, 1)
    # With all flagged, 30 of 40 are right and none is missed.
    assert inverted.f1_max == pytest.approx(2 * 0.75 / 1.75)
    constant = detection_figures(np.ones(30), np.ones(10))
    assert constant.to_dict() == {"auroc": 0.5, "aupr": 0.25, "fpr_at_95_tpr": 1, "f1_max": pytest.approx(0.4)}


def test_19_of_20_anomalous_images_are_95_percent() -> None:
    # The one that is missed scores below every normal image.
    assert detection_figures(np.zeros(10), [-1.0] + [1.0] * 19).fpr_at_95_tpr == 0
    assert detection_figures(np.zeros(10), [-1.0] + [1.0] * 18).fpr_at_95_tpr == 1


def test_intervals_are_seeded_ordered_and_about_the_figures() -> None:
    rng = np.random.default_rng(0)
    normal, anomalous = rng.normal(size=300), rng.normal(1.0, 1, size=100)
    figures = detection_figures(normal, anomalous).to_dict()
    found = bootstrap_intervals(normal, anomalous, resamples=200, seed=3)
    assert tuple(found) == FIGURES
    assert found == bootstrap_intervals(normal, anomalous, resamples=200, seed=3)
    assert found != bootstrap_intervals(normal, anomalous, resamples=200, seed=4)
    narrow = bootstrap_intervals(normal, anomalous, resamples=200, seed=3, probability=0.5)
    for name, (low, high) in found.items():
        assert 0 <= low < figures[name] < high <= 1
        assert low < narrow[name][0] < narrow[name][1] < high


def test_intervals_are_the_percentiles_of_figures_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    normal, anomalous = rng.integers(0, 9, 40).astype(float), rng.integers(3, 12, 25).astype(float)
    # Three resamples at once.
    monkeypatch.setattr("training.detection.CHUNK", 3 * 65)
    found = bootstrap_intervals(normal, anomalous, resamples=7, seed=5)
    rng, each = np.random.default_rng(5), []
    for rows in (3, 3, 1):
        pick, other = rng.integers(0, 40, (rows, 40)), rng.integers(0, 25, (rows, 25))
        each += [detection_figures(normal[i], anomalous[j]).to_dict() for i, j in zip(pick, other, strict=True)]
    assert len(each) == 7
    for name in FIGURES:
        assert found[name] == pytest.approx(np.quantile([one[name] for one in each], [0.025, 0.975]))


def test_the_spread_of_the_auroc_is_that_of_its_formula() -> None:
    """Bamber's (1975) variance of the AUROC, with the probabilities of triples counted."""
    rng = np.random.default_rng(2)
    normal, anomalous = rng.normal(size=400), rng.normal(0.8, 1, size=250)
    wins = (anomalous[:, None] > normal[None]).astype(float)
    auroc = wins.mean()
    both, either = (wins.mean(axis=1) ** 2).mean(), (wins.mean(axis=0) ** 2).mean()
    variance = (auroc * (1 - auroc) + 399 * (both - auroc**2) + 249 * (either - auroc**2)) / (400 * 250)
    low, high = bootstrap_intervals(normal, anomalous, resamples=600)["auroc"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.15)


def test_a_perfect_detector_has_no_spread_and_infinite_scores_are_drawn() -> None:
    assert bootstrap_intervals([-math.inf, 0], [1, math.inf], resamples=20)["auroc"] == (1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detection_figures([], [1.0]), r"scores of normal images: got shape \(0,\)"),
        (lambda: detection_figures([1.0], [[1.0]]), r"scores of anomalous images: got shape \(1, 1\)"),
        (lambda: roc_curve([1.0], [1, math.nan, math.nan]), r"anomalous images: got NaN 2 times, first for image 1"),
        (lambda: bootstrap_intervals([1.0], [math.nan]), "got NaN"),
        (lambda: bootstrap_intervals([1.0], [1.0], resamples=0), "resamples: got 0"),
        (lambda: bootstrap_intervals([1.0], [1.0], probability=1.0), r"probability: got 1\.0"),
    ],
)
def test_mistakes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


Maps = NDArray[np.float64]
Masks = NDArray[np.bool_]
some_maps = arrays.arrays(np.float64, (3, 5, 6), elements=score)
some_masks = arrays.arrays(np.bool_, (3, 5, 6), elements=st.sampled_from([True, False, False]))


def regions_of(masks: Masks) -> list[Masks]:
    """Each component of each image as a mask of its own, grown from its first pixel."""
    found = []
    for number, mask in enumerate(masks):
        left = mask.copy()
        while left.any():
            region = np.zeros_like(left)
            region[tuple(np.argwhere(left)[0])] = True
            while True:
                padded = np.pad(region, 1)
                near = np.any([padded[y : y + 5, x : x + 6] for y in range(3) for x in range(3)], axis=0) & mask
                if (near == region).all():
                    break
                region = near
            left &= ~region
            whole = np.zeros_like(masks)
            whole[number] = region
            found.append(whole)
    return found


def slow_aupro(maps: Maps, masks: Masks, limit: float) -> float:
    """The curve threshold by threshold, then its area by a fine sum."""
    regions, points = regions_of(masks), [(0.0, 0.0)]
    for level in sorted({*maps.ravel()}, reverse=True):
        above = maps >= level
        points.append((float(above[~masks].mean()), float(np.mean([above[region].mean() for region in regions]))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


@given(some_maps, some_masks, st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_aupro_is_its_definition(maps: Maps, masks: Masks, limit: float) -> None:
    assume(masks.any() and not masks.all())
    assert aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)


@given(some_maps, some_masks)
def test_pixels_are_scored_like_images(maps: Maps, masks: Masks) -> None:
    assume(masks.any() and not masks.all())
    assert pixel_auroc(maps, masks) == slow_auroc(maps[~masks].tolist(), maps[masks].tolist())


def test_perfect_inverted_and_constant_maps() -> None:
    masks = np.zeros((4, 10, 10), np.bool_)
    masks[0, :5, :5], masks[2, 7, 7] = True, True
    assert (pixel_auroc(masks * 1.0, masks), aupro(masks * 1.0, masks)) == (1, pytest.approx(1))
    assert (pixel_auroc(masks * -1.0, masks), aupro(masks * -1.0, masks)) == (0, 0)
    # Flagging everything at once is the diagonal: 0.3² / 2 of 0.3.
    assert (pixel_auroc(masks * 0.0, masks), aupro(masks * 0.0, masks)) == (0.5, pytest.approx(0.15))


def test_small_regions_count_as_much_as_large_ones() -> None:
    masks = np.zeros((2, 10, 10), np.bool_)
    masks[0, :6, :6], masks[1, 8, 8] = True, True
    only_large, only_small = masks * 1.0, masks * 1.0
    only_large[1], only_small[0] = 0, 0
    assert aupro(only_large, masks) == pytest.approx(aupro(only_small, masks))
    assert pixel_auroc(only_large, masks) > 0.9 > pixel_auroc(only_small, masks)


@pytest.mark.parametrize("figure", [pixel_auroc, aupro])
def test_maps_that_cannot_be_measured_are_refused(figure: Callable[[Maps, Masks], float]) -> None:
    maps, masks = np.zeros((2, 3, 3)), np.zeros((2, 3, 3), np.bool_)
    with pytest.raises(ValueError, match="masks: got 0 of 18 pixels inside"):
        figure(maps, masks)
    with pytest.raises(ValueError, match="masks: got 18 of 18 pixels inside"):
        figure(maps, ~masks)
    with pytest.raises(ValueError, match="masks: got uint8, allowed is bool"):
        figure(maps, masks.astype(np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got shapes \(3, 3\) and \(2, 3, 3\)"):
        figure(maps[0], masks)
    masks[0, 0, 0], maps[1, 2, 2] = True, math.nan
    with pytest.raises(ValueError, match="maps: got NaN in 1 maps, first in map 1"):
        figure(maps, masks)


def test_the_area_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="max_false_positive_rate: got 0"):
        aupro(np.zeros((1, 2, 2)), np.eye(2, dtype=np.bool_)[None], 0)
