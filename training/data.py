"""Images for training: IDX files (the MNIST family) or folders of images, one per class.

A data set is held as 8-bit arrays in memory, or mapped from a cache (:mod:`training.image_cache`).
The order of a run's batches depends only on (seed, epoch), so a resumed run continues exactly where
it stopped, and any number of processes takes the same images.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.images import ImageError, fit_image, load_image
from training import huggingface
from training.image_cache import DataError, cache_key, cached_pixels
from training.source import TEST_NAMES, Source

__all__ = ["DataError", "Images", "epoch_order", "load_images"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DECODED_TOGETHER = 1024
"""Files that wait for a thread at a time."""
IDX_PREFIX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Images:
    """8-bit images (N, C, H, W) with integer labels (N,) and the classes' names (may be empty).

    For a model of latents they have the latents, float32, in place of the pixels (:mod:`training.latents`).
    """

    pixels: NDArray[Any]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] = ()
    digests: NDArray[np.uint8] | None = None
    """What latents were made of: a SHA-256 of each image with the codec, (N, 32)."""

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, start: int | None, stop: int | None) -> Images:
        """The images from ``start`` to ``stop`` (as in a slice)."""
        digests = None if self.digests is None else self.digests[start:stop]
        return Images(self.pixels[start:stop], self.labels[start:stop], self.class_names, digests)


def _read_idx(path: Path, num_axes: int) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes, gzipped or not."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    header = 4 * (1 + num_axes)
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, num_axes)):
        raise DataError(f"{path}: not an IDX file of unsigned bytes with {num_axes} axes")
    shape = struct.unpack(f">{num_axes}I", raw[4:header])
    if len(raw) - header != int(np.prod(shape)):
        raise DataError(f"{path}: header says shape {shape}, but {len(raw) - header} bytes follow")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find_idx(directory: Path, split: str, kind: str) -> Path | None:
    stem = f"{IDX_PREFIX[split]}-{kind}"
    for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz"):
        if (directory / name).is_file():
            return directory / name
    return None


def _load_idx(directory: Path, split: str, image_size: int, channels: int) -> Images:
    images, labels = _find_idx(directory, split, "images-idx3-ubyte"), _find_idx(directory, split, "labels-idx1-ubyte")
    if images is None or labels is None:
        raise DataError(f"{directory}: IDX files of the {split} split are incomplete (need images and labels)")
    pixels, classes = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(f"{directory}: {len(pixels)} images but {len(classes)} labels")
    if not len(pixels):
        raise DataError(f"{images}: there are no images in it")
    if pixels.shape[1:] != (image_size, image_size) or channels != 1:
        raise DataError(
            f"{directory}: images are {pixels.shape[1]}x{pixels.shape[2]} with 1 channel, "
            f"but the model expects {image_size}x{image_size} with {channels}"
        )
    return Images(pixels[:, None], classes.astype(np.int64))


def find_test(directory: Path) -> Path | None:
    """The folder of a directory's test split: ``test``, or else ``validation`` or ``val``; None if there is none."""
    return next((directory / name for name in TEST_NAMES if (directory / name).is_dir()), None)


def _load_folders(
    directory: Path, split: str, image_size: int, channels: int, cache: Path | None, say: Callable[[str], None]
) -> Images:
    root = find_test(directory) if split == "test" else directory / split
    root = root if root is not None and root.is_dir() else directory
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if root is directory:
        # Class folders beside a test folder: what is tested on is no class to train on.
        folders = [folder for folder in folders if folder.name not in TEST_NAMES]
    if not folders:
        folders = [root]
    # Nor are its images where there are no class folders.
    aside = [directory / name for name in TEST_NAMES] if root is directory else []
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not any(path.is_relative_to(test) for test in aside)
        )
        if not files:
            raise DataError(f"{folder}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    # Files come class by class; in a fixed shuffled order a holdout counted from the end has all classes.
    source = Source(
        files=paths,
        root=root,
        items=lambda: ((str(path), path) for path in paths),
        labels=np.array(labels, np.int64),
        class_names=tuple(folder.name for folder in folders),
    )
    return decoded(source, image_size, channels, cache, say)


def decoded(source: Source, image_size: int, channels: int, cache: Path | None, say: Callable[[str], None]) -> Images:
    """The source's images, scaled and cropped, in memory or mapped from the cache."""
    order = epoch_order(len(source.labels), seed=0, epoch=0)
    shape = (len(source.labels), channels, image_size, image_size)

    def fill(pixels: NDArray[np.uint8]) -> None:
        _decode(source.items(), np.argsort(order), pixels)

    if cache is None:
        pixels = np.empty(shape, np.uint8)
        fill(pixels)
    else:
        pixels = cached_pixels(cache, cache_key(source.root, source.files, image_size, channels), shape, fill, say)
    return Images(pixels, source.labels[order], source.class_names)


def _decode(items: Iterable[tuple[str, bytes | Path]], places: NDArray[np.int64], pixels: NDArray[np.uint8]) -> None:
    """Decode, scale and crop each image into its place of ``pixels`` (N, C, H, W); names the first that cannot be."""
    channels, image_size = pixels.shape[1:3]

    def decode(place: np.int64, item: tuple[str, bytes | Path]) -> None:
        name, content = item
        try:
            image = load_image(content if isinstance(content, bytes) else content.read_bytes())
        except (ImageError, OSError) as error:
            raise DataError(f"{name}: {error}") from error
        pixels[place] = fit_image(image, image_size, channels).pixels

    # Pillow decodes without holding the interpreter: threads are enough.
    numbered = zip(places, items, strict=True)
    with ThreadPoolExecutor() as pool:
        while some := list(islice(numbered, DECODED_TOGETHER)):
            for _ in pool.map(decode, *zip(*some, strict=True)):
                pass


def load_images(
    directory: Path,
    split: str,
    image_size: int,
    channels: int,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Images:
    """Load the ``train`` or ``test`` split of a data directory.

    The directory holds IDX files (``train-images-idx3-ubyte[.gz]`` …), or one folder of images per class,
    optionally inside ``train/`` and ``test/`` (or ``validation/``, or ``val/``); a folder of images without
    subfolders is one class. Images from folders are scaled and centre-cropped to ``image_size`` and come in a fixed
    shuffled order, those from IDX files in the file's. What Hugging Face's ``datasets`` has saved, or has on its
    hub as ``hf:owner/name``, is treated as folders are (:mod:`training.huggingface`). With ``cache``, images that
    are no IDX files are decoded once and mapped from there; ``say`` is told what that takes on disk. Raises
    :class:`DataError` naming the file or folder that cannot be used.
    """
    if huggingface.is_dataset(directory):
        return decoded(huggingface.open_source(directory, split), image_size, channels, cache, say)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    if any(directory.glob("*-images?idx3-ubyte*")):
        return _load_idx(directory, split, image_size, channels)
    if split == "test" and find_test(directory) is None:
        expected = f"t10k-* IDX files or a folder named {', '.join(TEST_NAMES[:-1])} or {TEST_NAMES[-1]}"
        raise DataError(f"{directory}: no test split (expected {expected})")
    return _load_folders(directory, split, image_size, channels, cache, say)


def data_name(directory: Path) -> str:
    """What cards and reports call the data: the directory's last name, a hub's data set with all of its own."""
    return str(directory) if huggingface.is_on_hub(directory) else directory.resolve().name


def epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the images in one epoch, a function of (seed, epoch) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_images)
