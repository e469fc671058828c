"""Image files: what is read, what is refused, and that every change is told."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from model.images import ImageError, encode_image, fit_image, grid, load_image, original_box, to_pillow

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
RGB = Image.fromarray(COLOUR)


def save(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, transparent: bytes | None = None) -> bytes:
    """A PNG file by hand, for the kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    extra = b"" if transparent is None else chunk(b"tRNS", transparent)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(channels: int, bits: int, data: bytes, photometric: int, sample_format: int = 1) -> bytes:
    """A 2×2 uncompressed TIFF file by hand."""
    tags: list[tuple[int, int, list[int]]] = [
        (256, 3, [2]),
        (257, 3, [2]),
        (258, 3, [bits] * channels),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [0]),
        (277, 3, [channels]),
        (278, 3, [2]),
        (279, 4, [len(data)]),
        (339, 3, [sample_format] * channels),
    ]
    end = 8 + 2 + 12 * len(tags) + 4
    long_values = sum(2 * len(values) for _, _, values in tags if len(values) > 2)
    body, extra = b"", b""
    for tag, kind, values in tags:
        values = [end + long_values] if tag == 273 else values
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", end + len(extra)), extra + packed
        body += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + extra + data


def fit(data: bytes, size: int, channels: int) -> tuple[NDArray[np.uint8], list[str]]:
    fitted = fit_image(load_image(data), size, channels)
    assert fitted.pixels.shape == (channels, size, size)
    assert fitted.pixels.dtype == np.uint8
    return fitted.pixels, [change.code for change in fitted.changes]


def square(image: Image.Image) -> Image.Image:
    return image.crop((0, 0, 20, 20))


class TestUnchanged:
    """A file of the model's size and colours reaches the model untouched, and nothing is reported."""

    @pytest.mark.parametrize(
        "file_format", ["PNG", "BMP", "TIFF", pytest.param(("WEBP", {"lossless": True}), id="WEBP")]
    )
    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_lossless_formats(self, file_format: Any, mode: str) -> None:
        name, options = file_format if isinstance(file_format, tuple) else (file_format, {})
        image = square(RGB.convert(mode))
        pixels, codes = fit(save(image, name, **options), 20, 3 if mode == "RGB" or name == "WEBP" else 1)
        expected = np.asarray(image).reshape(20, 20, -1).transpose(2, 0, 1)
        assert (pixels == expected).all()
        assert codes == []

    def test_grey_in_three_equal_channels_is_grey(self) -> None:
        pixels, codes = fit(save(square(RGB.convert("L").convert("RGB")), "PNG"), 20, 1)
        assert (pixels[0] == np.asarray(square(RGB.convert("L")))).all()
        assert codes == []

    def test_opaque_alpha(self) -> None:
        pixels, codes = fit(save(square(RGB.convert("RGBA")), "PNG"), 20, 3)
        assert (pixels == COLOUR[:20].transpose(2, 0, 1)).all()
        assert codes == []

    def test_one_bit(self) -> None:
        bits = square(RGB.convert("1"))
        pixels, codes = fit(save(bits, "PNG"), 20, 1)
        assert (pixels[0] == np.asarray(bits) * 255).all()
        assert codes == []

    def test_jpeg_is_close(self) -> None:
        flat = Image.new("RGB", (20, 20), (200, 40, 90))
        pixels, codes = fit(save(flat, "JPEG", quality=95), 20, 3)
        assert np.abs(pixels[:, 0, 0].astype(int) - (200, 40, 90)).max() <= 3
        assert codes == []


