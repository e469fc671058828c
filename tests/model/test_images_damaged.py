"""Whatever bytes arrive, decoding gives an image or an ImageError, and warns about nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.images import ImageError, fit_image, load_image

CODES = {"empty_image", "invalid_image", "image_too_large", "animated_image", "unsupported_image"}


def save(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    """Real files of every readable format, in several kinds each."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    grey, palette, rgba = rgb.convert("L"), rgb.convert("P"), rgb.convert("RGBA")
    rgba.putalpha(grey)
    sixteen = Image.fromarray(rng.integers(0, 65536, (8, 8)).astype(np.uint16))
    turned = rgb.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112], exif[271] = 6, "camera"
    return {
        "png": save(rgb, "PNG", exif=exif),
        "png 16 bits": save(sixteen, "PNG"),
        "png palette": save(palette, "PNG", transparency=bytes(range(100))),
        "png alpha": save(rgba.convert("LA"), "PNG"),
        "apng": save(rgb, "PNG", save_all=True, append_images=[turned]),
        "jpeg": save(rgb, "JPEG", exif=exif),
        "jpeg cmyk": save(rgb.convert("CMYK"), "JPEG"),
        "jpeg progressive": save(grey, "JPEG", progressive=True),
        "jpeg with two pictures": save(rgb, "MPO", save_all=True, append_images=[turned]),
        "webp": save(rgb, "WEBP", exif=exif),
        "webp lossless": save(rgba, "WEBP", lossless=True),
        "webp animated": save(rgb, "WEBP", save_all=True, append_images=[turned]),
        "gif": save(palette, "GIF", transparency=1),
        "gif animated": save(rgb, "GIF", save_all=True, append_images=[turned, rgb]),
        "tiff": save(rgb, "TIFF", exif=exif),
        "tiff 16 bits": save(sixteen, "TIFF"),
        "tiff float": save(Image.fromarray(rng.random((6, 6)).astype(np.float32)), "TIFF"),
        "tiff deflate": save(palette, "TIFF", compression="tiff_deflate"),
        "tiff lzw": save(rgb, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": save(rgb, "TIFF", compression="jpeg"),
        "tiff fax": save(rgb.convert("1"), "TIFF", compression="group4"),
        "bmp": save(rgb, "BMP"),
        "bmp palette": save(palette, "BMP"),
    }


FILES = files()


def survive(data: bytes) -> None:
    """Read and fit, or an ImageError with a known code; a Pillow warning is an error of this test."""
    problem = None
    try:
        decoded = load_image(data, max_pixels=2_000_000)
        for channels in (1, 3):
            assert fit_image(decoded, 8, channels).pixels.shape == (channels, 8, 8)
    except ImageError as error:
        problem = error
    assert problem is None or (problem.code in CODES and str(problem))


@pytest.mark.parametrize("name", FILES)
def test_every_truncation(name: str) -> None:
    data = FILES[name]
    for length in {*range(0, min(len(data), 60)), *range(0, len(data), max(1, len(data) // 40)), len(data)}:
        survive(data[:length])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=8),
    length=st.floats(0.3, 1),
)
def test_bit_flips(name: str, flips: list[tuple[float, int]], length: float) -> None:
    data = bytearray(FILES[name])
    for place, bit in flips:
        # Half of the flips hit the header, where most of the structure is.
        reach = min(len(data), 80) if bit % 2 else len(data)
        data[int(place * reach)] ^= 1 << bit
    survive(bytes(data[: max(1, int(len(data) * length))]) if length < 0.6 else bytes(data))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    head=st.sampled_from([b"", *{data[:n] for data in FILES.values() for n in (4, 12, 30)}]),
    tail=st.binary(max_size=300),
)
def test_arbitrary_bytes(head: bytes, tail: bytes) -> None:
    survive(head + tail)


@pytest.mark.parametrize("name", FILES)
def test_zeroed_ranges(name: str) -> None:
    data = FILES[name]
    for start in range(0, len(data), max(1, len(data) // 25)):
        for fill in (b"\0", b"\xff"):
            survive(data[:start] + fill * 8 + data[start + 8 :])
