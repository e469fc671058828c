"""POST /v1/images/generations: OpenAI's way to ask for what /v1/sample draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Response
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel

from service.api.context import Context, ContextDependency, class_name
from service.api.jobs.answering import HOW, answer
from service.api.jobs.keeping import KEPT_SECONDS, previewing
from service.api.jobs.wishes import Wishes, wishes_of
from service.api.openai_images.prompts import class_of
from service.api.openai_images.schemas import (
    CompletedEvent,
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    InputTokens,
    OutputTokens,
    Usage,
)
from service.api.openai_images.streaming import GenerationStream
from service.api.recipes.base import Done, Prepared
from service.api.recipes.images import ImagesRecipe
from service.api.recipes.stored import packed
from service.api.running import timing
from service.api.sampling import prepare_sample
from service.api.schemas import ErrorResponse, ImageResult, ImagesResponse, Notice, SampleRequest, SamplerFields
from service.api.uploads import check_count
from service.errors import InvalidRequest
from service.jobs import JobResult, ModelInfo, Op

PATH = "/v1/images/generations"
MOST_WARNINGS = 20
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerationResponse,
        "description": "Images; with stream, server-sent events",
        "content": {EventSourceResponse.media_type: {}},
    },
    **HOW,
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}
ANIMATED = ("frame_count", "frame_duration_ms", "svg")
"""Fields of animations and drawings, which are not pictures of pixels."""

router = APIRouter(tags=["openai"])


def _refuse(field: str, got: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: got {str(got)[:100]!r}, {allowed}", param=field, code="unsupported_value")


def native_size(model: ModelInfo) -> str:
    """The one size that a model draws."""
    return f"{model.image_size}x{model.image_size}"


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


def native(body: GenerationRequest, model: ModelInfo) -> SampleRequest:
    """The same request in our own words; raises ``InvalidRequest`` for a prompt that names no class."""
    fields = body.model_dump(include=body.model_fields_set & SamplerFields.model_fields.keys())
    if body.output_format is None:
        fields.pop("output_format", None)
    name = class_name(model, class_of(model, body.prompt))
    more = {} if body.stream is None else {"previews": body.partial_images or 0}
    return SampleRequest(**{**fields, **more, "class": name}, model=model.name, num_images=body.n or 1, seed=body.seed)


def check_streams(wishes: Wishes) -> None:
    """Refuse what a stream of this API cannot give: its events are not kept to be told again."""
    if wishes.asynchronous or wishes.idempotency_key is not None:
        name = "Idempotency-Key" if wishes.idempotency_key is not None else "Prefer: respond-async"
        raise InvalidRequest(
            f"stream: got true with {name}, allowed with it is false; /v1/sample has streams that can be repeated",
            param="stream",
        )


def usage_of(model: ModelInfo, images: Sequence[ImageResult]) -> Usage:
    """Tokens of the model itself: a class is one, an image as many as it has patches."""
    text, image = int(images[0].class_ is not None), len(images) * model.flow.num_patches
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
        Notice(code="unknown_field", message=f"{name[:100]!r}: ignored; there is no such field here")
        for name, value in list((body.model_extra or {}).items())[:MOST_WARNINGS]
        if value is not None
    ]


def _generated(image: ImageResult) -> dict[str, Any]:
    return {**image.model_dump(exclude={"index", "format", "b64"}), "b64_json": image.b64}


@router.post(
    PATH,
    name=str(Op.SAMPLE),
    response_model=GenerationResponse,
    responses=ANSWERS,
    summary="Draw images, as OpenAI's API does",
)
async def generate(body: GenerationRequest, context: ContextDependency) -> Response | BaseModel:
    """Draw images of the class that the prompt names, for clients of OpenAI's Images API.

    The same model, seed and parameters give the same image as /v1/sample. Errors are OpenAI's: 400 for every value
    that is not allowed. With ``stream`` the answer is server-sent events: ``image_generation.partial_image`` for each
    of ``partial_images``, and last ``image_generation.completed``.
    """
    model = await context.model(body.model)
    check_wishes(body, model)
    check_count(body.n or 1, "n", context.settings)
    prepared = await prepare_sample(context, native(body, model))
    recipe = prepared.recipe
    if not isinstance(recipe, ImagesRecipe):
        raise AssertionError("samples are images")
    prepared = replace(prepared, recipe=replace(recipe, quality=body.output_compression), body=body)
    if body.stream:
        check_streams(wishes_of(context.request))
        return await _streamed(context, body, model, prepared)
    found = await answer(context, prepared)
    # Headers may ask for an asynchronous job or for the picture itself, which are our own.
    if not isinstance(found, ImagesResponse):
        return found
    return GenerationResponse(
        created=int(time.time()),
        data=[GeneratedImage(**_generated(image)) for image in found.images],
        output_format=body.output_format or "png",
        size=native_size(model),
        usage=usage_of(model, found.images),
        warnings=ignored(body),
        **found.model_dump(include={"id", "model", "plan", "parameters", "timing"}),
    )


async def _streamed(
    context: Context, body: GenerationRequest, model: ModelInfo, prepared: Prepared
) -> GenerationStream:
    """The events of a job, which is refused before any is sent."""
    start, job = time.monotonic(), prepared.job
    recipe = await anyio.to_thread.run_sync(packed, prepared)
    terms = context.terms(keep_seconds=KEPT_SECONDS, detached=True, recipe=recipe)
    await context.door.submit(previewing(job, prepared.previews), terms)

    async def finish(result: JobResult) -> CompletedEvent:
        done = await prepared.recipe.render(
            context,
            Done(job_id=job.id, model=model.name, result=result, timing=timing(result, time.monotonic() - start)),
        )
        if not isinstance(done, ImagesResponse):
            raise AssertionError("JSON was asked for")
        return CompletedEvent(
            **_generated(done.images[0]),
            created_at=int(time.time()),
            size=native_size(model),
            output_format=body.output_format or "png",
            usage=usage_of(model, done.images),
            id=job.id,
            model=model.name,
            parameters=done.parameters,
        )

    return GenerationStream(context, job.id, body, native_size(model), finish)