class TestChanges:
    def test_resized_and_cropped(self) -> None:
        image = Image.fromarray(np.repeat(np.repeat(COLOUR[:8, :8], 4, 0), 4, 1))
        wide = Image.new("RGB", (64, 32))
        wide.paste(image, (16, 0))
        decoded = fit_image(load_image(save(wide, "PNG")), 32, 3)
        assert (decoded.pixels == np.asarray(image).transpose(2, 0, 1)).all(), "the centre is what is kept"
        assert decoded.changes[0].message == "resized from 64x32 to 32x32, centre cropped to a square"
        _, codes = fit(save(image, "PNG"), 8, 3)
        assert codes == ["resized"]

    def test_colour_to_grey_and_grey_to_colour(self) -> None:
        pixels, codes = fit(save(square(RGB), "PNG"), 20, 1)
        assert (pixels[0] == np.asarray(square(RGB).convert("L"))).all()
        assert codes == ["colour_converted"]
        pixels, codes = fit(save(square(RGB.convert("L")), "PNG"), 20, 3)
        assert (pixels[0] == pixels[1]).all()
        assert (pixels[1] == pixels[2]).all()
        assert codes == ["colour_converted"]

    def test_alpha_is_laid_on_white(self) -> None:
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
        image.putpixel((0, 0), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 128))
        for channels in (1, 3):
            pixels, codes = fit(save(image, "PNG"), 8, channels)
            assert pixels[0, 0, :3].tolist() == [255, 127, 0]
            assert codes == ["alpha_composited"]
        pixels, codes = fit(save(image.convert("LA"), "PNG"), 8, 1)
        assert pixels[0, 0, :3].tolist() == [255, 127, 0]
        assert codes == ["alpha_composited"]

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (png(2, 2, 8, 0, b"\0\x80\x40" * 2, b"\0\x80"), [255, 64]),
            (png(2, 2, 8, 2, b"\0\x80\x80\x80\x40\x40\x40" * 2, b"\0\x80" * 3), [255, 64]),
            (png(2, 2, 1, 0, b"\0\x40" * 2, b"\0\0"), [255, 255]),
        ],
        ids=["grey", "colour", "one-bit"],
    )
    def test_a_transparent_colour_is_laid_on_white(self, data: bytes, expected: list[int]) -> None:
        pixels, codes = fit(data, 2, 1)
        assert pixels[0, 0].tolist() == expected
        assert codes == ["alpha_composited"]

    @pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
    def test_palette(self, transparency: int | bytes | None) -> None:
        image = Image.new("P", (3, 3))
        image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
        image.putdata([0, 1, 2] * 3)
        options = {} if transparency is None else {"transparency": transparency}
        pixels, codes = fit(save(image, "PNG", **options), 3, 3)
        first = [10, 20, 30] if transparency is None else [255, 255, 255]
        assert pixels[:, 0, 0].tolist() == first
        assert pixels[:, 0, 2].tolist() == [0, 0, 0]
        assert codes == ["colour_converted"] + ([] if transparency is None else ["alpha_composited"])

    def test_sixteen_bits(self) -> None:
        values = np.array([[0, 65535, 257 * 100], [257 * 100 + 128, 257 * 100 + 129, 1]], dtype=np.uint16)
        values = np.vstack([values, values[:1]])
        for file_format in ("PNG", "TIFF"):
            pixels, codes = fit(save(Image.fromarray(values), file_format), 3, 1)
            assert pixels[0, :2].tolist() == [[0, 255, 100], [100, 101, 0]]
            assert codes == ["depth_reduced"]

    @pytest.mark.parametrize(
        "data",
        [
            png(2, 2, 16, 2, (b"\0" + b"\x80\xff" * 6) * 2),
            png(2, 2, 16, 6, (b"\0" + b"\x80\xff\x80\xff\x80\xff\xff\xff" * 2) * 2),
            png(2, 2, 16, 4, (b"\0" + b"\x80\xff\xff\xff" * 2) * 2),
            tiff(3, 16, b"\xff\x80" * 12, photometric=2),
        ],
        ids=["RGB PNG", "RGBA PNG", "LA PNG", "RGB TIFF"],
    )
    def test_sixteen_bits_in_several_channels(self, data: bytes) -> None:
        pixels, codes = fit(data, 2, 3)
        assert np.abs(pixels.astype(int) - 128).max() <= 1
        assert codes == ["depth_reduced"]

    @pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
    def test_cmyk(self, file_format: str) -> None:
        image = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
        pixels, codes = fit(save(image, file_format), 8, 3)
        assert np.abs(pixels[:, 4, 4].astype(int) - (255, 0, 0)).max() <= 4
        assert codes == ["colour_converted"]

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 10))
    def test_exif_rotation(self, file_format: str, orientation: int) -> None:
        image = Image.new("RGB", (16, 16))
        image.paste((255, 255, 255), (0, 0, 8, 8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels, codes = fit(save(image, file_format, exif=exif), 16, 3)
        bright = (pixels.mean(0) > 128).nonzero()
        corner = (bright[0].mean() > 8, bright[1].mean() > 8)
        upright = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0), 9: (0, 0)}
        assert corner == upright[orientation]
        assert codes == (["rotated"] if 2 <= orientation <= 8 else [])


