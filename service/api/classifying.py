"""POST /v1/classify: the exact posterior over a model's classes."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api import examples
from service.api.classify_schemas import ClassifyRequest, ClassifyResponse
from service.api.context import Context, ContextDependency
from service.api.jobs.answering import answer
from service.api.recipes.base import Prepared
from service.api.recipes.classes import ClassesRecipe
from service.api.running import admit, cost_of, new_job
from service.api.scoring import ERRORS, check_draws, protocol_of
from service.api.uploads import Upload, fit_uploads, read_images
from service.errors import InvalidRequest
from service.jobs import Op

router = APIRouter(prefix="/v1", tags=["likelihood"], responses=ERRORS)


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    summary="Which class are images of?",
    openapi_extra=examples.body(ClassifyRequest),
)
async def classify(request: Request, context: ContextDependency) -> Response | BaseModel:
    """Exact Bayes classification: the likelihood of each image given every class, times the model's class prior.

    With several draws of Gaussian noise the posteriors of the noised copies are averaged; under uniform dequantization
    the draws first tighten the likelihood of each class.
    """
    body, uploads = await read_images(request, ClassifyRequest, context.settings)
    return await answer(context, await prepare_classify(context, body, uploads))


async def prepare_classify(context: Context, body: ClassifyRequest, uploads: list[Upload]) -> Prepared:
    """The job of images to classify; raises what is wrong with them."""
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
    await admit(context, model, cost_of(model, len(uploads), passes))
    inputs = await fit_uploads(context.request, uploads, model, context.settings, context.decoding)
    payload = {"pixels": inputs.pixels, "draws": body.draws, "seed": body.seed}
    protocol = protocol_of(model, body.draws, body.seed)
    recipe = ClassesRecipe(inputs=inputs, class_names=model.class_names, protocol=protocol)
    job = new_job(model, Op.CLASSIFY, payload, len(uploads), passes)
    return Prepared(job=job, recipe=recipe, body=body, uploads=uploads)
