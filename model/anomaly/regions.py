"""Regions of an anomaly map: connected components in plain numpy, and what stands in each.

Two pixels are connected when they touch at a side or a corner (8-connectivity). Every pixel points at an earlier one
that it is connected with; roots of touching trees are joined and paths are cut short until nothing changes (Shiloach
and Vishkin 1982), which takes a few passes over whole arrays, whatever the shape of a region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Region:
    """A connected set of pixels of a map that are all above a threshold."""

    bbox: tuple[int, int, int, int]
    """Smallest box around it in pixels: x and y of its upper left corner, width, height."""
    area: int
    """Number of its pixels."""
    peak: float
    """Largest value of the map in it."""


def components(mask_HW: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Label the 8-connected components of a mask (..., H, W): labels of the same shape, and how many there are.

    0 stands where the mask is false; components have 1, 2, … in the order of their first pixels, row by row. Further
    axes in front are images of a stack: nothing is connected across them, and numbers go on from one to the next.
    Raises ``ValueError`` for other than booleans or fewer than two axes.
    """
    mask_HW = np.asarray(mask_HW)
    if mask_HW.dtype != np.bool_ or mask_HW.ndim < 2:
        raise ValueError(f"mask: got {mask_HW.dtype} of shape {mask_HW.shape}, allowed is bool of shape (..., H, W)")
    num_pixels = int(np.count_nonzero(mask_HW))
    number_HW = np.full(mask_HW.shape, -1, np.int64)
    number_HW[mask_HW] = np.arange(num_pixels)
    first_E, second_E = _touching(number_HW)
    parent_P = np.arange(num_pixels)
    while True:
        roots = parent_P[first_E], parent_P[second_E]
        apart_E = roots[0] != roots[1]
        if not apart_E.any():
            break
        lower_E, higher_E = np.minimum(*roots)[apart_E], np.maximum(*roots)[apart_E]
        np.minimum.at(parent_P, higher_E, lower_E)
        while not np.array_equal(parent_P, grandparent_P := parent_P[parent_P]):
            parent_P = grandparent_P
    # A root is the first pixel of its component.
    is_root_P = parent_P == np.arange(num_pixels)
    label_HW = np.zeros(mask_HW.shape, np.int64)
    label_HW[mask_HW] = np.cumsum(is_root_P)[parent_P]
    return label_HW, int(np.count_nonzero(is_root_P))


def _touching(number_HW: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of pixels with numbers from 0 on that touch, each once."""
    pairs = [
        (number_HW[..., :, :-1], number_HW[..., :, 1:]),
        (number_HW[..., :-1, :], number_HW[..., 1:, :]),
        (number_HW[..., :-1, :-1], number_HW[..., 1:, 1:]),
        (number_HW[..., :-1, 1:], number_HW[..., 1:, :-1]),
    ]
    both = [(first >= 0) & (second >= 0) for first, second in pairs]
    first_E = np.concatenate([first[held] for (first, _), held in zip(pairs, both, strict=True)])
    second_E = np.concatenate([second[held] for (_, second), held in zip(pairs, both, strict=True)])
    return first_E, second_E


def regions(map_HW: NDArray[np.float64], threshold: float) -> list[Region]:
    """The regions of a map (H, W) where it exceeds ``threshold``, by falling peak, then by falling area.

    A value that is not a number counts as infinite, as a score does in :mod:`model.anomaly.conformal`. Raises
    ``ValueError`` for a map with other than two axes or a threshold that is not a number.
    """
    values_HW = np.asarray(map_HW, np.float64)
    if values_HW.ndim != 2:
        raise ValueError(f"map: got shape {values_HW.shape}, allowed is (H, W)")
    if math.isnan(threshold):
        raise ValueError(f"threshold: got {threshold}, allowed is any number")
    values_HW = np.where(np.isnan(values_HW), np.inf, values_HW)
    label_HW, count = components(values_HW > threshold)
    y_P, x_P = np.nonzero(label_HW)
    region_P = label_HW[y_P, x_P] - 1
    peak_R = np.full(count, -np.inf)
    np.maximum.at(peak_R, region_P, values_HW[y_P, x_P])
    corners = []
    for along_P in (x_P, y_P):
        low_R, high_R = np.full(count, max(values_HW.shape)), np.full(count, -1)
        np.minimum.at(low_R, region_P, along_P)
        np.maximum.at(high_R, region_P, along_P)
        corners.append((low_R, high_R - low_R + 1))
    (x_R, width_R), (y_R, height_R) = corners
    area_R = np.bincount(region_P, minlength=count)
    found = [
        Region((int(x_R[r]), int(y_R[r]), int(width_R[r]), int(height_R[r])), int(area_R[r]), float(peak_R[r]))
        for r in range(count)
    ]
    return sorted(found, key=lambda region: (-region.peak, -region.area))
