"""Arrays to answers: image files, base64, and what the Accept header asks for."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import anyio.to_thread
import numpy as np
from fastapi import Response
from numpy.typing import NDArray

from model.images import Change, Format, encode_image, grid
from service.api.schemas import ImageResult, Notice, OutputFormat, TensorValue
from service.errors import NotAcceptable
from service.jobs import JobResult

NON_FINITE = Notice(
    code="non_finite", message="the model gave values that are not finite; pictures show them as grey, npy holds them"
)


def accepted_image(accept: str | None, wanted: OutputFormat | None) -> Format | None:
    """The image format to answer with, or ``None`` for JSON; raises ``NotAcceptable``.

    JSON is the default; an image comes only where Accept prefers it to JSON.
    """
    qualities: dict[str, float] = {}
    for part in (accept or "*/*").split(","):
        media, _, parameters = part.strip().partition(";")
        quality = 1.0
        for parameter in parameters.split(";"):
            name, _, value = parameter.strip().partition("=")
            if name == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
                quality = min(quality, 1.0) if quality > 0 else 0.0  # NaN is not greater than 0
        qualities[media.strip().lower()] = quality

    def quality_of(kind: str) -> float:
        family = kind.partition("/")[0]
        return next((qualities[m] for m in (kind, f"{family}/*", "*/*") if m in qualities), 0.0)

    # Among formats that are accepted equally: the wanted one, then the first (min keeps the order).
    formats: tuple[Format, ...] = get_args(Format)
    best = min(formats, key=lambda f: (-quality_of(f"image/{f}"), f != wanted))
    if wanted == "npy" and not quality_of("application/json"):
        raise NotAcceptable(f"Accept: got {accept!r}; output_format npy is answered as application/json only")
    image, document = quality_of(f"image/{best}"), quality_of("application/json")
    if not image and not document:
        raise NotAcceptable(
            f"Accept: got {accept!r}; can be answered with application/json, image/png, image/jpeg or image/webp"
        )
    return best if image > document and wanted != "npy" else None


def tensor(values: NDArray[np.float32]) -> TensorValue:
    """An array in the compact form of the API."""
    data = np.ascontiguousarray(values, "<f4")
    return TensorValue(shape=list(data.shape), b64=base64.b64encode(data.tobytes()).decode())


def warnings(changes: Sequence[Change]) -> list[Notice]:
    """Changes of an input as warnings of the answer."""
    return [Notice(code=change.code, message=change.message) for change in changes]


def finite_or_none(value: float) -> float | None:
    """JSON knows no infinity and no NaN."""
    return float(value) if np.isfinite(value) else None


def _npy(image: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image, allow_pickle=False)
    return buffer.getvalue()


async def image_results(
    result: JobResult, output_format: OutputFormat, details: Sequence[Mapping[str, Any]]
) -> list[ImageResult]:
    """One answer per image; ``details`` holds each image's own fields (seed, class, warnings)."""

    def build() -> list[ImageResult]:
        answers = []
        for i, detail in enumerate(details):
            if output_format == "npy":
                data = _npy(result.arrays["images"][i])
            else:
                data = encode_image(result.arrays["pixels"][i], output_format)
            answer = ImageResult(index=i, format=output_format, b64=base64.b64encode(data).decode(), **detail)
            if not result.arrays["finite"][i]:
                answer.warnings.append(NON_FINITE)
            answers.append(answer)
        return answers

    return await anyio.to_thread.run_sync(build)


async def picture(result: JobResult, file_format: Format, headers: Mapping[str, str]) -> Response:
    """The image itself, or a grid of several."""
    pixels = list(result.arrays["pixels"])
    whole = pixels[0] if len(pixels) == 1 else grid(pixels)
    data = await anyio.to_thread.run_sync(encode_image, whole, file_format)
    return Response(data, media_type=f"image/{file_format}", headers=dict(headers))
