"""What ``tarflow sample`` and ``score`` write, with a server and without. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from model.config import SamplingDefaults


@dataclass(frozen=True)
class Drawn:
    """Images that were drawn: a PNG file, the parameters used, and how exact the images are."""

    png: bytes
    options: SamplingDefaults
    plans: tuple[str, ...]
    """Each plan that a batch had, once."""
    backward_error: float | None
    """The largest of those that have a certificate; ``None`` when none has."""
    certified: bool | None
    """Whether all that have one are within the tolerance; ``None`` when none has."""


def picture_paths(directory: Path, images: Sequence[Path]) -> list[Path]:
    """Where each image's picture goes: under its name, numbered where several directories have the same."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for image in images:
        names = (f"{image.stem}{'' if number == 1 else f'-{number}'}.png" for number in count(1))
        paths.append(next(path for path in (directory / name for name in names) if path not in paths))
    return paths