class TestRefused:
    def refused(self, data: bytes, code: str, match: str, **options: Any) -> None:
        with pytest.raises(ImageError, match=match) as caught:
            load_image(data, **options)
        assert caught.value.code == code

    def test_empty(self) -> None:
        self.refused(b"", "empty_image", "empty")

    @pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", bytes(1000)])
    def test_not_an_image(self, data: bytes) -> None:
        self.refused(data, "invalid_image", "readable")

    @pytest.mark.parametrize("file_format", ["ICO", "PPM", "TGA", "EPS"])
    def test_formats_that_are_not_offered(self, file_format: str) -> None:
        self.refused(save(RGB, file_format), "invalid_image", "readable are PNG")

    @pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_animated(self, file_format: str) -> None:
        data = save(RGB, file_format, save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)])
        self.refused(data, "animated_image", "more than one frame")

    def test_frames_are_not_counted(self) -> None:
        """Reading a million of them to say how many there are would take a minute."""
        frame = save(RGB, "GIF", save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)])
        many = save(RGB, "GIF", save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180), RGB] * 5)
        assert len(many) > 2 * len(frame)
        self.refused(many[: 2 * len(frame)], "animated_image", "more than one frame")

    def test_still_gif(self) -> None:
        assert load_image(save(RGB.convert("P"), "GIF")).image.size == (20, 24)

    def test_decompression_bomb(self) -> None:
        """50 megapixels in 50 kB are refused from the header."""
        bomb = png(10_000, 5000, 8, 0, bytes(10_001 * 5000))
        assert len(bomb) < 100_000
        self.refused(bomb, "image_too_large", "10000x5000 pixels; at most 32,000,000")

    def test_the_pixel_limit_is_a_setting(self) -> None:
        data = save(RGB, "PNG")
        self.refused(data, "image_too_large", "at most 479", max_pixels=479)
        assert load_image(data, max_pixels=480).image.size == (20, 24)

    def test_floating_point(self) -> None:
        self.refused(save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported_image", "floating-point")

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (tiff(1, 32, b"\xff\x80\0\0" * 4, photometric=1), "32 bits"),
            (tiff(1, 32, b"\xff\xff\xff\xff" * 4, photometric=1, sample_format=2), "32 bits"),
            (tiff(1, 16, b"\xff\xf0" * 4, photometric=1, sample_format=2), "unsigned"),
            (tiff(1, 12, b"\xff" * 12, photometric=1), "12 bits"),
            (tiff(1, 16, b"\xff\xf0" * 4, photometric=0), "white as zero"),
            (png(2, 2, 16, 0, (b"\0" + b"\x80\xff" * 2) * 2, b"\x80\xff"), "transparent colour"),
        ],
        ids=["uint32", "int32", "int16", "12 bits", "white is zero", "16 bits and a transparent colour"],
    )
    def test_depths_without_an_honest_8_bit_meaning(self, data: bytes, match: str) -> None:
        self.refused(data, "unsupported_image", match)

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
    def test_truncated(self, file_format: str) -> None:
        noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        data = save(noise, file_format)
        self.refused(data[: len(data) // 2], "invalid_image", "damaged|readable")


class TestWriting:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        channels=st.sampled_from([1, 3]),
        size=st.integers(1, 40),
        file_format=st.sampled_from(["png", "webp"]),
    )
    def test_png_and_webp_are_lossless(self, seed: int, channels: int, size: int, file_format: Any) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (channels, size, size), dtype=np.uint8)
        fitted = fit_image(load_image(encode_image(pixels, file_format)), size, channels)
        assert (fitted.pixels == pixels).all()
        assert fitted.changes == ()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_jpeg_is_close(self, channels: int) -> None:
        smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 2
        pixels = np.stack([smooth] * channels)
        fitted = fit_image(load_image(encode_image(pixels, "jpeg")), 32, channels)
        assert np.abs(fitted.pixels.astype(int) - pixels).max() <= 4

    def test_pillow_image(self) -> None:
        assert to_pillow(GREY[None]).mode == "L"
        assert (np.asarray(to_pillow(COLOUR.transpose(2, 0, 1))) == COLOUR).all()


