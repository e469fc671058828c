"""Image files to 8-bit arrays and back, with an account of every change made on the way.

Pillow and numpy only: API processes decode uploads without torch. What Pillow makes of a file is
never trusted: size is checked before a pixel is decoded, and whatever a damaged file provokes in a
decoder surfaces as one :class:`ImageError`.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

Format = Literal["png", "jpeg", "webp"]
Box = tuple[int, int, int, int]
"""x and y of the upper left corner, width, height."""
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
DEFAULT_MAX_PIXELS = 32_000_000
BACKGROUND = (255, 255, 255)
ORIENTATION = 0x0112
TURNED = range(2, 9)
"""EXIF orientations other than upright."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0

# Our own limit is checked before decoding, and it is stricter than Pillow's, which only warns.
Image.MAX_IMAGE_PIXELS = None

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    EOFError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders have been seen to raise on damaged files."""


class ImageError(ValueError):
    """An upload that is not a usable image. ``code`` is stable, the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Change:
    """One change made to an input image: a stable code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class Decoded:
    """A decoded image in mode L, RGB or RGBA, with the changes that decoding made."""

    image: Image.Image
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """8-bit pixels (C, H, W) in a model's size and colours, with all changes since the file."""

    pixels: NDArray[np.uint8]
    changes: tuple[Change, ...] = ()
    original_size: tuple[int, int] = (0, 0)
    """Width and height of the image before it was fitted, upright."""


def load_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Decoded:
    """Decode one image file; raises :class:`ImageError` with a code when it cannot be used.

    Codes: ``empty_image``, ``invalid_image`` (not an image, or damaged), ``image_too_large``,
    ``animated_image``, ``unsupported_image`` (a pixel format without an honest 8-bit meaning).
    """
    if not data:
        raise ImageError("empty_image", "the file is empty; send the bytes of an image")
    with warnings.catch_warnings():
        # Pillow warns about odd metadata; only its own warnings are silenced, other threads' are not.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return _load(data, max_pixels)


def _load(data: bytes, max_pixels: int) -> Decoded:
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except _DAMAGE:
        names = ", ".join(READABLE)
        raise ImageError("invalid_image", f"the file is not a readable image; readable are {names}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "image_too_large", f"the image has {width}x{height} pixels; at most {max_pixels:,} pixels are allowed"
        )
    try:
        # Whether there is a second frame, not how many: a small file may have a million, and all would be read.
        # Phones put a second picture, such as a depth map, behind the photograph (MPO): no animation.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ImageError("animated_image", "the image has more than one frame; send a single frame")
        # Asked before loading, because Pillow turns TIFF images, and forgets the tag, while it loads them.
        orientation, bits = image.getexif().get(ORIENTATION, 1), _bits_per_channel(image, data)
        image.load()
        return _to_eight_bits(image, orientation, bits)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError("invalid_image", f"the image is damaged or truncated: {error}") from None


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """Depth in the file, which Pillow's mode does not tell; 8 for formats that know nothing deeper."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImageFile):
        bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
        if bits > 8 and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ImageError("unsupported_image", f"the image has {bits} bits and white as zero; send black as zero")
        return int(bits)
    return 8


def _to_eight_bits(image: Image.Image, orientation: object, bits: int) -> Decoded:
    """Bring any supported Pillow mode to L, RGB or RGBA."""
    changes: list[Change] = []
    if orientation in TURNED:
        changes.append(Change("rotated", "rotated as the file's EXIF orientation says"))
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError("unsupported_image", "the image has floating-point values; send 8 or 16 bits per channel")
    if bits > 8:
        values = np.asarray(image, dtype=np.int32) if image.mode.startswith("I") else None
        if bits != 16 or (values is not None and values.min() < 0):
            raise ImageError("unsupported_image", f"the image has {bits} bits per channel; send 8, or 16 unsigned")
        if "transparency" in image.info:
            raise ImageError(
                "unsupported_image", "the image has 16 bits and a transparent colour; send an alpha channel"
            )
        if values is not None:
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        changes.append(Change("depth_reduced", "reduced from 16 to 8 bits per channel"))
    if image.mode in ("P", "PA"):
        transparent = image.mode == "PA" or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
        changes.append(Change("colour_converted", "palette colours expanded to RGB"))
    elif image.mode in ("LA", "La", "RGBa") or ("transparency" in image.info and image.mode in ("1", "L", "RGB")):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "RGBA"):
        changes.append(Change("colour_converted", f"converted from {image.mode} to RGB"))
        image = image.convert("RGB")
    return Decoded(image, tuple(changes))


def _opaque(image: Image.Image) -> tuple[Image.Image, list[Change]]:
    """Lay a transparent image on white."""
    if image.mode != "RGBA":
        return image, []
    backdrop = Image.new("RGB", image.size, BACKGROUND)
    backdrop.paste(image, mask=image.getchannel("A"))
    extrema = image.getchannel("A").getextrema()
    if extrema == (255, 255):
        return backdrop, []
    return backdrop, [Change("alpha_composited", "transparent pixels were laid on white")]


def _is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has three equal channels, so that reducing it to one loses nothing."""
    red, green, blue = (np.asarray(channel) for channel in image.split())
    return bool((red == green).all() and (green == blue).all())


