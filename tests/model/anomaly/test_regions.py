"""Connected components against a flood fill, and regions against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from model.anomaly.regions import Region, components, regions

sides = st.integers(0, 9)
masks = st.tuples(sides, sides).flatmap(lambda shape: arrays.arrays(np.bool_, shape))


def flood_fill(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """The definition, pixel by pixel."""
    labels, count = np.zeros(mask.shape, np.int64), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        waiting = [start]
        while waiting:
            y, x = waiting.pop()
            if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]) or not mask[y, x] or labels[y, x]:
                continue
            labels[y, x] = count
            waiting += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels, count


@given(masks)
def test_components_are_those_of_a_flood_fill(mask: NDArray[np.bool_]) -> None:
    labels, count = components(mask)
    expected, expected_count = flood_fill(mask)
    assert count == expected_count
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("density", [0.3, 0.41, 0.6])
def test_large_masks_around_the_percolation_threshold(density: float) -> None:
    mask = np.random.default_rng(0).random((60, 47)) < density
    np.testing.assert_array_equal(components(mask)[0], flood_fill(mask)[0])


def test_a_spiral_is_one_region_and_corners_connect() -> None:
    spiral = np.zeros((33, 33), np.bool_)
    y, x, (dy, dx), side = 0, 0, (0, 1), 32
    for turn in range(31):
        for _ in range(side):
            spiral[y, x] = True
            y, x = y + dy, x + dx
        dy, dx = dx, -dy
        side -= 2 * (turn % 2) if turn > 1 else 0
    assert components(spiral)[1] == flood_fill(spiral)[1] == 1
    assert components(np.eye(7, dtype=np.bool_))[1] == 1
    assert components(np.indices((7, 7)).sum(axis=0) % 2 == 0)[1] == 1


def test_nothing_is_connected_across_the_images_of_a_stack() -> None:
    stack = np.random.default_rng(1).random((5, 8, 6)) < 0.4
    labels, count = components(stack)
    before = 0
    for mask, found in zip(stack, labels, strict=True):
        alone, number = flood_fill(mask)
        np.testing.assert_array_equal(found, np.where(alone > 0, alone + before, 0))
        before += number
    assert count == before


@given(arrays.arrays(np.float64, (6, 7), elements=st.integers(-3, 3) | st.just(math.inf)), st.integers(-4, 3))
def test_regions_are_what_is_above_the_threshold(values: NDArray[np.float64], threshold: int) -> None:
    found = regions(values, threshold)
    labels, count = flood_fill(values > threshold)
    expected = []
    for label in range(1, count + 1):
        y, x = np.nonzero(labels == label)
        box = int(x.min()), int(y.min()), int(x.max() - x.min() + 1), int(y.max() - y.min() + 1)
        expected.append(Region(box, len(y), float(values[labels == label].max())))
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    order = [(region.peak, region.area) for region in found]
    assert order == sorted(order, reverse=True)
    assert sum(region.area for region in found) == np.count_nonzero(values > threshold)


def test_boxes_are_given_as_x_y_width_height() -> None:
    values = np.zeros((6, 9))
    values[4, 1:4], values[0:3, 7] = 2, 5
    assert regions(values, 1) == [Region((7, 0, 1, 3), 3, 5.0), Region((1, 4, 3, 1), 3, 2.0)]
    assert regions(values, 5) == []


def test_what_is_not_a_number_is_above_every_threshold() -> None:
    values = np.zeros((4, 4))
    values[2, 3] = math.nan
    assert regions(values, 1e300) == [Region((3, 2, 1, 1), 1, math.inf)]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask: got float64 of shape \(2, 2\), allowed is bool"):
        components(np.zeros((2, 2)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask: got bool of shape \(4,\)"):
        components(np.zeros(4, np.bool_))
    with pytest.raises(ValueError, match=r"map: got shape \(1, 2, 2\), allowed is \(H, W\)"):
        regions(np.zeros((1, 2, 2)), 0)
    with pytest.raises(ValueError, match="threshold: got nan"):
        regions(np.zeros((2, 2)), math.nan)
