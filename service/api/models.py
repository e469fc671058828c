"""GET /v1/models: what is served."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from fastapi import APIRouter

from model.anomaly.conformal import smallest_alpha
from service.api.context import Context, ContextDependency
from service.api.model_schemas import AnomalyFacts, ModelDescription, ModelList, ModelSummary
from service.api.schemas import ErrorResponse
from service.jobs import ModelInfo
from service.verdicts import available_scores

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}

router = APIRouter(prefix="/v1/models", tags=["models"], responses=ERRORS)


def _summary(model: ModelInfo, *, default: bool) -> dict[str, Any]:
    return {
        "id": model.name,
        "created": model.created,
        "default": default,
        "hash": model.model_id,
        "num_classes": model.flow.num_classes,
        "image": {"size": model.image_size, "channels": model.image_channels},
    }


async def _anomaly(context: Context, model: ModelInfo) -> AnomalyFacts:
    if model.calibration is None:
        return AnomalyFacts(calibrated=False, scores=[], num_calibration=None, smallest_alpha=None)

    def described() -> AnomalyFacts:
        calibration = context.calibrations.get(model, None)
        count = calibration.record.num_calibration
        return AnomalyFacts(
            calibrated=True,
            scores=list(available_scores(calibration)),
            num_calibration=count,
            smallest_alpha=smallest_alpha(count),
        )

    return await anyio.to_thread.run_sync(described)


@router.get("", response_model=ModelList, summary="List the models")
async def list_models(context: ContextDependency) -> ModelList:
    """Every served model, in the shape that model clients expect."""
    models = await context.broker.models()
    default = context.settings.default_model or (models[0].name if models else None)
    return ModelList(data=[ModelSummary(**_summary(m, default=m.name == default)) for m in models])


@router.get("/{name}", response_model=ModelDescription, summary="Describe a model")
async def describe_model(name: str, context: ContextDependency) -> ModelDescription:
    """Architecture, class names, noise protocol, hash, recommended parameters and card of one model.

    ``convergence`` says how its iterations converge, as ``tarflow tune`` measured it: ``gain`` is the largest backward
    error of an image per residual at which it stopped, ``floor`` that of sequential float32 decoding, ``tolerance``
    where the iterations were counted. Only a tuned model is iterated with solver auto. ``class_prior`` is p(y) of each
    class as /v1/classify uses it: the frequencies in training, or uniform where the bundle has none. ``anomaly`` is
    about the bundle's own calibration: the ``scores`` that verdicts of /v1/score may use, and the smallest ``alpha``.
    A model of latents has a ``codec``, the autoencoder that makes them of images and images of them; its likelihoods
    are those of the latents, and not of pixels.
    """
    model = await context.model(name)
    default = (await context.model(None)).name
    patches = {"num_patches": model.flow.num_patches, "patch_dim": model.flow.patch_dim}
    return ModelDescription(
        **_summary(model, default=model.name == default),
        architecture={**model.flow.to_dict(), **patches},
        class_names=list(model.class_names),
        class_prior=list(model.class_prior),
        noise={**model.noise.to_dict(), "meaning": model.noise.meaning},
        recommended=model.sampling.to_dict(),
        convergence={"tuned": model.convergence is not None, **(model.convergence or {})},
        anomaly=await _anomaly(context, model),
        codec=None if model.codec is None else model.codec.to_dict(),
        training=dict(model.training),
        card=model.card,
    )
