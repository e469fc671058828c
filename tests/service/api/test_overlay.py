"""Pictures of anomaly maps: fixed colours, whole enlargement, nothing left to an image's extremes."""

from __future__ import annotations

import numpy as np
import pytest

from service.api.overlay import BOX, COLOURS, GROUND, LEAST_SIDE, OPACITY, heat_map, overlay
from tests.service.pictures import Pixels, pixels


def rows(picture: Pixels) -> Pixels:
    """A picture (3, H, W) as (H, W, 3)."""
    assert (len(picture), picture.dtype) == (3, np.uint8)
    return picture.transpose(1, 2, 0)


def flat(value: float, size: int = 28) -> Pixels:
    return np.full((size, size), value, np.float32)


@pytest.mark.parametrize(("size", "side"), [(28, 224), (12, 228), (8, 224), (1, 224), (300, 300), (224, 224)])
def test_pictures_are_enlarged_by_whole_factors(size: int, side: int) -> None:
    assert side >= LEAST_SIDE
    assert rows(heat_map(flat(1.0, size), 2.0)).shape == (side, side, 3)
    assert rows(overlay(pixels(size)[None], flat(1.0, size), 2.0)).shape == (side, side, 3)


def test_a_normal_image_shows_no_heat() -> None:
    image = pixels(28)
    for value in (0.0, 1.0, 2.4):
        assert (rows(heat_map(flat(value), 5.0)) == GROUND).all()
        shown = rows(overlay(image[None], flat(value), 5.0))
        assert (shown == image.repeat(8, axis=0).repeat(8, axis=1)[..., None]).all()


@pytest.mark.parametrize("threshold", [0.3, 5.0, 700.0])
def test_colours_are_of_the_scale_and_not_of_the_image(threshold: float) -> None:
    for level, colour, opacity in (
        (1.0, COLOURS[3], OPACITY[3]),
        (1.5, COLOURS[4], OPACITY[4]),
        (2.0, COLOURS[5], 0.9),
    ):
        shown = rows(heat_map(flat(level * threshold), threshold))
        expected = opacity * np.array(colour) + (1 - opacity) * np.array(GROUND)
        assert np.abs(shown.astype(float) - expected).max() <= 1
    top = rows(heat_map(flat(4 * threshold), threshold))
    for beyond in (5 * threshold, 1e30, np.inf, np.nan):
        assert (rows(heat_map(flat(beyond), threshold)) == top).all()


@pytest.mark.parametrize("threshold", [0.0, np.inf, np.nan])
def test_odd_thresholds_still_give_pictures(threshold: float) -> None:
    assert rows(heat_map(flat(1.0), threshold)).shape == (224, 224, 3)


def test_hotter_is_redder_and_more_opaque() -> None:
    assert list(OPACITY) == sorted(OPACITY)
    green = [colour[1] for colour in COLOURS]
    assert green == sorted(green, reverse=True)


def test_values_that_are_not_finite_stay_where_they_are() -> None:
    values = flat(0.0)
    values[10, 10] = np.inf
    shown = rows(heat_map(values, 1.0))
    changed = np.argwhere((shown != GROUND).any(axis=2))
    assert changed.min() >= 8 * 9
    assert changed.max() < 8 * 12


def test_colour_images_are_shown_in_grey() -> None:
    shown = rows(overlay(pixels(16, 3).transpose(2, 0, 1), flat(0.0, 16), 1.0))
    assert (shown[..., 0] == shown[..., 1]).all()
    assert (shown[..., 1] == shown[..., 2]).all()


@pytest.mark.parametrize("box", [(7, 2, 4, 4), (0, 0, 1, 1), (27, 27, 1, 1), (0, 0, 28, 28)])
def test_boxes_go_around_regions(box: tuple[int, int, int, int]) -> None:
    plain = rows(overlay(pixels(28)[None], flat(0.0), 1.0))
    shown = rows(overlay(pixels(28)[None], flat(0.0), 1.0, [box]))
    x, y, width, height = (8 * value for value in box)
    ys, xs = np.nonzero((shown == BOX).all(axis=2))
    assert (xs.min(), ys.min()) == (max(0, x - 2), max(0, y - 2))
    assert (xs.max(), ys.max()) == (min(223, x + width + 1), min(223, y + height + 1))
    # At the edge of the picture there is no room outside.
    inside = slice(y + 4, y + height - 4), slice(x + 4, x + width - 4)
    assert (shown[inside] == plain[inside]).all()


def test_pictures_are_repeatable() -> None:
    values = np.random.default_rng(0).exponential(1.0, (28, 28)).astype(np.float32)
    assert (overlay(pixels(28)[None], values, 1.0) == overlay(pixels(28)[None], values, 1.0)).all()
    assert (heat_map(values, 1.0) == heat_map(values, 1.0)).all()
