"""Image files as callers send them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[Any]


def pixels(size: int = 28, channels: int = 1, seed: int = 0) -> Pixels:
    """Random 8-bit values, (size, size) or (size, size, 3)."""
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normal(count: int, size: int = 12, seed: int = 0) -> Pixels:
    """Images (N, size, size) of one kind: waves of random phase with a little noise, none of them bright."""
    random = np.random.default_rng(seed)
    phase = random.uniform(0, 2 * np.pi, (count, 1, 1))
    wave = np.sin(np.add.outer(np.arange(size), np.arange(size)) / 3 + phase)
    return np.clip(90 + 40 * wave + random.normal(0, 6, (count, size, size)), 0, 255).astype(np.uint8)


def file(image: Pixels | Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    picture, buffer = image if isinstance(image, Image.Image) else Image.fromarray(image), io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def b64(data: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(data).decode()


def opened(data: bytes | str) -> Pixels:
    """The values of an image file, as bytes or base64."""
    return np.asarray(Image.open(io.BytesIO(data if isinstance(data, bytes) else base64.b64decode(data))))


def array(data: str) -> Pixels:
    """The values of a .npy file in base64."""
    return np.load(io.BytesIO(base64.b64decode(data)), allow_pickle=False)


def answered(response: httpx.Response) -> list[Pixels]:
    """The pictures of an answer with images."""
    assert response.status_code == 200, response.text
    return [opened(image["b64"]) for image in response.json()["images"]]


def bomb(side: int) -> bytes:
    """A valid PNG of side × side black pixels that is tiny as a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
