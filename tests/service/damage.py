"""Image files that nobody should trust: damaged at random, lying about themselves, or made to exhaust the reader."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from PIL import Image, features

from tests.service.pictures import bomb, file, pixels

SIDE = 20
EXIF_HEADER = b"Exif\x00\x00"
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
OTHER_FORMATS = ("AVIF", "DDS", "DIB", "EPS", "ICNS", "ICO", "JPEG2000", "MSP", "PCX", "PDF", "PPM")
OTHER_FORMATS += ("QOI", "SGI", "SPIDER", "TGA", "XBM")
"""What Pillow can write, and the service does not read."""

# The parts of files


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with the right checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG whose header says anything at all."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a valid PNG."""
    found, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def directory(entries: Sequence[tuple[int, int, int, int]], following: int, at: int = 8) -> bytes:
    """A little-endian TIFF with one directory of (tag, type, count, value), and where it says the next one is."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\x00" + struct.pack("<I", at) + struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


def tiff(width: int, height: int, *, bits: int = 8, strip: int = 8, length: int = 16, compression: int = 1) -> bytes:
    """A grey TIFF whose directory says anything at all."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression)]
    entries += [(262, 3, 1, 1), (273, 4, 1, strip), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, length)]
    return directory(entries, 0) + bytes(64)


def gif(width: int, height: int, frames: int) -> bytes:
    """A GIF of one-pixel frames on a screen of any size."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    frame = b"!\xf9\x04\x00\x01\x00\x00\x00," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\x00"
    return screen + frame * frames + b";"


def bmp(width: int, height: int, *, bits: int = 24, compression: int = 0, offset: int = 54) -> bytes:
    """A BMP whose header says anything at all."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, offset) + header + bytes(64)


def with_exif(file_format: str, exif: bytes) -> bytes:
    """An image with any metadata."""
    return file(pixels(SIDE, 3), file_format, exif=EXIF_HEADER + exif)


# The files


def _frames(file_format: str) -> bytes:
    """Three pictures in one file."""
    first, *others = (Image.fromarray(pixels(SIDE, 3, seed)) for seed in range(3))
    return file(first, file_format, save_all=True, append_images=others)