class TestGrid:
    @settings(max_examples=40, deadline=None)
    @given(
        count=st.integers(1, 12),
        channels=st.sampled_from([1, 3]),
        height=st.integers(1, 6),
        width=st.integers(1, 6),
        columns=st.none() | st.integers(1, 5),
        gap=st.integers(0, 3),
    )
    def test_every_image_is_at_its_place(
        self, count: int, channels: int, height: int, width: int, columns: int | None, gap: int
    ) -> None:
        tiles = [np.full((channels, height, width), i, np.uint8) for i in range(count)]
        picture = grid(tiles, columns, gap)
        columns = columns or int(np.ceil(count**0.5))
        rows = -(-count // columns)
        assert picture.shape == (channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
        for i in range(count):
            top, left = i // columns * (height + gap), i % columns * (width + gap)
            assert (picture[:, top : top + height, left : left + width] == i).all()
        assert (picture == 255).sum() == picture.size - count * tiles[0].size, "the rest is white"


def test_a_phone_photograph_with_a_second_picture_is_one_image() -> None:
    buffer, first, second = io.BytesIO(), Image.new("RGB", (40, 30), (10, 200, 30)), Image.new("RGB", (20, 15))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    decoded = load_image(buffer.getvalue())
    assert decoded.image.size == (40, 30)
    assert np.abs(np.asarray(decoded.image).astype(int) - (10, 200, 30)).max() <= 4


class TestOriginalBox:
    """Boxes are found again where they were before scaling and cropping."""

    def test_by_hand(self) -> None:
        assert original_box((1, 2, 3, 4), 28, (28, 28)) == (1, 2, 3, 4)
        assert original_box((0, 0, 28, 28), 28, (100, 60)) == (20, 0, 60, 60)
        assert original_box((0, 0, 28, 28), 28, (60, 100)) == (0, 20, 60, 60)
        assert original_box((7, 14, 7, 7), 28, (56, 112)) == (14, 56, 14, 14)
        assert original_box((27, 5, 1, 1), 28, (1, 1)) == (0, 0, 1, 1)
        # The crop of 3 x 2 pixels begins at half a pixel.
        assert original_box((0, 0, 1, 1), 2, (3, 2)) == (0, 0, 2, 1)

    @settings(max_examples=60, deadline=None)
    @given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40), data=st.data())
    def test_inside_of_the_image_and_not_empty(self, width: int, height: int, size: int, data: st.DataObject) -> None:
        x, y = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
        w, h = data.draw(st.integers(1, size - x)), data.draw(st.integers(1, size - y))
        left, top, wide, high = original_box((x, y, w, h), size, (width, height))
        assert 0 <= left < left + wide <= width
        assert 0 <= top < top + high <= height

    @pytest.mark.parametrize("shape", [(60, 90), (90, 60), (71, 64)])
    def test_a_bright_square_is_found_again(self, shape: tuple[int, int]) -> None:
        image = np.zeros(shape, np.uint8)
        image[30:42, 36:50] = 255
        fitted = fit_image(load_image(save(Image.fromarray(image), "PNG")), 30, 1)
        assert fitted.original_size == (shape[1], shape[0])
        rows, columns = np.nonzero(fitted.pixels[0] > 127)
        box = (int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
        found = original_box(box, 30, fitted.original_size)
        assert np.abs(np.array(found) - (36, 30, 14, 12)).max() <= 3

    def test_turned_photographs_are_upright(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        fitted = fit_image(load_image(save(Image.new("L", (40, 20)), "JPEG", exif=exif)), 10, 1)
        assert fitted.original_size == (20, 40)
