"""Named sets of anomalous images made from normal ones, for measuring and for choosing a detector.

Each set is a pure function of 8-bit images (N, C, H, W) and a seed. What happens to image i depends on the image, the
set, the seed and i alone, so the first images of a set are the same however many there are. :data:`TARGETS` are
reported; :data:`DEVELOPMENT` holds other changes, for choosing features and settings, so that what is chosen was never
shown what it is measured on.

Where a set changes a part of an image, masks say which pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]

PATCH = 4
"""Side in pixels of the blocks that are shuffled."""
OCCLUSION, SMALL_OCCLUSION = (6, 10), (3, 4)
"""Smallest and largest side of the square."""
CONTRAST = 32
"""Grey levels between an occlusion and the mean of what it covers, at least: nobody could see one without."""
SCRATCH_LEVEL, SCRATCH_PIXELS, SCRATCH_TRIES = 8, 12, 50
"""A pixel belongs to a scratch when it changed by more than this many grey levels; a scratch has at least so many such
pixels, or is the most visible one of so many tries."""
FINE = 8
"""A scratch is drawn that many times larger and averaged."""
SALT_AND_PEPPER = 0.03
SHIFT = 3
STRETCH = 1.3


@dataclass(frozen=True)
class Negatives:
    """Anomalous images made from normal ones, in the same order."""

    pixels: Pixels
    """8-bit images (N, C, H, W)."""
    masks: NDArray[np.bool_] | None = None
    """Which pixels were changed (N, H, W), for changes of a part of an image."""


NegativeSet = Callable[[Pixels, int], Negatives]
"""From normal images (N, C, H, W) and a seed; raises ``ValueError`` for other than 8-bit images of four axes."""


def _of_all(change: Callable[[Pixels], Pixels]) -> NegativeSet:
    """A set from a change that is the same for all images (N, C, H, W)."""

    @wraps(change)
    def negatives(pixels_NCHW: Pixels, seed: int) -> Negatives:
        _refuse_others(pixels_NCHW)
        return Negatives(np.ascontiguousarray(change(pixels_NCHW)))

    return negatives


def _of_each(
    mask_above: int | None = None,
) -> Callable[[Callable[[Pixels, np.random.Generator], Pixels]], NegativeSet]:
    """A set from a change of one image (C, H, W) with random numbers of its own.

    With ``mask_above`` its masks are the pixels where a channel changed by more than so many grey levels.
    """

    def decorate(change: Callable[[Pixels, np.random.Generator], Pixels]) -> NegativeSet:
        # With one stream for all sets, development would show where the squares of the targets are.
        stream = zlib.crc32(change.__name__.encode())

        @wraps(change)
        def negatives(pixels_NCHW: Pixels, seed: int) -> Negatives:
            _refuse_others(pixels_NCHW)
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed: got {seed}, allowed is 0 to {2**64 - 1}")
            changed_NCHW = np.empty_like(pixels_NCHW)
            for number, x_CHW in enumerate(pixels_NCHW):
                key = np.array([seed, number], np.uint64)
                bits = np.random.Philox(key=key, counter=[0, 0, 0, stream])
                changed_NCHW[number] = change(x_CHW, np.random.Generator(bits))
            if mask_above is None:
                return Negatives(changed_NCHW)
            return Negatives(changed_NCHW, _difference(changed_NCHW, pixels_NCHW) > mask_above)

        return negatives

    return decorate


def _refuse_others(pixels_NCHW: Pixels) -> None:
    if pixels_NCHW.dtype != np.uint8 or pixels_NCHW.ndim != 4:
        raise ValueError(f"pixels: got {pixels_NCHW.dtype} {pixels_NCHW.shape}, allowed is uint8 (N, C, H, W)")


def _difference(first_CHW: Pixels, second_CHW: Pixels) -> NDArray[np.int16]:
    """Grey levels (..., H, W) by which images (..., C, H, W) differ, in the channel that differs most."""
    return np.abs(first_CHW.astype(np.int16) - second_CHW).max(axis=-3)


def _filtered(x_NCHW: Pixels, filtering: Callable[[Image.Image], Image.Image]) -> Pixels:
    """A filter of Pillow's on every channel by itself."""
    planes_PHW = x_NCHW.reshape(-1, *x_NCHW.shape[2:])
    done = [np.asarray(filtering(Image.fromarray(np.ascontiguousarray(plane_HW)))) for plane_HW in planes_PHW]
    return np.array(done, np.uint8).reshape(x_NCHW.shape)


