"""What decoding begins with: encoded images, wherever they are from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TEST_NAMES = ("test", "validation", "val")
"""What the split to test on is called; of several that there are, the first one is it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Encoded images in their source's own order, to be shuffled once and for all."""

    files: Sequence[Path]
    """What tells one set of images from another: files under ``root``."""
    root: Path
    items: Callable[[], Iterable[tuple[str, bytes | Path]]]
    """Of each image what errors call it, and its file or the file's content."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
