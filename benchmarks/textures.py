"""Photographs of a surface in the layout of MVTec AD, with synthetic defects: something to try one's own pipeline on.

Run it with ``python -m benchmarks.textures OUT [--texture brick] [--train 800] [--test 60]``. Squares are cut out of a
photograph that scikit-image ships (512 × 512 grey, CC0): normal and damaged ones to test on from a band in its middle,
normal ones to train and calibrate on from above and below, so that no pixel is on both sides::

    OUT/train/good/            normal
    OUT/test/good/             normal, from the band in the middle
    OUT/test/scratch/, stain/  damaged
    OUT/ground_truth/scratch/, stain/   white where they are (NAME_mask.png)
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.negatives import TARGETS
from model.images import encode_image

TEXTURES = ("brick", "gravel", "grass")
SIZE = 64
BAND = (3 / 8, 5 / 8)
"""Where the band for testing begins and ends, as shares of the height: what it shows is between what is beside it."""
STAIN_LEVELS = 70
"""How much darker the middle of a stain is, in grey levels."""
STAIN_MASK = 10
"""A pixel belongs to a stain when it is darker by more than this."""

Pixels = NDArray[np.uint8]


def texture(name: str) -> Pixels:
    """A photograph (H, W); raises ``FileNotFoundError`` with what to install."""
    found = find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the photographs come with scikit-image: pip install scikit-image")
    path = Path(found.submodule_search_locations[0]) / "data" / f"{name}.png"
    return np.asarray(Image.open(path).convert("L"))


def cut_out(strips: list[Pixels], count: int, rng: np.random.Generator) -> Pixels:
    """Squares (count, 1, 64, 64) at random places of photographs (H, W), half of them mirrored."""
    squares = []
    for strip in rng.integers(len(strips), size=count):
        height, width = strips[strip].shape
        row, column = rng.integers(height - SIZE + 1), rng.integers(width - SIZE + 1)
        square = strips[strip][row : row + SIZE, column : column + SIZE]
        squares.append(square[:, :: rng.choice([-1, 1])])
    return np.stack(squares)[:, None]


def stained(pixels_NCHW: Pixels, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.bool_]]:
    """A soft dark blot on each image, and where it is (N, H, W)."""
    results, masks = [], []
    for pixels in pixels_NCHW:
        blot = np.zeros((SIZE, SIZE), np.float32)
        row, column, radius = rng.integers(12, SIZE - 12), rng.integers(12, SIZE - 12), rng.uniform(5, 9)
        y, x = np.mgrid[:SIZE, :SIZE]
        blot[((y - row) / radius) ** 2 + ((x - column) / (radius * rng.uniform(0.6, 1.4))) ** 2 < 1] = 1
        soft = np.asarray(Image.fromarray((255 * blot).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)))
        darker = STAIN_LEVELS * (soft / 255)
        results.append(np.clip(pixels - darker, 0, 255).round().astype(np.uint8))
        masks.append(darker > STAIN_MASK)
    return np.stack(results), np.stack(masks)


def write(directory: Path, images_NCHW: Pixels) -> None:
    """Number the images 000.png, 001.png, …"""
    directory.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images_NCHW):
        (directory / f"{i:03d}.png").write_bytes(encode_image(image, "png"))


def write_masks(directory: Path, masks_NHW: NDArray[np.bool_]) -> None:
    """As MVTec AD names them: 000_mask.png, white where the defect is."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks_NHW):
        (directory / f"{i:03d}_mask.png").write_bytes(encode_image(255 * mask[None].astype(np.uint8), "png"))


def make(out: Path, name: str, train: int, test: int, seed: int = 0) -> None:
    """Write the data set; the same arguments give the same files."""
    photograph = texture(name)
    top, bottom = (round(share * len(photograph)) for share in BAND)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    write(out / "train" / "good", cut_out([photograph[:top], photograph[bottom:]], train, rng))
    unseen = [photograph[top:bottom]]
    write(out / "test" / "good", cut_out(unseen, test, rng))
    scratched = TARGETS["scratched"](cut_out(unseen, test, rng), seed)
    stains, stain_masks = stained(cut_out(unseen, test, rng), rng)
    for defect, pixels, masks in (("scratch", scratched.pixels, scratched.masks), ("stain", stains, stain_masks)):
        if masks is None:
            raise AssertionError("scratches have masks")
        write(out / "test" / defect, pixels)
        write_masks(out / "ground_truth" / defect, masks)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--texture", choices=TEXTURES, default="brick")
    parser.add_argument("--train", type=int, default=800, help="normal images to train and calibrate on (default 800)")
    parser.add_argument("--test", type=int, default=60, help="images of each test folder (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make(options.out, options.texture, options.train, options.test, options.seed)
    print(f"{options.out}: {options.train} normal images to train on, {options.test} in each folder to test on")


if __name__ == "__main__":
    main()