def _rounded(values: NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@_of_all
def vertical_flip(x_NCHW: Pixels) -> Pixels:
    """Upside down, left and right staying where they are."""
    return x_NCHW[:, :, ::-1]


@_of_all
def horizontal_flip(x_NCHW: Pixels) -> Pixels:
    """Left and right changed over."""
    return x_NCHW[:, :, :, ::-1]


@_of_all
def gaussian_blur(x_NCHW: Pixels) -> Pixels:
    """Pillow's Gaussian blur of radius 1."""
    return _filtered(x_NCHW, lambda plane: plane.filter(ImageFilter.GaussianBlur(1)))


@_of_each()
def constant(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """One grey level everywhere, any being as likely."""
    return np.full_like(x_CHW, rng.integers(256))


@_of_each()
def uniform_noise(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """Every value drawn by itself, any being as likely."""
    return rng.integers(0, 256, x_CHW.shape, np.uint8)


@_of_all
def inverted(x_NCHW: Pixels) -> Pixels:
    """255 − x."""
    return 255 - x_NCHW


@_of_each()
def shuffled_patches(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """Blocks of 4×4 pixels in a random order; raises ``ValueError`` where they do not fit."""
    channels, height, width = x_CHW.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"pixels: got {height}x{width}, allowed are multiples of {PATCH}")
    rows, columns = height // PATCH, width // PATCH
    blocks = x_CHW.reshape(channels, rows, PATCH, columns, PATCH).transpose(1, 3, 0, 2, 4)
    shuffled = rng.permutation(blocks.reshape(rows * columns, channels, PATCH, PATCH))
    whole = shuffled.reshape(rows, columns, channels, PATCH, PATCH).transpose(2, 0, 3, 1, 4)
    return whole.reshape(x_CHW.shape)


@_of_each(mask_above=0)
def occluded(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """A square of one random grey level, 6 to 10 pixels a side; masks are what changed."""
    return _with_square(x_CHW, OCCLUSION, rng)


def _with_square(x_CHW: Pixels, sides: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """Put a square of a random side and place on an image, in a grey level that shows there."""
    height, width = x_CHW.shape[1:]
    side = min(int(rng.integers(sides[0], sides[1] + 1)), height, width)
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    changed_CHW = x_CHW.copy()
    square = changed_CHW[:, top : top + side, left : left + side]
    levels = np.arange(256)
    square[:] = rng.choice(levels[np.abs(levels - square.mean()) >= CONTRAST])
    return changed_CHW


@_of_each(mask_above=SCRATCH_LEVEL)
def scratched(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """A thin, smoothly drawn polyline, light or dark; masks are what changed by more than 8 grey levels.

    A dark scratch does not show on black: those that change too little are drawn again elsewhere.
    """
    best, most = x_CHW, -1
    for _ in range(SCRATCH_TRIES):
        changed_CHW = _with_scratch(x_CHW, rng)
        seen = int(np.count_nonzero(_difference(changed_CHW, x_CHW) > SCRATCH_LEVEL))
        if seen > most:
            best, most = changed_CHW, seen
        if most >= SCRATCH_PIXELS:
            break
    return best


def _with_scratch(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """One try: two to four strokes that keep about their direction, from anywhere in the image."""
    height, width = x_CHW.shape[1:]
    point, direction = rng.random(2) * (width, height), rng.random() * 2 * np.pi
    points = [point]
    for _ in range(int(rng.integers(2, 5))):
        direction += rng.normal(0, 0.5)
        length = rng.uniform(0.12, 0.3) * min(height, width)
        point = point + length * np.array([np.cos(direction), np.sin(direction)])
        points.append(point)
    thickness, strength = rng.uniform(0.6, 1.2), rng.uniform(0.5, 0.9)
    level = int(rng.choice([0, 255]))
    fine = Image.new("L", (width * FINE, height * FINE), 0)
    ImageDraw.Draw(fine).line(
        [(float(x) * FINE, float(y) * FINE) for x, y in points], fill=255, width=round(thickness * FINE), joint="curve"
    )
    cover_HW = np.asarray(fine.reduce(FINE), np.float64) / 255 * strength
    return _rounded(x_CHW * (1 - cover_HW) + level * cover_HW)


@_of_all
def rotated_90(x_NCHW: Pixels) -> Pixels:
    """A quarter turn to the left; raises ``ValueError`` for images that are not square."""
    return _square(x_NCHW).swapaxes(2, 3)[:, :, ::-1]


@_of_all
def rotated_180(x_NCHW: Pixels) -> Pixels:
    """Half a turn."""
    return x_NCHW[:, :, ::-1, ::-1]


@_of_all
def transposed(x_NCHW: Pixels) -> Pixels:
    """Rows as columns; raises ``ValueError`` for images that are not square."""
    return _square(x_NCHW).swapaxes(2, 3)


def _square(x_NCHW: Pixels) -> Pixels:
    height, width = x_NCHW.shape[2:]
    if height != width:
        raise ValueError(f"pixels: got {height}x{width}, allowed are square images")
    return x_NCHW


@_of_all
def box_blur(x_NCHW: Pixels) -> Pixels:
    """The mean of 3×3 pixels."""
    return _filtered(x_NCHW, lambda plane: plane.filter(ImageFilter.BoxBlur(1)))


@_of_all
def pixelated(x_NCHW: Pixels) -> Pixels:
    """Blocks of 2×2 pixels with their mean; a last row or column without a partner forms blocks of its own."""
    return _filtered(x_NCHW, lambda plane: _enlarged(plane.reduce(2), 2).crop((0, 0, *plane.size)))


def _enlarged(plane: Image.Image, factor: int) -> Image.Image:
    return plane.resize((plane.width * factor, plane.height * factor), Image.Resampling.NEAREST)


@_of_all
def half_contrast(x_NCHW: Pixels) -> Pixels:
    """Half as far from the mean of the image."""
    mean_N111 = x_NCHW.mean(axis=(1, 2, 3), keepdims=True)
    return _rounded(mean_N111 + (x_NCHW - mean_N111) / 2)


@_of_each()
def salt_and_pepper(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """3% of the pixels, on average, black or white."""
    drawn_HW = rng.random(x_CHW.shape[1:])
    levels_HW = rng.choice(np.array([0, 255], np.uint8), x_CHW.shape[1:])
    return np.where(drawn_HW < SALT_AND_PEPPER, levels_HW, x_CHW)


@_of_all
def shifted(x_NCHW: Pixels) -> Pixels:
    """Three pixels to the right; what leaves the image comes in on the other side."""
    return np.roll(x_NCHW, SHIFT, axis=3)


@_of_all
def sharpened(x_NCHW: Pixels) -> Pixels:
    """Pillow's unsharp mask of radius 1, at twice the difference from the blurred image."""
    return _filtered(x_NCHW, lambda plane: plane.filter(ImageFilter.UnsharpMask(1, 200, 0)))


@_of_all
def stretched(x_NCHW: Pixels) -> Pixels:
    """1.3 times as wide about the middle; what leaves the image is lost."""
    height, width = x_NCHW.shape[2:]
    cut = width * (1 - 1 / STRETCH) / 2
    box = cut, 0.0, width - cut, float(height)
    return _filtered(x_NCHW, lambda plane: plane.resize(plane.size, Image.Resampling.BILINEAR, box))


@_of_all
def halves_swapped(x_NCHW: Pixels) -> Pixels:
    """The lower half above the upper one."""
    return np.roll(x_NCHW, x_NCHW.shape[2] // 2, axis=2)


@_of_each(mask_above=0)
def small_occlusion(x_CHW: Pixels, rng: np.random.Generator) -> Pixels:
    """A square of one random grey level, 3 or 4 pixels a side; masks are what changed."""
    return _with_square(x_CHW, SMALL_OCCLUSION, rng)


TARGETS: dict[str, NegativeSet] = {
    "vertical flip": vertical_flip,
    "horizontal flip": horizontal_flip,
    "Gaussian blur": gaussian_blur,
    "constant": constant,
    "uniform noise": uniform_noise,
    "inverted": inverted,
    "shuffled patches": shuffled_patches,
    "occluded": occluded,
    "scratched": scratched,
}
"""The sets that figures are reported on."""

DEVELOPMENT: dict[str, NegativeSet] = {
    "rotated 90": rotated_90,
    "rotated 180": rotated_180,
    "transposed": transposed,
    "box blur": box_blur,
    "pixelated": pixelated,
    "half contrast": half_contrast,
    "salt and pepper": salt_and_pepper,
    "shifted": shifted,
    "sharpened": sharpened,
    "stretched": stretched,
    "halves swapped": halves_swapped,
    "small occlusion": small_occlusion,
}
"""The sets that a detector is chosen on; never for reporting."""
