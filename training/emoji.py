"""Emoji as a data set: the npm packages ``emoji-datasource-google`` and ``emoji-datasource-twitter`` as class folders.

Each holds 64x64 PNGs with transparency, and ``emoji.json`` with the category of each emoji. A base emoji and its skin
tones are one emoji here: they, in all styles, are on one side of the split, so that no test image has a near copy
among the training images.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from PIL import Image, UnidentifiedImageError

from training.data import DataError

SIZE = 64
VERSION = "16.0.0"
LICENCES = {"google": "Apache-2.0 (Google's Noto Emoji)", "twitter": "CC BY 4.0 (Twitter's Twemoji)"}
"""Of the images, by style; the packages' own licence is that of their code."""
LEFT_OUT = "Component"
"""A category of parts: bare skin tones and hair."""
TEST_SHARE = 12
"""One emoji in so many is for testing."""


@dataclass(frozen=True)
class Picture:
    """One emoji in one style."""

    style: str
    code_point: str
    category: str
    base: str
    """Code point of the emoji without skin tone, which decides the side of the split."""
    png: bytes

    @property
    def split(self) -> str:
        """``train`` or ``test``, a function of the base alone."""
        number = int.from_bytes(hashlib.sha256(self.base.encode()).digest()[:8])
        return "test" if number % TEST_SHARE == 0 else "train"


@contextmanager
def fetched() -> Iterator[list[Path]]:
    """Both packages, fetched by npm into a directory that is removed afterwards; raises :class:`DataError`."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            "npm is not installed, which fetches the packages; where it is, `npm pack "
            f"emoji-datasource-google@{VERSION}` makes a file to give as --package"
        )
    with TemporaryDirectory() as directory:
        for style in LICENCES:
            name = f"emoji-datasource-{style}@{VERSION}"
            done = subprocess.run(  # noqa: S603 - npm by its own path, and constants
                [npm, "pack", name, "--pack-destination", directory, "--loglevel", "error"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["it says nothing"]
                raise DataError(f"npm pack {name} failed: {lines[-1]}")
        yield sorted(Path(directory).glob("*.tgz"))


def prepare_emoji(packages: Sequence[Path], out: Path) -> dict[str, int]:
    """Write ``out/train`` and ``out/test`` with a folder for each category; returns how many images each split has.

    ``out`` appears whole or not at all. Raises :class:`DataError` for what is no such package.
    """
    if out.exists():
        raise DataError(f"{out}: is there already; allowed is a directory to be made")
    pictures = [picture for package in packages for picture in read_package(package)]
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for picture in pictures:
            path = part / picture.split / picture.category / f"{picture.code_point}-{picture.style}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _on_white(picture).save(path)
        styles = sorted({picture.style for picture in pictures})
        lines = [f"emoji-datasource-{style}: images {LICENCES.get(style, 'of unknown licence')}" for style in styles]
        (part / "LICENCES.txt").write_text("\n".join(lines) + "\n")
        part.chmod(0o755)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part)
        raise
    return {split: sum(picture.split == split for picture in pictures) for split in ("train", "test")}


def read_package(package: Path) -> list[Picture]:
    """All pictures of a package; nothing of it is unpacked. Raises :class:`DataError`."""
    try:
        with tarfile.open(package) as archive:
            name = str(json.loads(_member(archive, "package/package.json"))["name"])
            style = name.removeprefix("emoji-datasource-")
            listed: list[dict[str, Any]] = json.loads(_member(archive, "package/emoji.json"))
            pictures = [
                Picture(style, code_point, emoji["category"], emoji["unified"], _member(archive, path))
                for emoji in listed
                if emoji["category"] != LEFT_OUT
                for code_point, path in _images(emoji, style)
            ]
    except (OSError, tarfile.TarError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise DataError(f"{package}: cannot be read as a package: {reason}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{package}: is not emoji-datasource-google or -twitter: {error!r}") from error
    if not pictures:
        raise DataError(f"{package}: no images of {SIZE}x{SIZE} in it")
    return pictures


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """A file of the archive; raises ``KeyError`` when it is not there."""
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(name)
    return file.read()


def _images(emoji: dict[str, Any], style: str) -> Iterator[tuple[str, str]]:
    """Code points and paths of an emoji and of its skin tones, those that this style has."""
    for variant in (emoji, *emoji.get("skin_variations", {}).values()):
        if variant.get(f"has_img_{style}"):
            yield variant["unified"].lower(), f"package/img/{style}/{SIZE}/{variant['image']}"


def _on_white(picture: Picture) -> Image.Image:
    """The picture without transparency; raises :class:`DataError` that names it."""
    where = f"emoji-datasource-{picture.style}, {picture.code_point}"
    try:
        image = Image.open(io.BytesIO(picture.png)).convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{where}: the image cannot be read: {error}") from error
    if image.size != (SIZE, SIZE):
        raise DataError(f"{where}: the image is {image.width}x{image.height}, allowed is {SIZE}x{SIZE}")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
