"""POST /v1/sample, /v1/decode and /v1/denoise: everything that answers with images."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from model.config import MAX_SEED
from service.api import examples
from service.api.context import Context, ContextDependency, class_name, resolve_class
from service.api.jobs.answering import EVENTS, HOW, answer
from service.api.options import asked, check_can_denoise
from service.api.recipes.base import Prepared
from service.api.recipes.images import ImagesRecipe
from service.api.rendering import quality_warnings, warnings
from service.api.running import admit, cost_of, new_job
from service.api.schemas import (
    DecodeRequest,
    DenoiseRequest,
    ErrorResponse,
    ImagesResponse,
    OutputFormat,
    SampleRequest,
)
from service.api.uploads import Upload, check_count, fit_uploads, read_images, read_latent
from service.errors import InvalidRequest
from service.jobs import Job, Op

IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": "JSON, or with `Accept: image/png` (jpeg, webp) the image itself; several as a grid. With a "
        "trajectory the grid has a row for each image: its states after each block, and the denoised image. The "
        "headers x-tarflow-plan, x-tarflow-backward-error (the largest) and x-tarflow-certified say how exact it is",
        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}, **EVENTS},
    },
    **HOW,
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}

DENOISE_PASSES = 3
"""Cost of denoising in passes: forward, again block by block, and backward."""

router = APIRouter(prefix="/v1", tags=["images"], responses=IMAGES)


def _shown(used: Mapping[str, Any]) -> dict[str, Any]:
    """The payload's parameters as an answer shows them."""
    return {**used["options"], **used["solver"], "trajectory": used["trajectory"]}


def _prepared(
    job: Job,
    body: BaseModel,
    wanted: OutputFormat | None,
    *,
    details: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, Any],
    uploads: Sequence[Upload] = (),
    previews: int = 0,
) -> Prepared:
    # No image file prefers itself to a wanted .npy, so whoever wants one gets it.
    job = replace(job, payload={**job.payload, "floats": wanted == "npy"})
    recipe = ImagesRecipe(wanted=wanted, details=details, parameters=parameters)
    return Prepared(job=job, recipe=recipe, body=body, uploads=uploads, previews=previews)


@router.post("/sample", response_model=ImagesResponse, summary="Draw images")
async def sample(body: SampleRequest, context: ContextDependency) -> Response | BaseModel:
    """Draw images of a class, or of none. The same model, seed and parameters give the same image."""
    return await answer(context, await prepare_sample(context, body))


async def prepare_sample(context: Context, body: SampleRequest) -> Prepared:
    """The job of a request for images; raises what is wrong with it."""
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
    return _prepared(job, body, body.output_format, details=details, parameters=parameters, previews=body.previews)


@router.post("/decode", response_model=ImagesResponse, summary="Latents to images")
async def decode(body: DecodeRequest, context: ContextDependency) -> Response | BaseModel:
    """Turn latents into images: with guidance 0 and no denoising, the exact inverse of /v1/encode.

    Guidance and denoising are off unless they are asked for, since both leave the exact inverse.
    """
    return await answer(context, await prepare_decode(context, body))


async def prepare_decode(context: Context, body: DecodeRequest) -> Prepared:
    """The job of latents to decode; raises what is wrong with them."""
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
    return _prepared(job, body, body.output_format, details=details, parameters=parameters, previews=body.previews)


@router.post(
    "/denoise", response_model=ImagesResponse, summary="Denoise images", openapi_extra=examples.body(DenoiseRequest)
)
async def denoise(request: Request, context: ContextDependency) -> Response | BaseModel:
    """Remove noise of the model's training strength from images: x + σ²∇log p(x)."""
    body, uploads = await read_images(request, DenoiseRequest, context.settings)
    return await answer(context, await prepare_denoise(context, body, uploads))


async def prepare_denoise(context: Context, body: DenoiseRequest, uploads: list[Upload]) -> Prepared:
    """The job of images to denoise; raises what is wrong with them."""
    model = await context.model(body.model)
    check_can_denoise(model)
    label = resolve_class(model, body.class_)
    await admit(context, model, cost_of(model, len(uploads), DENOISE_PASSES))
    inputs = await fit_uploads(context.request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "label": label, "add_noise": body.add_noise, "seed": body.seed}
    job = new_job(model, Op.DENOISE, payload, len(uploads), DENOISE_PASSES)
    name = class_name(model, label)
    details = [{"class": name, "warnings": warnings(changes)} for changes in inputs.changes]
    seed = body.seed if body.add_noise else None
    parameters = {"class": name, "add_noise": body.add_noise, "seed": seed, "sigma": model.noise.std}
    return _prepared(job, body, body.output_format, details=details, parameters=parameters, uploads=uploads)
