"""POST /v1/classify: the exact posterior over a model's classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from service.api import examples
from service.api.classify_schemas import ClassifyRequest, ClassifyResponse, ClassifyResult, ClassProbability
from service.api.context import ContextDependency
from service.api.rendering import finite_or_none, warnings
from service.api.running import cost_of, new_job, run
from service.api.scoring import ERRORS, NON_FINITE, check_draws, protocol_of
from service.api.uploads import fit_uploads, read_images
from service.errors import InvalidRequest
from service.jobs import JobResult, ModelInfo, Op

router = APIRouter(prefix="/v1", tags=["likelihood"], responses=ERRORS)


def _posterior(model: ModelInfo, result: JobResult, image: int) -> dict[str, Any]:
    """One image's fields that come from the worker's arrays."""
    names = ("probability", "log_likelihood", "log_likelihood_no_class", "log_marginal")
    probability_Y, nats_Y, no_class, marginal = (result.arrays[name][image] for name in names)
    known = bool(np.isfinite(probability_Y).all())
    # Hundreds of nats apart, many probabilities are 0 in float64; the likelihoods still have an order.
    order = np.lexsort((-nats_Y, -probability_Y)).tolist() if known else list(range(len(nats_Y)))
    return {
        "class": model.class_names[order[0]] if known else None,
        "probabilities": [
            ClassProbability(
                **{"class": model.class_names[y]},
                index=y,
                probability=finite_or_none(probability_Y[y]),
                log_likelihood=finite_or_none(nats_Y[y]),
            )
            for y in order
        ],
        "log_likelihood_no_class": finite_or_none(no_class),
        "log_marginal": finite_or_none(marginal),
    }


def _all_finite(result: JobResult, image: int) -> bool:
    return all(bool(np.isfinite(array[image]).all()) for array in result.arrays.values())


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    summary="Which class are images of?",
    openapi_extra=examples.body(ClassifyRequest),
)
async def classify(request: Request, context: ContextDependency) -> ClassifyResponse:
    """Exact Bayes classification: the likelihood of each image given every class, times the model's class prior.

    With several draws of Gaussian noise the posteriors of the noised copies are averaged; under uniform dequantization
    the draws first tighten the likelihood of each class.
    """
    body, uploads = await read_images(request, ClassifyRequest, context.settings)
    model = await context.model(body.model)
    if not model.class_names:
        raise InvalidRequest(
            f"model: got {model.name!r}, which has no classes; allowed is a class-conditional model "
            "(GET /v1/models shows num_classes)",
            param="model",
            code="model_has_no_classes",
        )
    check_draws(body.draws, context.settings)
    # Every class and none, for each draw.
    passes = (len(model.class_names) + 1) * body.draws
    await context.door.check(model.name, cost_of(model, len(uploads), passes))
    inputs = await fit_uploads(request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "draws": body.draws, "seed": body.seed}
    job = new_job(model, Op.CLASSIFY, payload, len(uploads), passes)
    result, timing = await run(context, job)
    protocol = protocol_of(model, body.draws, body.seed)
    images = [
        ClassifyResult(
            index=i,
            filename=inputs.filenames[i],
            **_posterior(model, result, i),
            protocol=protocol,
            warnings=warnings(changes) + ([] if _all_finite(result, i) else [NON_FINITE]),
        )
        for i, changes in enumerate(inputs.changes)
    ]
    return ClassifyResponse(id=job.id, model=model.name, images=images, timing=timing)
