"""Pictures of anomaly maps: the same colours for the same values in every image of a calibration.

Nothing is scaled to an image's own extremes, which would paint a defect on every normal image. Below two thirds of the
calibrated threshold there is no colour; from there yellow, at the threshold orange, red, and at twice the threshold
magenta. Hue and opacity both grow, so that the order is visible without telling red from green; boxes are
cyan, which no heat is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.images import Box

Pixels = NDArray[np.uint8]

LEAST_SIDE = 224
"""Pixels of the longer side, at least: smaller pictures show a person nothing."""
TOP = 2.0
"""Value of the last colour, in thresholds."""
LEVELS = (0.0, 0.65, 0.8, 1.0, 1.5, TOP)
"""Values of the colours, in thresholds."""
COLOURS = ((255, 221, 64), (255, 221, 64), (255, 190, 40), (255, 140, 0), (229, 30, 37), (214, 0, 147))
OPACITY = (0.0, 0.0, 0.5, 0.7, 0.8, 0.9)
GROUND = (24, 24, 32)
"""Behind a map alone."""
BOX = (0, 229, 255)
BOX_EDGE = (0, 0, 0)
BOX_PIXELS = 2
MOST_BOXES = 10
"""Boxes that are drawn; with more of them nobody would see the image."""


def heat_map(map_HW: NDArray[np.float32], threshold: float) -> Pixels:
    """A picture (3, H, W) of a map (H, W) alone, on a dark ground; enlarged as all of them are."""
    size = _enlarged(map_HW.shape)
    ground = np.broadcast_to(np.array(GROUND, np.float64), (*size, 3))
    return _blended(ground, map_HW, threshold).transpose(2, 0, 1)


def overlay(pixels_CHW: Pixels, map_HW: NDArray[np.float32], threshold: float, boxes: Sequence[Box] = ()) -> Pixels:
    """A picture (3, H, W) of an image in grey with its map (H, W) laid on it and the first boxes around regions.

    Colours of the image would be taken for those of the map.
    """
    size = _enlarged(map_HW.shape)
    grey = _grey(pixels_CHW).repeat(size[0] // map_HW.shape[0], axis=0).repeat(size[1] // map_HW.shape[1], axis=1)
    picture = _blended(np.repeat(grey[..., None].astype(np.float64), 3, axis=2), map_HW, threshold)
    factor = size[0] // map_HW.shape[0]
    for box in boxes[:MOST_BOXES]:
        _frame(picture, box, factor)
    return picture.transpose(2, 0, 1)


def _enlarged(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width times the smallest whole number that makes the longer at least :data:`LEAST_SIDE`."""
    factor = -(-LEAST_SIDE // max(shape))
    return factor * shape[0], factor * shape[1]


def _grey(pixels_CHW: Pixels) -> Pixels:
    if pixels_CHW.shape[0] == 1:
        return pixels_CHW[0]
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))).convert("L"))


def _blended(ground_HW3: NDArray[np.float64], map_HW: NDArray[np.float32], threshold: float) -> Pixels:
    """The colours of a map over a ground of the enlarged size."""
    unit = threshold if 0 < threshold < np.inf else 1.0
    # Cut off first: what is not finite would spread over its neighbours.
    level_HW = np.clip(np.nan_to_num(map_HW.astype(np.float64) / unit, nan=TOP, posinf=TOP), 0.0, TOP)
    height, width = ground_HW3.shape[:2]
    smooth = Image.fromarray(level_HW.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    level_HW = np.asarray(smooth, np.float64)
    colour_HW3 = np.stack([np.interp(level_HW, LEVELS, channel) for channel in zip(*COLOURS, strict=True)], axis=2)
    opacity_HW1 = np.interp(level_HW, LEVELS, OPACITY)[..., None]
    return np.rint(opacity_HW1 * colour_HW3 + (1 - opacity_HW1) * ground_HW3).astype(np.uint8)


def _frame(picture: Pixels, box: Box, factor: int) -> None:
    """Draw a box around pixels of the map, outside of them where there is room; its dark edge shows on bright ones."""
    height, width = picture.shape[:2]
    x, y, wide, high = (factor * value for value in box)
    for grow, pixels, colour in ((BOX_PIXELS + 1, BOX_PIXELS + 2, BOX_EDGE), (BOX_PIXELS, BOX_PIXELS, BOX)):
        left, top = max(0, x - grow), max(0, y - grow)
        right, bottom = min(width, x + wide + grow), min(height, y + high + grow)
        inside = np.zeros((bottom - top, right - left), np.bool_)
        inside[pixels:-pixels, pixels:-pixels] = True
        picture[top:bottom, left:right][~inside] = colour
