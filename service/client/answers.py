"""What the service answers, in its own models of JSON, with images and arrays decoded where they are wanted."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from service.api.calibration_schemas import CalibrationDetails, CalibrationSummary
from service.api.classify_schemas import ClassifyResponse
from service.api.jobs.documents import JobDocument
from service.api.model_schemas import ModelDescription, ModelSummary
from service.api.schemas import EncodeResponse, EncodeResult, ImageResult, ImagesResponse, TensorValue
from service.api.score_schemas import MapResult, ScoreResponse, ScoreResult

__all__ = [
    "Answer",
    "CalibrationDetails",
    "CalibrationSummary",
    "Classes",
    "Encoded",
    "Image",
    "Images",
    "JobDocument",
    "Latent",
    "Latents",
    "Map",
    "ModelDescription",
    "ModelSummary",
    "Scored",
    "Scores",
]

Array: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]


def _array(b64: str, file_format: str) -> Array:
    data = io.BytesIO(base64.b64decode(b64))
    if file_format == "npy":
        values: NDArray[np.float32] = np.load(data, allow_pickle=False)
        return values
    pixels = np.asarray(Pillow.open(data), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _tensor(b64: str, shape: list[int]) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(b64), "<f4").astype(np.float32).reshape(shape)


class Image(ImageResult):
    """One image."""

    @property
    def data(self) -> bytes:
        """The file."""
        return base64.b64decode(self.b64)

    def array(self) -> Array:
        """(C, H, W), uint8; of ``npy`` float32 in [-1, 1]."""
        return _array(self.b64, self.format)

    def picture(self) -> Pillow.Image:
        """As Pillow has it; raises ``ValueError`` for ``npy``, which is no picture."""
        if self.format == "npy":
            raise ValueError("format: got 'npy', which holds floats; use array(), or ask for output_format='png'")
        return Pillow.open(io.BytesIO(self.data))

    def states(self) -> list[Array]:
        """The image after each block, as :meth:`array`; empty where no ``trajectory`` was asked for."""
        return [_array(state, self.format) for state in self.trajectory or ()]

    def save(self, path: str | Path) -> None:
        """Write the file as it came, whatever the path is called."""
        Path(path).write_bytes(self.data)


class Images(ImagesResponse):
    """Images that were sampled, decoded or denoised."""

    # Lists are invariant because they can be written to; nobody writes to an answer. So below.
    images: list[Image]  # type: ignore[assignment]


class Latent(TensorValue):
    """Where an image is, standard normal under the model."""

    def array(self) -> NDArray[np.float32]:
        """(T, D)."""
        return _tensor(self.b64, self.shape)


class Encoded(EncodeResult):
    """One image's latent."""

    latent: Latent


class Latents(EncodeResponse):
    """Latents of images."""

    images: list[Encoded]  # type: ignore[assignment]


class Map(MapResult):
    """Where an image is unusual."""

    @property
    def data(self) -> bytes:
        """The picture's PNG file, or the array's values."""
        return base64.b64decode(self.b64)

    def array(self) -> Array:
        """The map (H, W) as float32, or the picture (3, H, W) as uint8."""
        return _array(self.b64, "png") if self.shape is None else _tensor(self.b64, self.shape)


class Scored(ScoreResult):
    """How likely one image is, and whether it is normal where that was asked."""

    map: Map | None = None


class Scores(ScoreResponse):
    """Scores of images."""

    images: list[Scored]  # type: ignore[assignment]


Classes = ClassifyResponse
Answer: TypeAlias = Images | Scores | Latents | Classes
ANSWERS: dict[str, type[Answer]] = {
    "sample": Images,
    "decode": Images,
    "denoise": Images,
    "score": Scores,
    "encode": Latents,
    "classify": Classes,
}
"""By what was done."""
