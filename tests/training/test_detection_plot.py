"""The picture of a detector shows what it should, also for scores that no axis can hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from training.detection_plot import BLACK, BLUE, CURVES, HEIGHT, MAX_SETS, VERMILLION, WIDTH, detection_plot

Picture = NDArray[np.uint8]


def scores(mean: float = 0.0, count: int = 200) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(mean, 1, count)


def pixels_of(picture: Picture, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return (picture == np.array(colour, np.uint8)[:, None, None]).all(axis=0)


LEFT, RIGHT = (slice(None), slice(None), slice(0, 660)), (slice(None), slice(None), slice(740, None))


def test_the_picture_has_its_size_and_is_mostly_white() -> None:
    picture = detection_plot(scores(), {"noise": scores(2)})
    assert picture.shape == (3, HEIGHT, WIDTH)
    assert picture.dtype == np.uint8
    assert 0.7 < pixels_of(picture, (255, 255, 255)).mean() < 0.97
    np.testing.assert_array_equal(picture, detection_plot(scores(), {"noise": scores(2)}))


def test_both_groups_are_in_the_histogram_and_the_larger_scores_on_the_right() -> None:
    left = detection_plot(scores(), {"noise": scores(6)})[LEFT]
    # Below the legend.
    where = [np.nonzero(pixels_of(left, colour)[160:])[1].mean() for colour in (BLUE, VERMILLION)]
    assert where[0] + 100 < where[1]


def test_every_set_has_a_curve_in_a_colour_of_its_own() -> None:
    sets = {f"set {number}": scores(number / 3) for number in range(len(CURVES))}
    right = detection_plot(scores(), sets)[RIGHT]
    for colour in CURVES:
        assert pixels_of(right, colour)[:, :280].sum() > 20
    alone = detection_plot(scores(), {"set 0": scores(1)})[RIGHT]
    assert not pixels_of(alone, VERMILLION).any()


def test_the_threshold_is_a_line_with_its_level() -> None:
    without = detection_plot(scores(), {"noise": scores(2)})
    line = detection_plot(scores(), {"noise": scores(2)}, threshold=1.0)
    level = detection_plot(scores(), {"noise": scores(2)}, threshold=1.0, alpha=0.05)
    columns = pixels_of(line[LEFT], BLACK)[62:494].sum(axis=0)
    assert columns.max() > 200
    assert pixels_of(without[LEFT], BLACK)[62:494].sum(axis=0).max() < 20
    # Only the legend differs by the level, and it has become wider.
    assert np.nonzero((line != level).any(axis=(0, 2)))[0].max() < 200
    moved = pixels_of(detection_plot(scores(), {"noise": scores(2)}, threshold=2.5)[LEFT], BLACK)[62:494].sum(axis=0)
    assert moved.argmax() > columns.argmax() + 20


def test_curves_of_a_perfect_and_of_a_blind_detector_differ() -> None:
    perfect, blind = (detection_plot(scores(), {"s": scores(mean)})[RIGHT] for mean in (50.0, 0.0))
    # The curve of a perfect detector is the frame: up on the left, then along the top.
    rows, columns = np.nonzero(pixels_of(perfect, BLUE)[:, :200])
    assert np.ptp(rows) > 400
    assert np.ptp(columns[rows > 100]) < 4
    assert np.ptp(np.nonzero(pixels_of(blind, BLUE)[100:400])[1]) > 200


@pytest.mark.parametrize(
    ("normal", "anomalous", "threshold"),
    [
        ([1.0] * 9, [1.0] * 5, 1.0),
        ([1.0] * 9, [1.0] * 5, 1e30),
        ([0.0], [0.0], None),
        ([3e20] * 4, [3e20], 1.0),
        ([-2e-9, -3e-9], [-1e-9], -3e-9),
        ([1.0, 1.0 + 2e-16], [1.0], 1.0),
        ([math.inf] * 3, [-math.inf, math.inf], 1.0),
        ([-math.inf, 0.0, 1.0], [math.inf], -math.inf),
        ([0.0] * 5, [1e6, 2e6], math.inf),
        ([0.0, 1.0, 2.0], [1e12], 1e30),
    ],
)
def test_constant_infinite_and_distant_scores_are_drawn(
    normal: list[float], anomalous: list[float], threshold: float | None
) -> None:
    picture = detection_plot(normal, {"some": anomalous}, threshold=threshold, alpha=0.1)
    assert pixels_of(picture[LEFT], BLUE).sum() > 20
    assert pixels_of(picture[LEFT], VERMILLION).sum() > 20


def test_scores_far_away_do_not_press_the_others_together() -> None:
    near = detection_plot(scores(), {"noise": np.append(scores(3, 500), 1e9)})[LEFT]
    columns = np.nonzero(pixels_of(near, BLUE)[160:])[1]
    assert np.ptp(columns) > 200


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="anomalous: got 0 sets, allowed is 1 to 14"):
        detection_plot(scores(), {})
    with pytest.raises(ValueError, match="anomalous: got 15 sets"):
        detection_plot(scores(), {str(number): scores() for number in range(MAX_SETS + 1)})
    with pytest.raises(ValueError, match="threshold: got NaN"):
        detection_plot(scores(), {"noise": scores()}, threshold=math.nan)
    with pytest.raises(ValueError, match="scores of anomalous images: got NaN"):
        detection_plot(scores(), {"noise": [math.nan]})
