"""GET /v1/models: what is served."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from fastapi import APIRouter

from model.anomaly.conformal import smallest_alpha
from service.api.context import Context, ContextDependency
from service.jobs import ModelInfo
from service.verdicts import available_scores

router = APIRouter(prefix="/v1/models", tags=["models"])


def _summary(model: ModelInfo, *, default: bool) -> dict[str, Any]:
    """The fields that clients of model lists expect, and the few that choose a model."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tarflow",
        "default": default,
        "hash": model.model_id,
        "num_classes": model.flow.num_classes,
        "image": {"size": model.flow.image_size, "channels": model.flow.channels},
    }


async def _anomaly(context: Context, model: ModelInfo) -> dict[str, Any]:
    """What the bundle's own calibration can be asked."""
    if model.calibration is None:
        return {"calibrated": False, "scores": [], "num_calibration": None, "smallest_alpha": None}

    def described() -> dict[str, Any]:
        calibration = context.calibrations.get(model, None)
        count = calibration.record.num_calibration
        scores = list(available_scores(calibration))
        return {"calibrated": True, "scores": scores, "num_calibration": count, "smallest_alpha": smallest_alpha(count)}

    return await anyio.to_thread.run_sync(described)


@router.get("", summary="List the models")
async def list_models(context: ContextDependency) -> dict[str, Any]:
    """Every served model, in the shape that model clients expect."""
    models = await context.broker.models()
    default = context.settings.default_model or (models[0].name if models else None)
    return {"object": "list", "data": [_summary(m, default=m.name == default) for m in models]}


@router.get("/{name}", summary="Describe a model")
async def describe_model(name: str, context: ContextDependency) -> dict[str, Any]:
    """Architecture, class names, noise protocol, hash, recommended parameters and card of one model.

    ``convergence`` says how its iterations converge, as ``tarflow tune`` measured it: ``gain`` is the largest backward
    error of an image per residual at which it stopped, ``floor`` that of sequential float32 decoding, ``tolerance``
    where the iterations were counted. Only a tuned model is iterated with solver auto. ``class_prior`` is p(y) of each
    class as /v1/classify uses it: the frequencies in training, or uniform where the bundle has none. ``anomaly`` is
    about the bundle's own calibration: the ``scores`` that verdicts of /v1/score may use, and the smallest ``alpha``.
    """
    model = await context.model(name)
    default = (await context.model(None)).name
    return {
        **_summary(model, default=model.name == default),
        "architecture": {
            **model.flow.to_dict(),
            "num_patches": model.flow.num_patches,
            "patch_dim": model.flow.patch_dim,
        },
        "class_names": list(model.class_names),
        "class_prior": list(model.class_prior),
        "noise": {**model.noise.to_dict(), "meaning": model.noise.meaning},
        "recommended": model.sampling.to_dict(),
        "convergence": {"tuned": model.convergence is not None, **(model.convergence or {})},
        "anomaly": await _anomaly(context, model),
        "training": dict(model.training),
        "card": model.card,
    }