@cache
def valid() -> dict[str, bytes]:
    """An image in every format and mode that the service reads, and in those that it does not."""
    grey, colour = Image.fromarray(pixels(SIDE)), Image.fromarray(pixels(SIDE, 3))
    clear = colour.copy()
    clear.putalpha(grey)
    palette, deep = colour.quantize(16), Image.fromarray(pixels(SIDE).astype("uint16") * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "png grey": file(grey),
        "png colour": file(colour),
        "png alpha": file(clear),
        "png grey alpha": file(clear.convert("LA")),
        "png palette": file(palette),
        "png transparent palette": file(palette, transparency=3),
        "png transparent grey": file(grey, transparency=3),
        "png bits": file(grey.convert("1")),
        "png deep": file(deep),
        "png exif": file(colour, exif=turned),
        "png profile": file(colour, icc_profile=bytes(300)),
        "png frames": _frames("PNG"),
        "jpeg grey": file(grey, "JPEG"),
        "jpeg colour": file(colour, "JPEG"),
        "jpeg progressive": file(colour, "JPEG", progressive=True),
        "jpeg cmyk": file(colour.convert("CMYK"), "JPEG"),
        "jpeg exif": file(colour, "JPEG", exif=turned, icc_profile=bytes(300)),
        "jpeg two pictures": _frames("MPO"),
        "webp": file(colour, "WEBP"),
        "webp lossless": file(clear, "WEBP", lossless=True),
        "webp exif": file(colour, "WEBP", exif=turned),
        "webp frames": _frames("WEBP"),
        "gif": file(palette, "GIF"),
        "gif transparent": file(palette, "GIF", transparency=3),
        "gif frames": _frames("GIF"),
        "bmp grey": file(grey, "BMP"),
        "bmp colour": file(colour, "BMP"),
        "bmp palette": file(palette, "BMP"),
        "bmp alpha": file(clear, "BMP"),
        "bmp bits": file(grey.convert("1"), "BMP"),
        "tiff grey": file(grey, "TIFF"),
        "tiff alpha": file(clear, "TIFF"),
        "tiff palette": file(palette, "TIFF"),
        "tiff cmyk": file(colour.convert("CMYK"), "TIFF"),
        "tiff lab": file(colour.convert("YCbCr"), "TIFF"),
        "tiff deep": file(deep, "TIFF"),
        "tiff signed": file(grey.convert("I"), "TIFF"),
        "tiff float": file(grey.convert("F"), "TIFF"),
        "tiff exif": file(colour, "TIFF", exif=turned),
        "tiff big": file(colour, "TIFF", big_tiff=True),
        "tiff frames": _frames("TIFF"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate"):
        made[f"tiff {compression}"] = file(colour, "TIFF", compression=compression)
    for compression in ("group3", "group4"):
        made[f"tiff {compression}"] = file(grey.convert("1"), "TIFF", compression=compression)
    for other in OTHER_FORMATS:
        if other == "AVIF" and not features.check("avif"):
            continue
        picture = {"MSP": grey.convert("1"), "XBM": grey.convert("1"), "SPIDER": grey.convert("F")}.get(other, colour)
        if other in ("ICNS", "ICO"):
            picture = colour.resize((32, 32))
        made[other.lower()] = file(picture, other)
    return made


def _looping() -> dict[str, bytes]:
    """Directories that lead back to themselves, in TIFFs and in the metadata of other formats."""
    size = [(256, 4, 1, 4), (257, 4, 1, 4)]
    itself, children = directory(size, 8), directory([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)], 8)
    many = directory([(0x0112, 3, 0x7FFFFFFF, 8)], 0)
    files = {"tiff loop": itself, "tiff children loop": children}
    for name, exif in {"loop": itself, "children loop": children, "count": many, "text": b"II*\x00zz"}.items():
        for file_format in ("PNG", "JPEG", "WEBP"):
            files[f"{file_format.lower()} exif {name}"] = with_exif(file_format, exif)
    return files


@cache
def hostile() -> dict[str, bytes]:
    """Files that were made to harm, each small."""
    zeros = zlib.compress(bytes(10_000_000), 9)
    grey, dot = Image.new("L", (5000, 5000)), Image.new("1", (1, 1))
    text = chunk(b"zTXt", b"Comment\x00\x00" + zeros)
    rows = zlib.compress(bytes((SIDE + 1) * SIDE))
    files = {
        "png bomb": bomb(4000),
        "png bomb above the limit": bomb(7000),
        "png 0x0": png(0, 0, data=rows),
        "png 0xN": png(0, SIDE, data=rows),
        "png one row": png(1_000_000, 1, data=zlib.compress(bytes(1_000_001))),
        "png one column": png(1, 1_000_000, data=zlib.compress(bytes(2_000_000))),
        "png huge": png(0x7FFFFFFF, 0x7FFFFFFF, data=rows),
        "png larger than numbers": png(0xFFFFFFFF, 0xFFFFFFFF, data=rows),
        "png without data": png(5000, 5000),
        "png too much data": png(SIDE, SIDE, data=zeros),
        "png text bomb": png(SIDE, SIDE, data=rows, more=text),
        "png text bombs": png(SIDE, SIDE, data=rows, more=text * 20),
        "png profile bomb": png(SIDE, SIDE, data=rows, more=chunk(b"iCCP", b"x\x00\x00" + zeros)),
        "png late text": png(SIDE, SIDE, data=rows)[:-12] + text * 20 + chunk(b"IEND", b""),
        "png many chunks": png(SIDE, SIDE, data=rows, more=chunk(b"tIME", bytes(7)) * 50_000),
        "png of no depth": png(SIDE, SIDE, bits=0, data=rows),
        "png of another depth": png(SIDE, SIDE, bits=3, data=rows),
        "png of another colour": png(SIDE, SIDE, colour=7, data=rows),
        "png palette without palette": png(SIDE, SIDE, colour=3, data=rows),
        "png wrong checksum": (good := png(SIDE, SIDE, data=rows))[:29] + b"\x00\x00\x00\x00" + good[33:],
        "jpeg large": file(grey, "JPEG"),
        "webp large": file(grey, "WEBP"),
        "webp alpha large": file(Image.new("RGBA", (4000, 4000)), "WEBP", lossless=True),
        "gif large": gif(65535, 65535, 1),
        "gif large screen": gif(5600, 5600, 1),
        "gif 0x0": gif(0, 0, 1),
        "gif many frames": gif(8, 8, 20_000),
        "gif frames on a large screen": gif(5000, 5000, 200),
        "gif no frame": gif(8, 8, 0),
        "bmp 0x0": bmp(0, 0),
        "bmp negative": bmp(-SIDE, -SIDE),
        "bmp upside down": bmp(4, -4),
        "bmp huge": bmp(0x7FFFFFFF, 0x7FFFFFFF),
        "bmp large": bmp(5000, 5000),
        "bmp smallest": bmp(SIDE, -0x80000000),
        "bmp runs": bmp(5000, 5000, bits=8, compression=1),
        "bmp of no depth": bmp(4, 4, bits=0),
        "bmp data nowhere": bmp(4, 4, offset=0xFFFFFFFF),
        "tiff 0x0": tiff(0, 0),
        "tiff huge": tiff(0xFFFFFFFF, 0xFFFFFFFF),
        "tiff large": tiff(5000, 5000),
        "tiff strip nowhere": tiff(4, 4, strip=0xFFFFFFF0),
        "tiff endless strip": tiff(4, 4, length=0xFFFFFFFF),
        "tiff of no depth": tiff(4, 4, bits=0),
        "tiff of great depth": tiff(4, 4, bits=65535),
        "tiff large deflated": file(grey, "TIFF", compression="tiff_adobe_deflate"),
        "tiff large runs": file(grey, "TIFF", compression="packbits"),
        "tiff many frames": file(dot, "TIFF", save_all=True, append_images=[dot] * 300),
        "gzip": gzip.compress(valid()["png grey"]),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n(x) (w) file\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "one byte": b"\x89",
        "nothing": b"",
    }
    return files | _looping()


# The damage

Damage = Callable[[random.Random, bytes], bytes]


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def _flipped_header(rng: random.Random, data: bytes) -> bytes:
    return _flipped(rng, data[:64]) + data[64:]


def _overwritten(rng: random.Random, data: bytes) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 32, 256))
    return data[:start] + rng.randbytes(len(data[start : start + length])) + data[start + length :]


