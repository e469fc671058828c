"""POST /v1/score and /v1/encode: everything that answers with numbers about images."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api import examples
from service.api.context import ContextDependency, class_name, resolve_class
from service.api.judging import (
    calibration_used,
    notices,
    picture,
    picture_format,
    question_of,
    verdict_fields,
    verdicts_of,
)
from service.api.rendering import finite_or_none, tensor, warnings
from service.api.running import cost_of, new_job, run
from service.api.schemas import (
    EncodeRequest,
    EncodeResponse,
    EncodeResult,
    ErrorResponse,
    Notice,
    Protocol,
)
from service.api.score_schemas import ScoreRequest, ScoreResponse, ScoreResult
from service.api.uploads import fit_uploads, read_images
from service.errors import InvalidRequest
from service.jobs import ModelInfo, Op
from service.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}
PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ScoreResponse,
        "description": "JSON, or with maps as pictures and `Accept: image/png` (jpeg, webp) the picture itself; "
        "several as a grid. The header x-tarflow-verdicts has `anomaly` or `normal` for each image",
        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
    }
}
NON_FINITE = Notice(code="non_finite", message="the model gave a value that is not finite; it is shown as null")

CLEAN_MEANING = "density of the image itself, without the noise of training; not comparable with /v1/score"


def protocol_of(model: ModelInfo, draws: int, seed: int) -> Protocol:
    """What a likelihood from so many noise draws means; 0 for the image itself."""
    return Protocol(
        noise=model.noise.kind,
        sigma=model.noise.std,
        draws=draws,
        seed=seed if draws else None,
        meaning=model.noise.meaning if draws else CLEAN_MEANING,
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
async def score(request: Request, context: ContextDependency) -> Response | ScoreResponse:
    """Exact log-likelihood of images, given a class or none, under the model's noise protocol.

    With ``alpha``, ``threshold``, ``score``, ``maps``, ``calibration`` or ``correction`` each image also gets a
    verdict: whether it is anomalous by a calibration, with a conformal p-value, and on request where. With ``maps`` as
    pictures and ``Accept: image/png`` the answer is the picture itself, and the header x-tarflow-verdicts has the
    verdicts.
    """
    body, uploads = await read_images(request, ScoreRequest, context.settings)
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    check_draws(body.draws, context.settings)
    file_format = picture_format(request, body.maps)
    question = await question_of(context, model, body)
    passes = body.draws + (0 if question is None else question.passes)
    await context.door.check(model.name, cost_of(model, len(uploads), passes))
    inputs = await fit_uploads(request, uploads, model, context.settings, context.decoding)
    wanted = None if question is None else question.wanted
    payload = {"pixels": inputs.pixels, "label": label, "draws": body.draws, "seed": body.seed, "statistics": wanted}
    job = new_job(model, Op.SCORE, payload, len(uploads), passes)
    result, timing = await run(context, job)
    verdicts: list[dict[str, Any]] = [{} for _ in uploads]
    if question is not None:
        found = await verdicts_of(context, model, question, result, inputs)
        if file_format is not None:
            headers = {"x-tarflow-model": model.name, "x-tarflow-job": job.id}
            return await picture(question, found, inputs, body.maps, file_format, headers)
        verdicts = await verdict_fields(question, found, inputs, body.maps)
    protocol = protocol_of(model, body.draws, body.seed)
    images = []
    for i, changes in enumerate(inputs.changes):
        nats, spread, bits = (
            finite_or_none(result.arrays[name][i]) for name in ("log_likelihood", "log_likelihood_std", "bits_per_dim")
        )
        notes = warnings(changes) + notices(question) + ([NON_FINITE] if nats is None else [])
        images.append(
            ScoreResult(
                index=i,
                filename=inputs.filenames[i],
                log_likelihood=nats,
                # One draw says nothing of the spread.
                log_likelihood_std=spread if body.draws > 1 else None,
                bits_per_dim=bits,
                protocol=protocol,
                **verdicts[i],
                warnings=notes,
            )
        )
    return ScoreResponse(
        id=job.id,
        model=model.name,
        **{"class": class_name(model, label)},
        calibration=None if question is None else calibration_used(question),
        correction=None if question is None else question.correction,
        images=images,
        timing=timing,
    )


@router.post(
    "/encode", response_model=EncodeResponse, summary="Images to latents", openapi_extra=examples.body(EncodeRequest)
)
async def encode(request: Request, context: ContextDependency) -> EncodeResponse:
    """The latent of each image, standard normal under the model, and its log-likelihood."""
    body, uploads = await read_images(request, EncodeRequest, context.settings)
    model = await context.model(body.model)
    label = resolve_class(model, body.class_)
    await context.door.check(model.name, cost_of(model, len(uploads)))
    inputs = await fit_uploads(request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "label": label, "add_noise": body.add_noise, "seed": body.seed}
    job = new_job(model, Op.ENCODE, payload, len(uploads))
    protocol = protocol_of(model, int(body.add_noise), body.seed)
    result, timing = await run(context, job)
    images = []
    for i, changes in enumerate(inputs.changes):
        nats = finite_or_none(result.arrays["log_likelihood"][i])
        images.append(
            EncodeResult(
                index=i,
                filename=inputs.filenames[i],
                latent=tensor(result.arrays["latents"][i]),
                log_likelihood=nats,
                protocol=protocol,
                warnings=warnings(changes) + ([NON_FINITE] if nats is None else []),
            )
        )
    return EncodeResponse(
        id=job.id, model=model.name, **{"class": class_name(model, label)}, images=images, timing=timing
    )
