"""The files of the page, read once: with their types, packed for the way, and named after what is in them."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "png": "image/png",
    "svg": "image/svg+xml",
}
INDEX = "index.html"
PLACE, PRELOADS = "{{files}}", "{{preloads}}"
"""In the index: the address of the directory of the other files; where modules are named, to be fetched together."""
CLASSIC = ("theme.js",)
"""Scripts that are no modules."""


@dataclass(frozen=True)
class PageFile:
    """One file, as it is answered."""

    content: bytes
    media_type: str

    @cached_property
    def packed(self) -> bytes:
        """The same with gzip, or nothing where that is no shorter."""
        packed = gzip.compress(self.content, mtime=0)
        return packed if len(packed) < len(self.content) else b""

    @cached_property
    def etag(self) -> str:
        """Weak, for it is that of the packed one, too."""
        return f'W/"{hashlib.sha256(self.content).hexdigest()[:32]}"'


@dataclass(frozen=True)
class PageFiles:
    """The index, and the files that it leads to."""

    index: PageFile
    others: Mapping[str, PageFile]
    """By name."""
    version: str
    """Of all that is in the others: where it is part of their address, they never change."""


def _directory() -> Any:
    return files(__package__).joinpath("static")


def file_names() -> list[str]:
    """Names of the files beside the index."""
    return sorted(each.name for each in _directory().iterdir() if each.name != INDEX)


def page_files() -> PageFiles:
    """Read all of them."""
    contents = {name: _directory().joinpath(name).read_bytes() for name in (INDEX, *file_names())}
    index = contents.pop(INDEX)
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    version = digest.hexdigest()[:16]
    others = {name: PageFile(content, TYPES[name.rpartition(".")[2]]) for name, content in contents.items()}
    # Without a slash before it, so that a proxy may put the service below a path of its own.
    place = f"page/{version}"
    modules = [name for name in others if name.endswith(".js") and name not in CLASSIC]
    preloads = "\n".join(f'<link rel="modulepreload" href="{place}/{name}">' for name in modules)
    text = index.decode().replace(PRELOADS, preloads).replace(PLACE, place)
    return PageFiles(PageFile(text.encode(), TYPES["html"]), others, version)