def _cut_out(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 16, 128)) :]


def _repeated(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + rng.choice((1, 16, 128))] * rng.choice((2, 3, 100)) + data[start:]


def _spliced(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice(sorted(valid().values()))
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _extreme(rng: random.Random, data: bytes) -> bytes:
    size, order = rng.choice((1, 2, 4)), rng.choice("<>")
    number = rng.choice(EXTREMES) & ((1 << 8 * size) - 1)
    field = struct.pack(order + {1: "B", 2: "H", 4: "I"}[size], number)
    start = rng.randrange(min(len(data), rng.choice((64, len(data)))))
    return data[:start] + field + data[start + size :]


def _rechecked(rng: random.Random, data: bytes) -> bytes:
    """Damage in a PNG's chunk that its checksum does not betray."""
    if not data.startswith(b"\x89PNG"):
        return _extreme(rng, data)
    parts = chunks(data)
    at = rng.randrange(len(parts))
    kind, content = parts[at]
    parts[at] = (kind, rng.choice((_flipped, _extreme, _overwritten, _truncated))(rng, content or b"\x00"))
    if not rng.randrange(4):
        rng.shuffle(parts)
    return data[:8] + b"".join(chunk(kind, content) for kind, content in parts)


DAMAGES: tuple[Damage, ...] = (
    _truncated,
    _flipped,
    _flipped_header,
    _overwritten,
    _cut_out,
    _repeated,
    _spliced,
    _extreme,
    _rechecked,
)


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` files and what they are, the same for the same seed: those made to harm, and random damage."""
    made = sorted(hostile().items())
    yield from made[:count]
    rng, bases = random.Random(seed), sorted(valid().items())
    for number in range(count - len(made)):
        name, data = bases[number % len(bases)]
        hurt = rng.choice(DAMAGES)
        yield f"{seed}.{number}: {name}, {hurt.__name__.strip('_')}", hurt(rng, data)


def as_read(data: bytes) -> Image.Image:
    """What Pillow itself makes of a file."""
    return Image.open(io.BytesIO(data))
