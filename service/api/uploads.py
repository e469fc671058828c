"""Uploaded images: multipart or JSON in, 8-bit arrays and an account of changes out."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.requests import Request

from model.images import Change, Fitted, ImageError, fit_image, load_image
from service.api.forms import Form, read_form
from service.api.schemas import MOST_ITEMS, ImagesRequest
from service.errors import Canceled, InvalidRequest, MalformedRequest
from service.jobs import ModelInfo
from service.settings import Settings

PIXELS_OF_A_REQUEST = 4
"""Pixels that all images of a request may have together, as a multiple of what one may."""

FILES = ("files", "file", "files[]")
"""Names that the field of the images may have."""
SMALL_BYTES, SMALL_PIXELS = 4096, 64 * 64
"""An image within both is decoded at once: the way to a thread and back would take longer."""
COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that may be far larger than they look."""

Fields = TypeVar("Fields", bound=ImagesRequest)


@dataclass(frozen=True)
class Upload:
    """One image file as it was sent."""

    data: bytes
    filename: str | None = None


@dataclass(frozen=True)
class Inputs:
    """Images fitted to a model: pixels (n, C, H, W) uint8 and, per image, what was changed."""

    pixels: NDArray[np.uint8]
    changes: list[tuple[Change, ...]]
    filenames: list[str | None]
    original_sizes: list[tuple[int, int]]
    """Width and height before the fitting."""


def _form_value(name: str, text: str) -> Any:
    """A form field as the JSON value that it stands for; names stay text."""
    if name in ("model", "class", "calibration", "output_format"):
        return text or None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_form(form: Form, kind: type[Fields]) -> tuple[Fields, list[Upload]]:
    fields: dict[str, Any] = {}
    for name, text in form.fields:
        if name in FILES:
            raise InvalidRequest("files: got text, expected files (curl: -F files=@image.png)", param="files")
        if name in fields:
            raise InvalidRequest(f"{name}: got it more than once, allowed is once", param=name)
        fields[name] = _form_value(name, text)
    for file in form.files:
        if file.field not in FILES:
            raise InvalidRequest(
                f"{file.field}: files belong in the field 'files'", param=file.field, code="unknown_field"
            )
    if not form.files:
        raise InvalidRequest(
            "files: at least one image is needed (curl: -F files=@image.png)", param="files", code="missing_field"
        )
    # The images travel beside the fields; a placeholder stands for them in the validation.
    uploads = [Upload(file.content.read(), file.filename) for file in form.files]
    return _validate(kind, {**fields, "images": ["-"]}), uploads


def _validate(kind: type[Fields], content: Any) -> Fields:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from error


