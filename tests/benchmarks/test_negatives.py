"""Sets of anomalous images: pure functions of images and seed, and what their names say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import negatives
from benchmarks.negatives import DEVELOPMENT, SCRATCH_LEVEL, SCRATCH_PIXELS, TARGETS, NegativeSet

Pixels = NDArray[np.uint8]
ALL = {**TARGETS, **DEVELOPMENT}
MASKED = {"occluded": 0, "scratched": SCRATCH_LEVEL, "small occlusion": 0}
RANDOM = {"constant", "uniform noise", "shuffled patches", "salt and pepper", *MASKED}


def garments(count: int = 12, channels: int = 1, side: int = 28) -> Pixels:
    """Bright textured shapes on black."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((count, channels, side, side), np.uint8)
    for image in pixels:
        top, left = rng.integers(1, side // 4, 2)
        shape = image[:, top : top + side // 2, left : left + 2 * side // 3]
        shape[:] = rng.integers(60, 240, shape.shape)
    return pixels


def differences(first: Pixels, second: Pixels) -> NDArray[np.int64]:
    return np.abs(first.astype(np.int64) - second.astype(np.int64)).max(axis=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_a_set_is_a_pure_function_of_images_and_seed(name: str, channels: int) -> None:
    normal = garments(channels=channels)
    before = normal.copy()
    made, again, other = (ALL[name](normal, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(normal, before)
    assert made.pixels.shape == normal.shape
    assert made.pixels.dtype == np.uint8
    assert made.pixels.flags.c_contiguous
    assert not np.shares_memory(made.pixels, normal)
    np.testing.assert_array_equal(made.pixels, again.pixels)
    assert (made.pixels != other.pixels).any() == (name in RANDOM)
    # Every image has become another one.
    assert (made.pixels != normal).any(axis=(1, 2, 3)).all()
    few = ALL[name](normal[:5], 3)
    np.testing.assert_array_equal(few.pixels, made.pixels[:5])
    assert len(ALL[name](normal[:0], 3).pixels) == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_masks_are_exactly_the_changed_pixels(name: str, channels: int) -> None:
    normal = garments(channels=channels)
    made = ALL[name](normal, 0)
    if name not in MASKED:
        assert made.masks is None
        return
    assert made.masks is not None
    assert made.masks.dtype == np.bool_
    np.testing.assert_array_equal(made.masks, differences(made.pixels, normal) > MASKED[name])


@pytest.mark.parametrize(("name", "sides"), [("occluded", (6, 10)), ("small occlusion", (3, 4))])
def test_an_occlusion_is_a_square_of_one_level_that_shows(name: str, sides: tuple[int, int]) -> None:
    normal = garments(count=60)
    made = ALL[name](normal, 0)
    assert made.masks is not None
    seen = set()
    for image, mask, original in zip(made.pixels[:, 0], made.masks, normal[:, 0], strict=True):
        level = np.unique(image[mask])
        assert len(level) == 1
        y, x = np.nonzero(mask)
        box = np.ptp(y) + 1, np.ptp(x) + 1
        seen.add(max(box))
        assert max(box) <= sides[1]
        covered = original[y.min() : y.max() + 1, x.min() : x.max() + 1]
        assert abs(covered.mean() - float(level[0])) > 16
    assert seen >= {sides[0], sides[1]}


def test_scratches_are_thin_light_or_dark_and_visible() -> None:
    normal = garments(count=60)
    made = ALL["scratched"](normal, 0)
    assert made.masks is not None
    change = (made.pixels.astype(np.int64) - normal)[:, 0]
    for one in change:
        # Towards white everywhere or towards black everywhere.
        assert (one >= 0).all() or (one <= 0).all()
    assert {bool((one > 0).any()) for one in change} == {True, False}
    sizes = made.masks.sum(axis=(1, 2))
    assert sizes.min() >= SCRATCH_PIXELS
    assert sizes.max() < 28 * 28 / 8
    # Its edges are smooth: many pixels change a little.
    assert (np.abs(change[change != 0]) < 40).mean() > 0.1


def test_a_scratch_that_cannot_be_large_enough_is_the_best_there_is() -> None:
    assert ALL["scratched"](np.full((3, 1, 2, 2), 128, np.uint8), 0).pixels.shape == (3, 1, 2, 2)


def test_sets_do_not_share_their_random_numbers() -> None:
    """Else squares of the development sets would say where those of the targets are."""
    black = np.zeros((200, 1, 28, 28), np.uint8)
    large, small = (ALL[name](black, 0).masks for name in ("occluded", "small occlusion"))
    assert large is not None
    assert small is not None
    columns = [[np.nonzero(mask)[1].mean() for mask in masks] for masks in (large, small)]
    assert abs(np.corrcoef(columns)[0, 1]) < 0.25


def ramp() -> Pixels:
    return np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8) * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vertical flip", np.flipud(ramp()[0, 0])),
        ("horizontal flip", np.fliplr(ramp()[0, 0])),
        ("inverted", 255 - ramp()[0, 0]),
        ("rotated 90", np.rot90(ramp()[0, 0])),
        ("rotated 180", np.rot90(ramp()[0, 0], 2)),
        ("transposed", ramp()[0, 0].T),
        ("shifted", np.concatenate([ramp()[0, 0, :, 5:], ramp()[0, 0, :, :5]], axis=1)),
        ("halves swapped", np.concatenate([ramp()[0, 0, 4:], ramp()[0, 0, :4]])),
    ],
)
def test_moved_and_inverted_pixels(name: str, expected: Pixels) -> None:
    np.testing.assert_array_equal(ALL[name](ramp(), 0).pixels[0, 0], expected)


def test_shuffled_patches_are_the_same_blocks_elsewhere() -> None:
    def blocks(pixels: Pixels) -> list[bytes]:
        return [pixels[0, :, y : y + 4, x : x + 4].tobytes() for y in range(0, 28, 4) for x in range(0, 28, 4)]

    normal = np.random.default_rng(0).integers(0, 256, (1, 3, 28, 28), np.uint8)
    made = ALL["shuffled patches"](normal, 0).pixels
    assert sorted(blocks(made)) == sorted(blocks(normal))
    assert sum(a == b for a, b in zip(blocks(made), blocks(normal), strict=True)) < 6


def test_levels_and_shares() -> None:
    normal = garments(count=80)
    made = {name: of(normal, 0).pixels for name, of in ALL.items()}
    assert (np.ptp(made["constant"], axis=(1, 2, 3)) == 0).all()
    assert len(np.unique(made["constant"])) > 50
    assert np.bincount(made["uniform noise"].ravel(), minlength=256).min() > 0.6 * normal.size / 256
    changed = made["salt and pepper"] != normal
    assert set(np.unique(made["salt and pepper"][changed])) == {0, 255}
    # Half of the black background stays black.
    assert (made["salt and pepper"][normal == 0] == 255).mean() == pytest.approx(0.015, abs=0.004)
    spread = [pixels.std(axis=(1, 2, 3)).mean() for pixels in (made["half contrast"], normal)]
    assert spread[0] == pytest.approx(spread[1] / 2, rel=0.02)
    pairs = made["pixelated"].reshape(80, 14, 2, 14, 2)
    assert (np.ptp(pairs, axis=(2, 4)) == 0).all()


def test_blurs_smooth_and_sharpening_does_not() -> None:
    def roughness(pixels: Pixels) -> float:
        return float(np.abs(np.diff(pixels.astype(float), axis=3)).mean())

    normal = garments()
    made = {name: roughness(of(normal, 0).pixels) for name, of in ALL.items()}
    assert made["Gaussian blur"] < 0.7 * roughness(normal)
    assert made["box blur"] < 0.7 * roughness(normal)
    assert made["sharpened"] > 1.3 * roughness(normal)
    point = np.zeros((1, 1, 7, 7), np.uint8)
    point[0, 0, 3, 3] = 180
    assert (ALL["box blur"](point, 0).pixels[0, 0, 2:5, 2:5] == 20).all()


def test_stretched_images_are_wider_but_no_taller() -> None:
    square = np.zeros((1, 1, 28, 28), np.uint8)
    square[0, 0, 9:19, 9:19] = 255
    y, x = np.nonzero(ALL["stretched"](square, 0).pixels[0, 0] > 127)
    assert (y.min(), np.ptp(y) + 1) == (9, 10)
    assert np.ptp(x) + 1 in (12, 13, 14)


def test_targets_and_development_are_apart() -> None:
    assert not TARGETS.keys() & DEVELOPMENT.keys()
    assert not set(TARGETS.values()) & set(DEVELOPMENT.values())


@pytest.mark.parametrize("of", [negatives.inverted, negatives.occluded])
def test_other_than_8_bit_images_are_refused(of: NegativeSet) -> None:
    with pytest.raises(ValueError, match=r"pixels: got float64 \(2, 1, 8, 8\), allowed is uint8"):
        of(np.zeros((2, 1, 8, 8)), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pixels: got uint8 \(8, 8\)"):
        of(np.zeros((8, 8), np.uint8), 0)


def test_sizes_and_seeds_that_cannot_be_are_refused() -> None:
    wide = np.zeros((1, 1, 6, 8), np.uint8)
    for name in ("rotated 90", "transposed"):
        with pytest.raises(ValueError, match="pixels: got 6x8, allowed are square images"):
            ALL[name](wide, 0)
    with pytest.raises(ValueError, match="pixels: got 6x8, allowed are multiples of 4"):
        ALL["shuffled patches"](wide, 0)
    with pytest.raises(ValueError, match="seed: got -1"):
        ALL["constant"](wide, -1)
