"""Named sets of images to compare: folders of pictures with or without masks, and the layout of MVTec AD.

MVTec AD (Bergmann et al., IJCV 2021) keeps for each object ``train/good``, ``test/good``, ``test/DEFECT`` and
``ground_truth/DEFECT/NAME_mask.png``, where a mask is light where a defect is. Masks go through the same scaling and
crop as their pictures.

Shape legend: N images, C channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model.images import Decoded, ImageError, fit_image, load_image
from training.data import IMAGE_SUFFIXES, DataError, epoch_order, find_test, load_images

GOOD, GROUND_TRUTH = "good", "ground_truth"
LIGHT = 128
"""Grey level from which on a mask's pixel is a part of the defect."""
COVERED = 0.5
"""Share of a scaled pixel that a defect must cover."""

Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class ImageSet:
    """8-bit images that belong together."""

    name: str
    pixels: NDArray[np.uint8]
    """(N, C, H, W)."""
    masks: Masks | None = None
    """Where they are anomalous (N, H, W), if that is known."""

    def __len__(self) -> int:
        return len(self.pixels)


def unique_names(directories: Sequence[Path]) -> list[str]:
    """A name for each directory: its own, with those above it where they are needed to tell it from the others.

    The same directory twice gets a number.
    """
    parts = [path.resolve().parts for path in directories]
    names: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        depth = next((d for d in range(1, len(own) + 1) if all(other[-d:] != own[-d:] for other in others)), len(own))
        name = "/".join(own[-depth:])
        taken = sum(name == before.partition(" (")[0] for before in names)
        names.append(f"{name} ({taken + 1})" if taken else name)
    return names


def load_set(
    directory: Path,
    image_size: int,
    channels: int,
    *,
    name: str | None = None,
    limit: int | None = None,
    masks: Path | None = None,
) -> ImageSet:
    """The pictures of a folder and its subfolders, or the test split where it has one; IDX files too.

    With ``limit`` so many of them, chosen at random but always the same (of IDX files, the first). ``masks`` is a
    folder with ``NAME_mask.png`` or ``NAME.png`` for every picture, in a folder of the set's name if there is one; a
    set that has not a single mask there has none. Raises :class:`~training.data.DataError`.
    """
    name = name or directory.resolve().name
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    if (directory / GROUND_TRUTH).is_dir():
        raise DataError(f"{directory}: has the layout of MVTec AD, normal and anomalous images together; use --mvtec")
    if any(directory.glob("*-images?idx3-ubyte*")):
        split = "test" if any(directory.glob("t10k-images?idx3-ubyte*")) else "train"
        return ImageSet(name, load_images(directory, split, image_size, channels).part(None, limit).pixels)
    root = find_test(directory) or directory
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"{root}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    if limit is not None:
        files = [files[i] for i in sorted(epoch_order(len(files), seed=0, epoch=0)[:limit])]
    folder = None if masks is None else masks / name if (masks / name).is_dir() else masks
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such directory")
    found = [None if folder is None else _find_mask(folder, path.relative_to(root)) for path in files]
    if any(found) and None in found:
        path = files[found.index(None)]
        raise DataError(f"{path}: has no mask; looked for {path.stem}_mask.png and {path.stem}.png in {folder}")
    pixels, fitted = [], []
    for path, mask in zip(files, found, strict=True):
        picture = _decode(path)
        pixels.append(fit_image(picture, image_size, channels).pixels)
        if mask is not None:
            fitted.append(_load_mask(mask, path, picture, image_size))
    return ImageSet(name, np.stack(pixels), np.stack(fitted) if fitted else None)


def load_mvtec(
    directory: Path, image_size: int, channels: int, *, limit: int | None = None
) -> tuple[ImageSet | None, list[ImageSet]]:
    """The normal test images (None without ``test/good``) and the sets of ``test``, with masks where there are any.

    ``limit`` is that of each set, as in :func:`load_set`. Raises :class:`~training.data.DataError`.
    """
    test = directory / "test"
    if not test.is_dir():
        raise DataError(f"{directory}: no test/DEFECT folders in it, as MVTec AD has them")
    folders = sorted(p for p in test.iterdir() if p.is_dir() and not p.name.startswith("."))
    defects = [folder for folder in folders if folder.name != GOOD]
    if not defects:
        raise DataError(f"{test}: no folder of anomalous images in it, only {GOOD!r}")
    truth = directory / GROUND_TRUTH
    sets = [
        load_set(
            folder,
            image_size,
            channels,
            limit=limit,
            masks=truth / folder.name if (truth / folder.name).is_dir() else None,
        )
        for folder in defects
    ]
    good = load_set(test / GOOD, image_size, channels, limit=limit) if (test / GOOD).is_dir() else None
    return good, sets


def _decode(path: Path) -> Decoded:
    try:
        return load_image(path.read_bytes())
    except (ImageError, OSError) as error:
        raise DataError(f"{path}: {error}") from error


def _find_mask(folder: Path, picture: Path) -> Path | None:
    """The mask of a picture, given by its path in its set."""
    for stem in (f"{picture.stem}_mask", picture.stem):
        # A picture in a subfolder may have its mask in one of the same name, or beside all others.
        for parent in (folder / picture.parent, folder):
            for suffix in sorted(IMAGE_SUFFIXES):
                if (path := parent / f"{stem}{suffix}").is_file():
                    return path
    return None


def _load_mask(path: Path, picture: Path, image: Decoded, image_size: int) -> Masks:
    """A mask (H, W) in a model's size; a defect too small to cover half a pixel keeps the pixel it covers most."""
    mask = _decode(path).image.convert("L")
    if mask.size != image.image.size:
        raise DataError(
            f"{path}: is {mask.width}x{mask.height}, but its picture {picture.name} "
            f"is {image.image.width}x{image.image.height}"
        )
    level = mask.point(lambda grey: 255 * (grey >= LIGHT)).convert("F")
    covered = np.asarray(ImageOps.fit(level, (image_size, image_size), Image.Resampling.BOX)) / 255
    most = float(covered.max())
    return np.asarray(covered >= min(COVERED, most)) & (covered > 0)
