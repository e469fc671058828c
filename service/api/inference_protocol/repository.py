"""POST /v2/repository…: which models there are, and loading and unloading them where the settings allow it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from typing import Any

from fastapi import APIRouter, Request

from model.bundle import NAMES, is_name
from service.access.caller import Scope
from service.api.administering import tell
from service.api.context import Context, ContextDependency
from service.api.inference_protocol.describing import VERSION
from service.api.inference_protocol.functions import SEPARATOR, model_names
from service.api.inference_protocol.schemas import IndexEntry, State
from service.broker.base import WorkerStatus
from service.errors import Forbidden, InvalidRequest, MalformedRequest, TimedOut, Unavailable

POLL_SECONDS = 0.02
READY = "ready"
STATES: dict[str, State] = {READY: "READY", "loading": "LOADING", "unloading": "UNLOADING"}

router = APIRouter(prefix="/v2/repository", include_in_schema=False)
changes_router = APIRouter(prefix="/v2/repository/models", include_in_schema=False)


async def _document(request: Request, allowed: Collection[str]) -> dict[str, Any]:
    """The body, a JSON object or nothing, whatever its Content-Type."""
    body = await request.body()
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    unknown = next((name for name in document if name not in allowed), None)
    if unknown is not None:
        raise InvalidRequest(f"the body has the field {unknown[:100]!r}, allowed are {', '.join(allowed)}")
    return document


@router.post("/index", response_model=list[IndexEntry])
async def index(request: Request, context: ContextDependency) -> list[IndexEntry]:
    """Every model and function, and where it stands; with ``{"ready": true}`` only what can be used."""
    document = await _document(request, ("ready",))
    is_operator = context.settings.administers and Scope.ADMIN in context.caller.scopes
    states: dict[str, State] = {}
    reasons: dict[str, str] = {}
    for worker in await context.broker.workers():
        for name, state in worker.info.states.items():
            # What serves somewhere can be used.
            if states.get(name) != "READY":
                states[name] = STATES.get(state, "UNAVAILABLE")
                reasons[name] = state if state not in STATES else ""
    for model in await context.broker.models():
        states[model.name] = "READY"
    return [
        # Reasons tell of directories, which is the operators' business.
        IndexEntry(name=each, version=VERSION, state=state, reason=reasons.get(name, "") if is_operator else "")
        for name, state in sorted(states.items())
        if state == "READY" or document.get("ready") is not True
        for each in model_names(name)
    ]


@changes_router.post("/{model_name}/load")
async def load(model_name: str, request: Request, context: ContextDependency) -> dict[str, Any]:
    """Load a bundle from the workers' directory of models; the answer comes when it is warm, or why it cannot be.

    One that is loaded already is replaced by what is in the directory now.
    """
    _check(context, model_name)
    document = await _document(request, ("parameters",))
    if document.get("parameters"):
        raise InvalidRequest(
            "parameters: got a configuration or files, allowed are none: a bundle is loaded as it is in the workers' "
            "directory",
            param="parameters",
        )
    before = {worker.info.id: worker.info.loads.get(model_name, 0) for worker in await context.broker.workers()}
    await tell(context, "load", model_name)

    def is_done(worker: WorkerStatus) -> bool:
        return worker.info.loads.get(model_name, 0) > before[worker.info.id]

    told = await _until(context, model_name, before, is_done, "is not loaded yet")
    failed = [state for state in (worker.info.states.get(model_name, "") for worker in told) if state != READY]
    if failed:
        raise InvalidRequest(f"model {model_name!r} cannot be loaded; {failed[0]}", param="model", code="load_failed")
    return {"name": model_name, "load": True}


@changes_router.post("/{model_name}/unload")
async def unload(model_name: str, request: Request, context: ContextDependency) -> dict[str, Any]:
    """Unload a model, its functions with it; the answer comes when no new request reaches it.

    What it has begun it finishes.
    """
    _check(context, model_name)
    document = await _document(request, ("parameters",))
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict) or not parameters.keys() <= {"unload_dependents"}:
        raise InvalidRequest("parameters: allowed is unload_dependents, true or false", param="parameters")
    model = await context.model(model_name)
    before = {worker.info.id for worker in await context.broker.workers()}
    await tell(context, "unload", model.name)

    def is_gone(worker: WorkerStatus) -> bool:
        return not _serves(worker, model.name)

    await _until(context, model.name, before, is_gone, "is not unloaded yet")
    return {"name": model.name, "unload": True}


def _check(context: Context, name: str) -> None:
    if not context.settings.administers:
        raise Forbidden(
            "models cannot be loaded or unloaded here; the service's setting 'admin' allows it (tarflow serve --admin "
            "true)",
            code="admin_disabled",
        )
    if not is_name(name):
        hint = f"; functions come and go with {name.partition(SEPARATOR)[0][:100]!r}" if SEPARATOR in name else ""
        raise InvalidRequest(f"model: got {name[:100]!r}, allowed is {NAMES}{hint}", param="model")


def _serves(worker: WorkerStatus, name: str) -> bool:
    return any(model.name == name for model in worker.info.models)


async def _until(
    context: Context, name: str, ids: Collection[str], is_done: Callable[[WorkerStatus], bool], otherwise: str
) -> list[WorkerStatus]:
    """Wait until all workers that were told are done; those that have left meanwhile are not waited for.

    What requests find of models may be a moment behind the workers, so the wait is for both.
    """
    timeout = context.timeout
    try:
        async with asyncio.timeout(timeout):
            while True:
                workers = await context.broker.workers()
                told = [worker for worker in workers if worker.info.id in ids]
                if not told:
                    raise Unavailable("the workers that were told have left", retry_after=2)
                is_served = any(_serves(worker, name) for worker in workers)
                known = {model.name for model in await context.broker.models()}
                if all(map(is_done, told)) and is_served == (name in known):
                    return told
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise TimedOut(f"model {name!r} {otherwise} after {timeout:g} seconds; the workers go on with it") from None
