"""POST /v1/sample, /v1/decode and /v1/denoise: everything that answers with images."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from model.config import MAX_SEED
from service.api import examples
from service.api.context import Context, ContextDependency, class_name, resolve_class
from service.api.options import asked, check_can_denoise
from service.api.rendering import (
    NON_FINITE,
    accepted_image,
    certificate_headers,
    image_results,
    picture,
    quality_warnings,
    warnings,
)
from service.api.running import cost_of, new_job, run
from service.api.schemas import (
    DecodeRequest,
    DenoiseRequest,
    ErrorResponse,
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
        "description": "JSON, or with `Accept: image/png` (jpeg, webp) the image itself; several as a grid. With a "
        "trajectory the grid has a row for each image: its states after each block, and the denoised image. The "
        "headers x-tarflow-plan, x-tarflow-backward-error (the largest) and x-tarflow-certified say how exact it is",
        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
    },
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}

DENOISE_PASSES = 3
"""Cost of denoising in passes: forward, again block by block, and backward."""

router = APIRouter(prefix="/v1", tags=["images"], responses=IMAGES)


def _shown(used: Mapping[str, Any]) -> dict[str, Any]:
    """The payload's parameters as an answer shows them."""
    return {**used["options"], **used["solver"], "trajectory": used["trajectory"]}


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
        exactness = certificate_headers(result, parameters.get("tolerance"))
        headers = {"x-tarflow-model": model.name, "x-tarflow-job": job.id, **seeds, **exactness, **notes}
        return await picture(result, file_format, headers, denoised=bool(parameters.get("denoise")))
    return ImagesResponse(
        id=job.id,
        model=model.name,
        images=await image_results(result, output_format, details, parameters.get("tolerance")),
        plan=list(result.plan) or None,
        parameters={**parameters, "output_format": output_format},
        timing=timing,
    )


@router.post("/sample", response_model=ImagesResponse, summary="Draw images")
async def sample(body: SampleRequest, context: ContextDependency) -> Response | ImagesResponse:
    """Draw images of a class, or of none. The same model, seed and parameters give the same image."""
    check_count(body.num_images, "num_images", context.settings)
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    used, cost = asked(model, body, label)
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + body.num_images - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed: got {seed}, allowed is at most {MAX_SEED - body.num_images + 1} for {body.num_images} images",
            param="seed",
        )
    seeds = list(range(seed, seed + body.num_images))
    payload = {"seeds": seeds, "label": label, **used}
    job = new_job(model, Op.SAMPLE, payload, body.num_images, cost)
    name = class_name(model, label)
    parameters = {"class": name, "num_images": body.num_images, "seed": seed, **_shown(used)}
    # Each image has a list of its own: more may be added to it.
    details = [{"seed": s, "class": name, "warnings": quality_warnings(model)} for s in seeds]
    return await _respond(context, model, job, body.output_format, details=details, parameters=parameters)


@router.post("/decode", response_model=ImagesResponse, summary="Latents to images")
async def decode(body: DecodeRequest, context: ContextDependency) -> Response | ImagesResponse:
    """Turn latents into images: with guidance 0 and no denoising, the exact inverse of /v1/encode.

    Guidance and denoising are off unless they are asked for, since both leave the exact inverse.
    """
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    exact = {"guidance_scale": body.guidance_scale or 0.0, "denoise": bool(body.denoise)}
    used, cost = asked(model, body, label, **exact)
    check_count(len(body.latents), "latents", context.settings)
    latents = np.stack([read_latent(value, i, model) for i, value in enumerate(body.latents)])
    payload = {"latents": latents, "label": label, **used}
    job = new_job(model, Op.DECODE, payload, len(latents), cost)
    name = class_name(model, label)
    details = [{"class": name} for _ in body.latents]
    parameters = {"class": name, **_shown(used)}
    return await _respond(context, model, job, body.output_format, details=details, parameters=parameters)


@router.post(
    "/denoise", response_model=ImagesResponse, summary="Denoise images", openapi_extra=examples.body(DenoiseRequest)
)
async def denoise(request: Request, context: ContextDependency) -> Response | ImagesResponse:
    """Remove noise of the model's training strength from images: x + σ²∇log p(x)."""
    body, uploads = await read_images(request, DenoiseRequest, context.settings)
    model = await context.model(body.model)
    check_can_denoise(model)
    label = resolve_class(model, body.class_)
    await context.door.check(model.name, cost_of(model, len(uploads), DENOISE_PASSES))
    inputs = await fit_uploads(request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "label": label, "add_noise": body.add_noise, "seed": body.seed}
    job = new_job(model, Op.DENOISE, payload, len(uploads), DENOISE_PASSES)
    name = class_name(model, label)
    details = [{"class": name, "warnings": warnings(changes)} for changes in inputs.changes]
    seed = body.seed if body.add_noise else None
    parameters = {"class": name, "add_noise": body.add_noise, "seed": seed, "sigma": model.noise.std}
    return await _respond(context, model, job, body.output_format, details=details, parameters=parameters)