def _decode_base64(text: str, param: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{param}: not base64: {error}", param=param, code="invalid_base64") from error


async def read_images(request: Request, kind: type[Fields], settings: Settings) -> tuple[Fields, list[Upload]]:
    """The fields and image files of a multipart or JSON request.

    Raises ``MalformedRequest`` or ``InvalidRequest`` naming the field that is wrong.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        fields, uploads = _read_form(await read_form(request, MOST_ITEMS), kind)
    elif content_type == "application/json":
        body = await request.body()
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise MalformedRequest(f"the body is not valid JSON: {error}") from error
        fields = _validate(kind, content)
        uploads = [Upload(_decode_base64(text, f"images.{i}")) for i, text in enumerate(fields.images)]
    else:
        raise MalformedRequest(
            f"Content-Type: got {content_type or 'none'!r}, allowed are multipart/form-data and application/json",
            code="unsupported_content_type",
        )
    check_count(len(uploads), "files" if content_type.startswith("multipart") else "images", settings)
    return fields, uploads


def check_count(count: int, param: str, settings: Settings) -> None:
    """Refuse no images, and more than one request may have."""
    if not 1 <= count <= settings.max_images:
        raise InvalidRequest(f"{param}: got {count} images, allowed are 1 to {settings.max_images}", param=param)


async def fit_uploads(
    request: Request, uploads: list[Upload], model: ModelInfo, settings: Settings, limiter: anyio.CapacityLimiter
) -> Inputs:
    """Decode uploads and bring them to a model's size and colours, image by image; what is not small in a thread.

    Large images take much time and memory: few are decoded at the same time, and none for a client that has gone.
    Raises ``InvalidRequest`` naming the image that cannot be used, or for too many pixels in all, and ``Canceled`` for
    such a client.
    """
    allowed = PIXELS_OF_A_REQUEST * settings.max_pixels
    total = 0

    def fit(upload: Upload, most: int) -> tuple[Fitted, int]:
        decoded = load_image(upload.data, most)
        width, height = decoded.image.size
        return fit_image(decoded, model.image_size, model.image_channels), width * height

    async def fitted_upload(upload: Upload) -> tuple[Fitted, int]:
        if len(upload.data) <= SMALL_BYTES and not any(kind in upload.data for kind in COMPRESSED):
            try:
                return fit(upload, min(SMALL_PIXELS, settings.max_pixels))
            except ImageError as error:
                if error.code != "image_too_large":
                    raise
        return await anyio.to_thread.run_sync(fit, upload, settings.max_pixels, limiter=limiter)

    fitted = []
    for i, upload in enumerate(uploads):
        param = f"files.{i}" if upload.filename is not None else f"images.{i}"
        try:
            image, count = await fitted_upload(upload)
        except ImageError as error:
            shown = f"{param} ({upload.filename})" if upload.filename else param
            raise InvalidRequest(f"{shown}: {error}", param=param, code=error.code) from error
        # Asked afterwards, so that an image's own size is never blamed for what the others used up.
        if total + count > allowed:
            field = param.partition(".")[0]
            raise InvalidRequest(
                f"{field}: the pixels that all images of a request may have together, {allowed:,}, are "
                f"used up: {i} of {len(uploads)} images with {total:,} pixels went in, and {param} has {count:,}; send "
                f"fewer at once, or reduce them first: the model sees {model.image_size}x{model.image_size}",
                param=field,
                code="too_many_pixels",
            )
        fitted.append(image)
        total += count
        # After the last one the job's submission follows at once, and whoever waits for it looks for the client.
        if i < len(uploads) - 1 and await request.is_disconnected():
            raise Canceled("the client went away")
    return Inputs(
        np.stack([image.pixels for image in fitted]),
        [image.changes for image in fitted],
        [upload.filename for upload in uploads],
        [image.original_size for image in fitted],
    )


def read_latent(value: Any, index: int, model: ModelInfo) -> NDArray[np.float32]:
    """A latent (T, D) from nested lists or {shape, b64}; raises ``InvalidRequest``."""
    param, expected = f"latents.{index}", (model.flow.num_patches, model.flow.patch_dim)
    if isinstance(value, list):
        if {len(row) for row in value} != {expected[1]} or len(value) != expected[0]:
            lengths = sorted({len(row) for row in value})
            raise InvalidRequest(
                f"{param}: got {len(value)} rows of {lengths} values, allowed is {expected[0]} rows of {expected[1]}",
                param=param,
                code="invalid_shape",
            )
        latent = np.array(value, dtype=np.float64)
    else:
        data = _decode_base64(value.b64, f"{param}.b64")
        if tuple(value.shape) != expected or len(data) != 4 * math.prod(expected):
            raise InvalidRequest(
                f"{param}: got shape {str(value.shape)[:100]} and {len(data)} bytes, "
                f"allowed is shape {list(expected)} and {4 * math.prod(expected)} bytes of float32",
                param=param,
                code="invalid_shape",
            )
        latent = np.frombuffer(data, "<f4").reshape(expected).astype(np.float64)
    # Beyond float32's range a value would become infinite on the way.
    if not np.isfinite(latent).all() or np.abs(latent).max() > np.finfo(np.float32).max:
        raise InvalidRequest(
            f"{param}: has values that are not finite in float32", param=param, code="non_finite_latent"
        )
    return latent.astype("<f4")
