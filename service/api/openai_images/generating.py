"""POST /v1/images/generations: OpenAI's way to ask for what /v1/sample draws."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter

from model.config import MAX_SEED
from model.images import Format
from service.api.context import ContextDependency, class_name
from service.api.openai_images.prompts import class_of
from service.api.openai_images.schemas import (
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    InputTokens,
    OutputTokens,
    Usage,
)
from service.api.options import asked
from service.api.rendering import image_results, quality_warnings
from service.api.running import new_job, run
from service.api.schemas import ErrorResponse, Notice
from service.api.uploads import check_count
from service.errors import InvalidRequest
from service.jobs import ModelInfo, Op

PATH = "/v1/images/generations"
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}
ANIMATED = ("frame_count", "frame_duration_ms", "svg")
"""Fields of animations and drawings, which are not pictures of pixels."""

router = APIRouter(tags=["openai"], responses=ERRORS)


def _refuse(field: str, got: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: got {str(got)[:100]!r}, {allowed}", param=field, code="unsupported_value")


def native_size(model: ModelInfo) -> str:
    """The one size that a model draws."""
    return f"{model.flow.image_size}x{model.flow.image_size}"


def check_wishes(body: GenerationRequest, model: ModelInfo) -> None:
    """Raise ``InvalidRequest`` for what the API allows and a flow cannot do."""
    size = native_size(model)
    if body.size not in (None, "auto", size):
        raise _refuse("size", body.size, f"allowed is {size!r}, the size of model {model.name!r}, or 'auto'")
    if body.response_format not in (None, "b64_json"):
        raise _refuse("response_format", body.response_format, "allowed is 'b64_json': images are answered, not kept")
    if body.background not in (None, "auto", "opaque"):
        raise _refuse("background", body.background, "allowed are 'auto' and 'opaque': images have no alpha channel")
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise _refuse("output_compression", body.output_compression, "allowed with png is 100; jpeg and webp take less")
    unknown = body.model_extra or {}
    for field in ANIMATED:
        if unknown.get(field) is not None:
            raise _refuse(field, unknown[field], "which is for animations and drawings; only images are made here")
    if body.stream and body.n not in (None, 1):
        raise _refuse("n", body.n, "allowed is 1 in a stream, as with OpenAI; leave out stream for more")
    if body.partial_images and not body.stream:
        raise _refuse("partial_images", body.partial_images, "which needs stream: true")


def usage_of(model: ModelInfo, label: int | None, count: int) -> Usage:
    """Tokens of the model itself: a class is one, an image as many as it has patches."""
    text, image = int(label is not None), count * model.flow.num_patches
    return Usage(
        input_tokens=text,
        output_tokens=image,
        total_tokens=text + image,
        input_tokens_details=InputTokens(text_tokens=text),
        output_tokens_details=OutputTokens(image_tokens=image),
    )


def ignored(body: GenerationRequest) -> list[Notice]:
    """What the request has that nobody here knows: tolerated, since clients send what other services want."""
    return [
        Notice(code="unknown_field", message=f"{name[:100]}: ignored; there is no such field here")
        for name, value in list((body.model_extra or {}).items())[:20]
        if value is not None
    ]


@router.post(PATH, name=str(Op.SAMPLE), response_model=GenerationResponse, summary="Draw images, as OpenAI's API does")
async def generate(body: GenerationRequest, context: ContextDependency) -> GenerationResponse:
    """Draw images of the class that the prompt names, for clients of OpenAI's Images API.

    The same model, seed and parameters give the same image as /v1/sample. Errors are OpenAI's: 400 for every value
    that is not allowed.
    """
    model = await context.model(body.model)
    check_wishes(body, model)
    count = body.n or 1
    check_count(count, "n", context.settings)
    label = class_of(model, body.prompt)
    used, cost = asked(model, body, label)
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + count - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed: got {seed}, allowed is at most {MAX_SEED - count + 1} for {count} images", param="seed"
        )
    seeds = list(range(seed, seed + count))
    job = new_job(model, Op.SAMPLE, {"seeds": seeds, "label": label, **used}, count, cost)
    result, timing = await run(context, job)
    file_format: Format = body.output_format or "png"
    name = class_name(model, label)
    details = [{"seed": s, "class": name, "warnings": quality_warnings(model)} for s in seeds]
    images = await image_results(result, file_format, details, body.tolerance, quality=body.output_compression)
    parameters = {
        "class": name,
        "n": count,
        "seed": seed,
        **used["options"],
        **used["solver"],
        "trajectory": used["trajectory"],
    }
    return GenerationResponse(
        created=int(time.time()),
        data=[
            GeneratedImage(b64_json=image.b64, **image.model_dump(exclude={"index", "format", "b64"}))
            for image in images
        ],
        output_format=file_format,
        size=native_size(model),
        usage=usage_of(model, label, count),
        id=job.id,
        model=model.name,
        plan=list(result.plan) or None,
        parameters=parameters,
        timing=timing,
        warnings=ignored(body),
    )
