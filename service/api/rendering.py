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
from service.jobs import REDONE, JobResult, ModelInfo, is_certified

NON_FINITE = Notice(
    code="non_finite", message="the model gave values that are not finite; pictures show them as grey, npy holds them"
)
NON_FINITE_VALUE = Notice(code="non_finite", message="the model gave a value that is not finite; it is shown as null")

LIKELIHOOD_MODEL = Notice(
    code="likelihood_model",
    message="this model was trained with uniform dequantization, for likelihoods; what it samples is often poor or not "
    "finite, and cannot be denoised",
)


def quality_warnings(model: ModelInfo) -> list[Notice]:
    """What to expect of a model's samples."""
    return [LIKELIHOOD_MODEL] if model.noise.kind == "uniform" else []


def qualities(accept: str) -> dict[str, float]:
    """How much an Accept header wants each media type or range, 0 to 1."""
    found: dict[str, float] = {}
    for part in accept.split(","):
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
        found[media.strip().lower()] = quality
    return found


def accepted_image(accept: str | None, wanted: OutputFormat | None) -> Format | None:
    """The image format to answer with, or ``None`` for JSON; raises ``NotAcceptable``.

    JSON is the default; an image comes only where Accept prefers it to JSON.
    """
    found = qualities(accept or "*/*")

    def quality_of(kind: str) -> float:
        family = kind.partition("/")[0]
        return next((found[m] for m in (kind, f"{family}/*", "*/*") if m in found), 0.0)

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


def _exactness(result: JobResult, index: int, tolerance: float) -> dict[str, Any]:
    """An image's certificate, as its answer has it."""
    error = float(result.arrays["backward_error"][index])
    return {
        "backward_error": finite_or_none(error),
        "certified": is_certified(error, tolerance),
        "redone": REDONE[int(result.arrays["redone"][index])],
    }


async def image_results(
    result: JobResult,
    output_format: OutputFormat,
    details: Sequence[Mapping[str, Any]],
    tolerance: float | None,
    *,
    quality: int | None = None,
) -> list[ImageResult]:
    """One answer per image; ``details`` holds each image's own fields (seed, class, warnings).

    ``tolerance`` is that of certificates; ``None`` for images that were not sampled. ``quality`` is the encoder's.
    """

    def file(pixels: NDArray[np.uint8], floats: NDArray[np.float32]) -> str:
        data = _npy(floats) if output_format == "npy" else encode_image(pixels, output_format, quality)
        return base64.b64encode(data).decode()

    def build() -> list[ImageResult]:
        answers, arrays = [], result.arrays
        # The worker sends the floats only where they are answered.
        floats = arrays.get("images", arrays["pixels"])
        for i, detail in enumerate(details):
            exactness = {} if tolerance is None else _exactness(result, i, tolerance)
            states = [file(state, state) for state in arrays["trajectory"][i]] if "trajectory" in arrays else None
            answer = ImageResult(
                index=i,
                format=output_format,
                b64=file(arrays["pixels"][i], floats[i]),
                trajectory=states,
                **exactness,
                **detail,
            )
            if not arrays["finite"][i]:
                answer.warnings.append(NON_FINITE)
            answers.append(answer)
        return answers

    return await anyio.to_thread.run_sync(build)


def certificate_headers(result: JobResult, tolerance: float | None) -> dict[str, str]:
    """How exact the images are, as headers: the plan, the largest backward error, whether all are certified."""
    headers = {"x-tarflow-plan": ", ".join(result.plan)} if result.plan else {}
    if tolerance is not None:
        error = float(np.fmax.reduce(result.arrays["backward_error"]))
        certified = is_certified(error, tolerance)
        if certified is not None:
            headers |= {"x-tarflow-backward-error": f"{error:.3g}", "x-tarflow-certified": str(certified).lower()}
    return headers


def contact_sheet(arrays: Mapping[str, NDArray[Any]], *, denoised: bool) -> NDArray[np.uint8]:
    """The image, or a grid of several; with a trajectory a row for each image: its states, then itself if denoised."""
    pixels = list(arrays["pixels"])
    if "trajectory" not in arrays:
        return pixels[0] if len(pixels) == 1 else grid(pixels)
    rows = [
        [*states, *([image] if denoised else [])] for states, image in zip(arrays["trajectory"], pixels, strict=True)
    ]
    return grid([state for row in rows for state in row], columns=len(rows[0]))


async def picture(result: JobResult, file_format: Format, headers: Mapping[str, str], *, denoised: bool) -> Response:
    """The image itself, or a grid: see :func:`contact_sheet`."""

    def build() -> bytes:
        return encode_image(contact_sheet(result.arrays, denoised=denoised), file_format)

    data = await anyio.to_thread.run_sync(build)
    return Response(data, media_type=f"image/{file_format}", headers=dict(headers))
