"""/v1/admin: the workers, and which models they hold. Answered only where the settings allow it."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from service.api.context import Context, ContextDependency
from service.api.schemas import ErrorResponse
from service.broker.base import Command
from service.errors import Unavailable

router = APIRouter(
    prefix="/v1/admin",
    tags=["administration"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


class HeldModel(BaseModel):
    """A model that a worker serves."""

    id: str
    hash: str = Field(description="Of its weights and configuration: tells whether all workers serve the same.")


class WorkerDescription(BaseModel):
    """A worker as it reported itself."""

    id: str
    device: str
    heartbeat_age: float = Field(description="Seconds since its inference loop was heard.")
    ready: bool = Field(description="Whether that is recent enough to count on it.")
    models: list[HeldModel]
    states: dict[str, str] = Field(description="ready, loading, unloading, or failed: and why, of each model.")


class WorkerList(BaseModel):
    """All workers that are registered."""

    object: Literal["list"] = "list"
    data: list[WorkerDescription]


class Told(BaseModel):
    """An order that the workers were given."""

    model: str
    action: Literal["load", "unload"]
    workers: int = Field(description="Workers that were told; GET /v1/admin/workers shows what they make of it.")


async def tell(context: Context, action: Literal["load", "unload"], name: str) -> int:
    """Give all workers an order; returns how many were told, and raises ``Unavailable`` where there is none."""
    told = await context.broker.command(Command(action=action, model=name))
    if not told:
        raise Unavailable("no worker is registered that could be told", retry_after=2)
    return told


@router.get("/workers", summary="The workers and their models")
async def workers(context: ContextDependency) -> WorkerList:
    """Every registered worker: its device, its models and where each stands."""
    known = await context.broker.workers()
    data = [
        WorkerDescription(
            id=worker.info.id,
            device=worker.info.device,
            heartbeat_age=round(worker.heartbeat_age, 3),
            ready=worker.heartbeat_age <= context.settings.ready_seconds,
            models=[HeldModel(id=model.name, hash=model.model_id) for model in worker.info.models],
            states=dict(worker.info.states),
        )
        for worker in sorted(known, key=lambda worker: worker.info.id)
    ]
    return WorkerList(data=data)


@router.post("/models/{name}/{action}", status_code=202, summary="Load or unload a model")
async def change(
    name: Annotated[str, Path(description="Name of a bundle in the workers' directory of models.")],
    action: Literal["load", "unload"],
    context: ContextDependency,
) -> Told:
    """Tell every worker to load a bundle from its directory of models, or to unload a model.

    A model that is loaded again is replaced by what is in the directory now, once that is read, warmed up and measured;
    until then, and if that fails, the old version serves. A model that is unloaded finishes what it has begun.
    """
    return Told(model=name, action=action, workers=await tell(context, action, name))
