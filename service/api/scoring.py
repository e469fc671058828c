"""POST /v1/score and /v1/encode: everything that answers with numbers about images."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api import examples
from service.api.context import Context, ContextDependency, class_name, resolve_class
from service.api.jobs.answering import EVENTS, HOW, answer
from service.api.judging import question_of
from service.api.recipes.base import Prepared
from service.api.recipes.latents import LatentsRecipe
from service.api.recipes.scores import Asked, ScoresRecipe
from service.api.running import admit, cost_of, new_job
from service.api.schemas import EncodeRequest, EncodeResponse, ErrorResponse, Protocol
from service.api.score_schemas import ScoreRequest, ScoreResponse
from service.api.uploads import Upload, fit_uploads, read_images
from service.errors import InvalidRequest
from service.jobs import ModelInfo, Op
from service.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    **HOW,
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}
PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ScoreResponse,
        "description": "JSON, or with maps as pictures and `Accept: image/png` (jpeg, webp) the picture itself; "
        "several as a grid. The header x-tarflow-verdicts has `anomaly` or `normal` for each image",
        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}, **EVENTS},
    }
}
CLEAN_MEANING = "density of the image itself, without the noise of training; not comparable with /v1/score"
CLEAN_LATENTS = (
    "density of an autoencoder's latents of the image, without the noise of training; no likelihood of pixels, and not "
    "comparable with /v1/score"
)


def protocol_of(model: ModelInfo, draws: int, seed: int) -> Protocol:
    """What a likelihood from so many noise draws means; 0 for the image itself."""
    clean = CLEAN_MEANING if model.noise.space == "pixels" else CLEAN_LATENTS
    return Protocol(
        noise=model.noise.kind,
        space=model.noise.space,
        sigma=model.noise.std,
        draws=draws,
        seed=seed if draws else None,
        meaning=model.noise.meaning if draws else clean,
    )


def check_draws(draws: int, settings: Settings) -> None:
    """Refuse more noise draws than one image may have."""
    if draws > settings.max_draws:
        raise InvalidRequest(f"draws: got {draws}, allowed are 1 to {settings.max_draws}", param="draws")


router = APIRouter(prefix="/v1", tags=["likelihood"], responses=ERRORS)


@router.post(
    "/score",
    response_model=ScoreResponse,
    responses=PICTURES,
    summary="How likely are images, and are they normal?",
    openapi_extra=examples.body(ScoreRequest),
)
async def score(request: Request, context: ContextDependency) -> Response | BaseModel:
    """Exact log-likelihood of images, given a class or none, under the model's noise protocol.

    With ``alpha``, ``threshold``, ``score``, ``maps``, ``calibration`` or ``correction`` each image also gets a
    verdict: whether it is anomalous by a calibration, with a conformal p-value, and on request where. With ``maps`` as
    pictures and ``Accept: image/png`` the answer is the picture itself, and the header x-tarflow-verdicts has the
    verdicts.
    """
    body, uploads = await read_images(request, ScoreRequest, context.settings)
    return await answer(context, await prepare_score(context, body, uploads))


async def prepare_score(context: Context, body: ScoreRequest, uploads: list[Upload]) -> Prepared:
    """The job of images to score; raises what is wrong with them."""
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    check_draws(body.draws, context.settings)
    question = await question_of(context, model, body)
    passes = body.draws + (0 if question is None else question.passes)
    await admit(context, model, cost_of(model, len(uploads), passes))
    inputs = await fit_uploads(context.request, uploads, model, context.settings, context.decoding)
    wanted = None if question is None else question.wanted
    payload = {"pixels": inputs.pixels, "label": label, "draws": body.draws, "seed": body.seed, "statistics": wanted}
    recipe = ScoresRecipe(
        inputs=inputs,
        class_name=class_name(model, label),
        protocol=protocol_of(model, body.draws, body.seed),
        maps=body.maps,
        asked=None if question is None else Asked(model=model, question=question),
    )
    job = new_job(model, Op.SCORE, payload, len(uploads), passes)
    return Prepared(job=job, recipe=recipe, body=body, uploads=uploads)


@router.post(
    "/encode", response_model=EncodeResponse, summary="Images to latents", openapi_extra=examples.body(EncodeRequest)
)
async def encode(request: Request, context: ContextDependency) -> Response | BaseModel:
    """The latent of each image, standard normal under the model, and its log-likelihood."""
    body, uploads = await read_images(request, EncodeRequest, context.settings)
    return await answer(context, await prepare_encode(context, body, uploads))


async def prepare_encode(context: Context, body: EncodeRequest, uploads: list[Upload]) -> Prepared:
    """The job of images to encode; raises what is wrong with them."""
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    await admit(context, model, cost_of(model, len(uploads)))
    inputs = await fit_uploads(context.request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "label": label, "add_noise": body.add_noise, "seed": body.seed}
    protocol = protocol_of(model, int(body.add_noise), body.seed)
    recipe = LatentsRecipe(inputs=inputs, class_name=class_name(model, label), protocol=protocol)
    return Prepared(job=new_job(model, Op.ENCODE, payload, len(uploads)), recipe=recipe, body=body, uploads=uploads)
