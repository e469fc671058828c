"""POST /v1/sample, /v1/decode and /v1/denoise: everything that answers with images."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from model.config import MAX_SEED, SamplingDefaults
from service.api import examples
from service.api.context import Context, ContextDependency, class_name, resolve_class
from service.api.rendering import NON_FINITE, accepted_image, image_results, picture, warnings
from service.api.running import cost_of, new_job, run
from service.api.schemas import (
    DecodeRequest,
    DenoiseRequest,
    ErrorResponse,
    Guidance,
    ImagesResponse,
    OutputFormat,
    SampleRequest,
)
from service.api.uploads import check_count, fit_uploads, read_images, read_latent
from service.errors import InvalidRequest
from service.jobs import Job, ModelInfo, Op

IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": "JSON, or with `Accept: image/png` (jpeg, webp) the image itself; several as a grid",
        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
    },
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}

DENOISE_PASSES = 3
"""Cost of denoising in passes: forward, again block by block, and backward."""

router = APIRouter(prefix="/v1", tags=["images"], responses=IMAGES)


def _options(model: ModelInfo, sent: Guidance, label: int | None) -> SamplingDefaults:
    """The bundle's recommendation with the fields that the request sets, as they will be used."""
    names = ("guidance_scale", "guidance_schedule", "attention_temperature", "denoise")
    given = {name: value for name in names if (value := getattr(sent, name)) is not None}
    options = replace(model.sampling, **given)
    if label is None and options.attention_temperature == 1:
        # Without class and temperature both passes are the same, and guidance does nothing.
        options = replace(options, guidance_scale=0.0)
    if options.denoise:
        _check_can_denoise(model)
    return options


def _check_can_denoise(model: ModelInfo) -> None:
    if model.noise.kind != "gaussian":
        raise InvalidRequest(
            f"denoise: model {model.name!r} was trained with {model.noise.kind} noise; "
            "only Gaussian-noise models can denoise",
            param="denoise",
            code="cannot_denoise",
        )


def _passes(options: SamplingDefaults) -> int:
    """How often a sampled image goes through the model; denoising counts like one more pass."""
    return 1 + (options.guidance_scale != 0) + options.denoise


async def _respond(
    context: Context,
    model: ModelInfo,
    job: Job,
    wanted: OutputFormat | None,
    *,
    details: Sequence[dict[str, Any]],
    parameters: Mapping[str, Any],
) -> Response | ImagesResponse:
    """Run the job and answer as the Accept header asks."""
    file_format = accepted_image(context.request.headers.get("accept"), wanted)
    output_format: OutputFormat = file_format or wanted or "png"
    job = replace(job, payload={**job.payload, "floats": output_format == "npy"})
    result, timing = await run(context, job)
    if file_format is not None:
        noted = {notice.code for detail in details for notice in detail.get("warnings", ())}
        noted |= set() if result.arrays["finite"].all() else {NON_FINITE.code}
        notes = {"x-tarflow-warnings": ",".join(sorted(noted))} if noted else {}
        seeds = {"x-tarflow-seed": str(parameters["seed"])} if parameters.get("seed") is not None else {}
        return await picture(
            result, file_format, {"x-tarflow-model": model.name, "x-tarflow-job": job.id, **seeds, **notes}
        )
    return ImagesResponse(
        id=job.id,
        model=model.name,
        images=await image_results(result, output_format, details),
        parameters={**parameters, "output_format": output_format},
        timing=timing,
    )


@router.post("/sample", response_model=ImagesResponse, summary="Draw images")
async def sample(body: SampleRequest, context: ContextDependency) -> Response | ImagesResponse:
    """Draw images of a class, or of none. The same model, seed and parameters give the same image."""
    check_count(body.num_images, "num_images", context.settings)
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    options = _options(model, body, label)
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + body.num_images - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed: got {seed}, allowed is at most {MAX_SEED - body.num_images + 1} for {body.num_images} images",
            param="seed",
        )
    seeds = list(range(seed, seed + body.num_images))
    payload = {"seeds": seeds, "label": label, "options": options.to_dict()}
    job = new_job(model, Op.SAMPLE, payload, body.num_images, _passes(options))
    name = class_name(model, label)
    parameters = {"class": name, "num_images": body.num_images, "seed": seed, **options.to_dict()}
    details = [{"seed": s, "class": name} for s in seeds]
    return await _respond(context, model, job, body.output_format, details=details, parameters=parameters)


@router.post("/decode", response_model=ImagesResponse, summary="Latents to images")
async def decode(body: DecodeRequest, context: ContextDependency) -> Response | ImagesResponse:
    """Turn latents into images: with guidance 0 and no denoising, the exact inverse of /v1/encode.

    Guidance and denoising are off unless they are asked for, since both leave the exact inverse.
    """
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    exact = body.model_copy(update={"guidance_scale": body.guidance_scale or 0.0, "denoise": bool(body.denoise)})
    options = _options(model, exact, label)
    check_count(len(body.latents), "latents", context.settings)
    latents = np.stack([read_latent(value, i, model) for i, value in enumerate(body.latents)])
    payload = {"latents": latents, "label": label, "options": options.to_dict()}
    job = new_job(model, Op.DECODE, payload, len(latents), _passes(options))
    name = class_name(model, label)
    details = [{"class": name} for _ in body.latents]
    parameters = {"class": name, **options.to_dict()}
    return await _respond(context, model, job, body.output_format, details=details, parameters=parameters)


@router.post(
    "/denoise", response_model=ImagesResponse, summary="Denoise images", openapi_extra=examples.body(DenoiseRequest)
)
async def denoise(request: Request, context: ContextDependency) -> Response | ImagesResponse:
    """Remove noise of the model's training strength from images: x + σ²∇log p(x)."""
    body, uploads = await read_images(request, DenoiseRequest, context.settings)
    model = await context.model(body.model)
    _check_can_denoise(model)
    label = resolve_class(model, body.class_)
    await context.broker.check(model.name, cost_of(model, len(uploads), DENOISE_PASSES))
    inputs = await fit_uploads(request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "label": label, "add_noise": body.add_noise, "seed": body.seed}
    job = new_job(model, Op.DENOISE, payload, len(uploads), DENOISE_PASSES)
    name = class_name(model, label)
    details = [{"class": name, "warnings": warnings(changes)} for changes in inputs.changes]
    seed = body.seed if body.add_noise else None
    parameters = {"class": name, "add_noise": body.add_noise, "seed": seed, "sigma": model.noise.std}
    return await _respond(context, model, job, body.output_format, details=details, parameters=parameters)
