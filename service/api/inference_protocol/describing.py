"""GET /v2…: the server, whether it and its models are ready, and what their functions take and give."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service.api.context import Context, ContextDependency
from service.api.health import ready_workers
from service.api.inference_protocol.functions import FUNCTIONS, SEPARATOR, Function, TensorSpec
from service.api.inference_protocol.schemas import (
    ErrorText,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    TensorMetadata,
)
from service.errors import NotFound, Unavailable
from service.jobs import ModelInfo

EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
]
VERSION = "1"
"""The only one of every model."""
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorText, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorText, "description": "Why it cannot be done now"},
}
RETRY_AFTER_SECONDS = 2.0

router = APIRouter(prefix="/v2", tags=["inference protocol"], responses=ERRORS)
health_router = APIRouter(prefix="/v2/health", tags=["inference protocol"], responses=ERRORS)
"""What is open to orchestrators, as /readyz is."""


async def find(context: Context, name: str, version: str | None = None) -> tuple[ModelInfo, Function]:
    """A model and its function by the name they have together; raises ``NotFound``."""
    base, separator, suffix = name.partition(SEPARATOR)
    model = await context.model(base)
    if version not in (None, VERSION):
        raise NotFound(f"version: got {version[:100]!r}, allowed is {VERSION!r}", param="version")
    if suffix not in FUNCTIONS or (separator and not suffix):
        allowed = ", ".join(repr(base + SEPARATOR + function) for function in FUNCTIONS if function)
        raise NotFound(
            f"model: got {name[:200]!r}, allowed are {base!r}, {allowed}", param="model", code="model_not_found"
        )
    return model, FUNCTIONS[suffix]


@router.get("", summary="What answers", response_model=ServerMetadata)
async def server(request: Request) -> ServerMetadata:
    """Name, version and the extensions of the protocol that are known."""
    return ServerMetadata(name="tarflow", version=request.app.version, extensions=EXTENSIONS)


@health_router.get("/live", summary="Is the process alive?", response_model=Live)
async def live() -> Live:
    """200 as long as the process answers."""
    return Live()


async def _serving(context: Context) -> set[str]:
    """Names of the models that can be used now; raises ``Unavailable`` where none can."""
    if context.request.app.state.drain.draining:
        raise Unavailable("the service is shutting down", code="draining", retry_after=RETRY_AFTER_SECONDS)
    workers = await ready_workers(context)
    if not workers:
        raise Unavailable(
            "no worker is ready; one is starting, busy or being replaced", retry_after=RETRY_AFTER_SECONDS
        )
    return {model.name for worker in workers for model in worker.info.models}


@health_router.get("/ready", summary="Can requests be served?", response_model=Ready)
async def ready(context: ContextDependency) -> Ready:
    """200 when a worker has loaded and warmed up its models and its inference loop is running; 503 when none has."""
    await _serving(context)
    return Ready()


@router.get("/models/{model_name}", summary="What a model takes and gives", response_model=ModelMetadata)
@router.get("/models/{model_name}/versions/{version}", include_in_schema=False, response_model=ModelMetadata)
async def metadata(model_name: str, context: ContextDependency, version: str | None = None) -> ModelMetadata:
    """Names, datatypes and shapes of the tensors. NAME tells how likely images are; its other functions are models of
    their own: NAME:anomaly, NAME:anomaly_map, NAME:encode, NAME:decode and NAME:sample."""
    model, function = await find(context, model_name, version)

    def described(specs: tuple[TensorSpec, ...]) -> list[TensorMetadata]:
        return [TensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape)) for spec in specs]

    return ModelMetadata(
        name=model_name,
        versions=[VERSION],
        platform="tarflow",
        inputs=described(function.inputs(model)),
        outputs=described(function.outputs(model)),
    )


@router.get("/models/{model_name}/ready", summary="Can a model be used?", response_model=ModelReady)
@router.get("/models/{model_name}/versions/{version}/ready", include_in_schema=False, response_model=ModelReady)
async def model_ready(model_name: str, context: ContextDependency, version: str | None = None) -> ModelReady:
    """200 when a worker that is ready has it; 404 where it is unknown, 503 where no worker is ready."""
    model, _ = await find(context, model_name, version)
    if model.name not in await _serving(context):
        raise Unavailable(f"no worker that is ready has model {model.name!r}", retry_after=RETRY_AFTER_SECONDS)
    return ModelReady(name=model_name)


@router.get("/models/{model_name}/config", summary="A model's configuration, as Triton shows it")
@router.get("/models/{model_name}/versions/{version}/config", include_in_schema=False)
async def config(model_name: str, context: ContextDependency, version: str | None = None) -> dict[str, Any]:
    """The signature in Triton's terms: which inputs are optional, and in ``parameters`` the model's hash, the names of
    its classes, what its likelihoods mean, the parameters that requests may have, and how many rows."""
    model, function = await find(context, model_name, version)

    def described(spec: TensorSpec) -> dict[str, Any]:
        kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
        return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape)}

    texts = {
        "hash": model.model_id,
        "class_names": ",".join(model.class_names),
        "meaning": model.noise.meaning,
        "parameters": ",".join(sorted(function.parameters)),
        "max_images": str(context.settings.max_images),
    }
    return {
        "name": model_name,
        "platform": "tarflow",
        "backend": "tarflow",
        "version_policy": {"specific": {"versions": [int(VERSION)]}},
        # 0 says that the shapes have the axis of rows.
        "max_batch_size": 0,
        "input": [{**described(spec), "optional": spec.optional} for spec in function.inputs(model)],
        "output": [described(spec) for spec in function.outputs(model)],
        "parameters": {name: {"string_value": text} for name, text in texts.items()},
    }