def fit_image(decoded: Decoded, image_size: int, channels: int) -> Fitted:
    """Bring a decoded image to a model's colours and size, saying what was changed.

    The shorter side is scaled to ``image_size`` (bicubic with antialiasing) and the centre cropped.
    """
    image, changes = _opaque(decoded.image)
    changes = [*decoded.changes, *changes]
    if channels == 1 and image.mode == "RGB":
        if _is_grey(image):
            image = image.getchannel(0)
        else:
            image = image.convert("L")
            changes.append(Change("colour_converted", "converted from RGB to grey (ITU-R 601 luma)"))
    elif channels == 3 and image.mode == "L":
        image = image.convert("RGB")
        changes.append(Change("colour_converted", "grey repeated over three channels"))
    width, height = image.size
    if (width, height) != (image_size, image_size):
        crop = "" if width == height else ", centre cropped to a square"
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        changes.append(Change("resized", f"resized from {width}x{height} to {image_size}x{image_size}{crop}"))
    array = np.asarray(image, dtype=np.uint8)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return Fitted(np.ascontiguousarray(array), tuple(changes), (width, height))


def original_box(bbox: Box, image_size: int, original_size: tuple[int, int]) -> Box:
    """Where a box in a fitted image's pixels was in the image before :func:`fit_image`, in whole pixels around it."""
    shorter = min(original_size)
    spans = []
    for start, length, full in zip(bbox[:2], bbox[2:], original_size, strict=True):
        # The crop begins at a half pixel where the sides differ by an odd number: everything is doubled here.
        offset, double = full - shorter, 2 * image_size
        first = (offset * image_size + 2 * start * shorter) // double
        last = -(-(offset * image_size + 2 * (start + length) * shorter) // double)
        spans.append((first, last - first))
    (x, width), (y, height) = spans
    return x, y, width, height


def to_pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    """(C, H, W) 8-bit pixels as a Pillow image."""
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def encode_image(pixels: NDArray[np.uint8], file_format: Format, quality: int | None = None) -> bytes:
    """(C, H, W) 8-bit pixels as the bytes of an image file; PNG and WebP are lossless.

    ``quality``, 0 to 100, is JPEG's, 95 if not given; below 100 it makes WebP lossy.
    """
    image, buffer = to_pillow(pixels), io.BytesIO()
    if file_format == "png":
        image.save(buffer, "PNG")
    elif file_format == "webp":
        exact = quality in (None, 100)
        image.save(buffer, "WEBP", lossless=exact, **({} if exact else {"quality": quality}))
    else:
        image.save(buffer, "JPEG", quality=95 if quality is None else quality, subsampling=0)
    return buffer.getvalue()


def grid(images: list[NDArray[np.uint8]], columns: int | None = None, gap: int = 1) -> NDArray[np.uint8]:
    """Lay (C, H, W) images out as one (C, H', W') picture on a white ground, row by row."""
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    channels, height, width = images[0].shape
    rows = math.ceil(len(images) / columns)
    canvas = np.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas
