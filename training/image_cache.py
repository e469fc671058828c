"""Decoded images on disk, mapped into memory: decoded once, and read by all processes of a host from the same pages.

An entry is one file of 8-bit pixels (N, C, H, W). Its name is a hash of what its files are: their names, sizes and
times of change, as ``git`` tells files apart, and the size they were decoded to. It appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Changes when the same files would be decoded to other pixels."""


class DataError(ValueError):
    """The data directory cannot be used; the message says what was found and what is expected."""


def cache_key(root: Path, paths: Sequence[Path], image_size: int, channels: int) -> str:
    """Name of the entry for these files, in this order, at this size."""
    digest = hashlib.sha256(f"{FORMAT} {image_size} {channels}\n".encode())
    for path in paths:
        status = path.stat()
        name = str(path.relative_to(root)).encode(errors="surrogateescape")
        # The inode's time: what is unpacked from an archive has the archive's own times, often all the same.
        digest.update(b"%s\0%d %d\n" % (name, status.st_size, status.st_ctime_ns))
    return digest.hexdigest()[:32]


def cached_pixels(
    cache: Path,
    key: str,
    shape: tuple[int, int, int, int],
    fill: Callable[[NDArray[np.uint8]], None],
    say: Callable[[str], None],
) -> NDArray[np.uint8]:
    """The entry's pixels, read-only; where there is none, ``fill`` makes it. Raises :class:`DataError`, and what
    ``fill`` raises, and then leaves nothing behind."""
    path = cache / f"{key}.npy"
    if path.is_file():
        pixels = _open(path, shape)
        say(f"{shape[0]:,} decoded images from {path} ({_mebibytes(path.stat().st_size)})")
        return pixels
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        _check_space(cache, int(np.prod(shape)))
        with NamedTemporaryFile(dir=cache, prefix=f"{key}.", suffix=".part", delete=False) as file:
            part = Path(file.name)
            writing = os.dup(file.fileno())
            # Where the disk has no locks nothing is ever taken for abandoned.
            with suppress(OSError):
                fcntl.flock(writing, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(f"cache: {cache} cannot be written: {error}") from error
    try:
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        try:
            # A hole in the file that the disk cannot fill later would be a signal, and no error.
            with part.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        except OSError as error:
            raise DataError(f"cache: {cache} has no room for {_mebibytes(pixels.nbytes)}: {error}") from error
        fill(pixels)
        pixels.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        os.close(writing)
    say(f"{shape[0]:,} images decoded to {path} ({_mebibytes(path.stat().st_size)})")
    return _open(path, shape)


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        pixels = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: damaged; remove it, and it is made again ({error})") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"{path}: damaged; remove it, and it is made again (it has the shape {pixels.shape})")
    # A plain array over the same pages: what is taken from it are plain arrays too.
    return np.asarray(pixels).view(np.ndarray)


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes left half done; what another one is writing, it holds a lock on."""
    for part in cache.glob("*.part"):
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)


def _check_space(cache: Path, need: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < need:
        raise DataError(f"cache: {cache} has {_mebibytes(free)} free, allowed is at least {_mebibytes(need)}")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
