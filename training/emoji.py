"""Emoji as a data set: the npm packages ``emoji-datasource-google`` and ``emoji-datasource-twitter`` as class folders.

Each holds 64x64 PNGs with transparency, and ``emoji.json`` with the category of each emoji. A base emoji and its skin
tones are one emoji here: they, in all styles, are on one side of the split, so that no test image has a near copy
among the training images.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from PIL import Image, UnidentifiedImageError

from training.data import DataError

SIZE = 64
VERSION = "16.0.0"
REGISTRY = "https://registry.npmjs.org"
REGISTRY_VARIABLE = "NPM_CONFIG_REGISTRY"
"""The variable of the environment by which npm is told of another registry."""
INTEGRITY = {
    "google": "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
"""The packages' hashes, by style, as npm writes them."""
PATIENCE_S = 60.0
"""How long the registry may be silent."""
LICENCES = {"google": "Apache-2.0 (Google's Noto Emoji)", "twitter": "CC BY 4.0 (Twitter's Twemoji)"}
"""Of the images, by style; the packages' own licence is that of their code."""
DESCRIPTIONS = ("package/package.json", "package/emoji.json")
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
def fetched(registry: str = REGISTRY, integrity: Mapping[str, str] = INTEGRITY) -> Iterator[list[Path]]:
    """Both packages from npm's registry, in a directory that is removed afterwards.

    Raises :class:`DataError` when one cannot be had, or is not the file whose hash is known.
    """
    with TemporaryDirectory() as directory:
        for style, known in integrity.items():
            name = f"emoji-datasource-{style}"
            url = f"{registry.rstrip('/')}/{name}/-/{name}-{VERSION}.tgz"
            _download(url, Path(directory) / f"{style}.tgz", known)
        yield [Path(directory) / f"{style}.tgz" for style in integrity]


def _download(url: str, path: Path, integrity: str) -> None:
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{REGISTRY_VARIABLE}: got {url!r}, allowed is an address that begins with https:// or http://")
    digest = hashlib.sha512()
    try:
        with urlopen(url, timeout=PATIENCE_S) as answer, path.open("wb") as file:  # noqa: S310 - checked above
            while piece := answer.read(2**20):
                digest.update(piece)
                file.write(piece)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # It is the answer, too.
        raise DataError(
            f"{url}: cannot be fetched ({error}); without a network, fetch it elsewhere and give it as --package"
        ) from error
    got = f"sha512-{base64.b64encode(digest.digest()).decode()}"
    if got != integrity:
        raise DataError(f"{url}: got a file with {got}, allowed is {integrity}")


def check_out(out: Path) -> None:
    """Refuse a directory that is there already; raises :class:`DataError`."""
    if out.exists():
        raise DataError(f"{out}: is there already; allowed is a directory to be made")


def prepare_emoji(packages: Sequence[Path], out: Path) -> dict[str, int]:
    """Write ``out/train`` and ``out/test`` with a folder for each category; returns how many images each split has.

    ``out`` appears whole or not at all. Raises :class:`DataError` for what is no such package.
    """
    check_out(out)
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
        members = _members(package)
        style = str(json.loads(members["package/package.json"])["name"]).removeprefix("emoji-datasource-")
        listed: list[dict[str, Any]] = json.loads(members["package/emoji.json"])
        pictures = [
            Picture(style, code_point, emoji["category"], emoji["unified"], members[path])
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


def _members(package: Path) -> dict[str, bytes]:
    """The files of a package that are needed, by name, in one pass: what is compressed has no random access."""
    members = {}
    with tarfile.open(package, "r|*") as archive:
        for member in archive:
            is_image = member.name.startswith("package/img/") and f"/{SIZE}/" in member.name
            if member.isfile() and (is_image or member.name in DESCRIPTIONS):
                file = archive.extractfile(member)
                members[member.name] = b"" if file is None else file.read()
    return members


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
