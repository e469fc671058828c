"""Images and latents as callers have them, made what the service reads."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from pydantic import BaseModel

from model.images import encode_image

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Pillow.Image | NDArray[np.uint8]
"""An image: a path, the bytes of a file, or pixels (C, H, W) or (H, W)."""
LatentLike: TypeAlias = BaseModel | NDArray[Any] | Sequence[Sequence[float]]
"""A latent (T, D): as /v1/encode gives it, an array, or nested lists."""
File: TypeAlias = tuple[str, bytes]
"""A name and what is in it."""


def files_of(images: ImageLike | Sequence[ImageLike]) -> list[File]:
    """Files of one image or of several; raises ``ValueError`` or ``OSError`` for what is none.

    What has no name gets its number as one: it is in the answer.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [_file(image, i) for i, image in enumerate(images)]
    return [_file(images, 0)]


def _file(image: Any, index: int) -> File:
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        return path.name, path.read_bytes()
    if isinstance(image, bytes):
        return str(index), image
    if isinstance(image, np.ndarray):
        return f"{index}.png", encode_image(_checked(image, index), "png")
    if isinstance(image, Pillow.Image):
        buffer = io.BytesIO()
        try:
            image.save(buffer, "PNG")
        except OSError as error:
            raise ValueError(f"images.{index}: {error}; convert it to L or RGB first") from error
        return f"{index}.png", buffer.getvalue()
    raise ValueError(
        f"images.{index}: got {type(image).__name__}, allowed are paths, bytes, PIL images and numpy arrays"
    )


def _checked(pixels: NDArray[Any], index: int) -> NDArray[np.uint8]:
    """Pixels (C, H, W)."""
    shown = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or shown.ndim != 3 or len(shown) not in (1, 3) or 0 in shown.shape:
        raise ValueError(
            f"images.{index}: got an array of {pixels.dtype} with shape {pixels.shape}, allowed is uint8 with shape "
            "(H, W) or (C, H, W), where C is 1 or 3"
        )
    return shown


def latents_of(latents: Sequence[LatentLike] | NDArray[Any]) -> list[Any]:
    """Latents as JSON has them."""
    return [_latent(latent) for latent in latents]


def _latent(latent: Any) -> Any:
    if isinstance(latent, BaseModel):
        return latent.model_dump()
    if isinstance(latent, np.ndarray):
        values = np.ascontiguousarray(latent, "<f4")
        return {"shape": list(values.shape), "b64": base64.b64encode(values.tobytes()).decode()}
    return latent
