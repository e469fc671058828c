"""Lossless code lengths: how complex an image is, whatever a flow thinks of it.

A flow gives simple images a high likelihood; the length of a lossless code says how simple (Serrà et al.,
"Input complexity and out-of-distribution detection", arXiv 1909.11480). Codecs may change their output from one version
to the next, so a calibration keeps the lengths of fixed pictures (:func:`fingerprint`) to tell whether it still fits.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CODECS = ("png", "webp", "zlib")
WEBP_EFFORT = {"quality": 80, "method": 4}


def code_bytes(pixels_CHW: NDArray[np.uint8]) -> tuple[int, ...]:
    """Bytes of one 8-bit image (C, H, W), C = 1 or 3, in each of :data:`CODECS`, headers included."""
    channels = pixels_CHW.shape[0]
    image = Image.fromarray(pixels_CHW[0] if channels == 1 else np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))
    png, webp = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", compress_level=9)
    image.save(webp, "WEBP", lossless=True, **WEBP_EFFORT)
    return png.tell(), webp.tell(), len(zlib.compress(pixels_CHW.tobytes(), 9))


def code_lengths(pixels_NCHW: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Bits per dimension (N, 3) of 8-bit images (N, C, H, W) in each of :data:`CODECS`."""
    dims = int(np.prod(pixels_NCHW.shape[1:]))
    return 8 * np.array([code_bytes(pixels) for pixels in pixels_NCHW], np.float64).reshape(-1, len(CODECS)) / dims


def fingerprint(channels: int, size: int) -> list[list[int]]:
    """Code lengths in bytes of three fixed pictures: flat, smooth, and noise; equal where the codecs are the same."""
    ramp = np.add.outer(np.arange(size), np.arange(size)) * 127 // max(1, size - 1)
    # Raw Philox bits are the same in every version of numpy (NEP 19).
    noise = (np.random.Philox(key=[0, 0]).random_raw(size * size) >> np.uint64(56)).reshape(size, size)
    pictures = [np.zeros((size, size)), ramp, noise]
    return [list(code_bytes(np.repeat(p.astype(np.uint8)[None], channels, axis=0))) for p in pictures]
