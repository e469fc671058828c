"""What every endpoint needs: the app's settings, broker and metrics, who asks, the chosen model and class."""

from __future__ import annotations

import asyncio
import difflib
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter
from fastapi import Depends, Request

from service.access.caller import Caller
from service.api.door import Door
from service.broker.base import Broker, Terms
from service.calibrations import CalibrationStore
from service.calibrator import Calibrator
from service.drift import Drift
from service.errors import InvalidRequest, NotFound, TimedOut, Unavailable
from service.jobs import ModelInfo
from service.metrics import ServiceMetrics
from service.settings import Settings

MOST_SHOWN = 20
"""Class names that an error lists."""


class Context:
    """The application's parts, for one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.settings: Settings = request.app.state.settings
        self.broker: Broker = request.app.state.broker
        self.caller: Caller = request.state.caller
        self.door: Door = request.app.state.door.of(self.caller)
        self.calibrations: CalibrationStore = request.app.state.calibrations
        self.calibrator: Calibrator = request.app.state.calibrator
        self.spool: Path = request.app.state.spool
        self.drift: Drift = request.app.state.drift
        self.metrics: ServiceMetrics = request.app.state.metrics
        self.decoding: CapacityLimiter = request.app.state.decoding

    @property
    def timeout(self) -> float:
        """Seconds that are left of the time for the request, which began when it came; raises ``TimedOut``."""
        left: float = self.request.state.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise TimedOut("the time for the request was over before its work began")
        return round(left, 3) or left

    def terms(self, **more: Any) -> Terms:
        """How the caller's jobs are treated; ``more`` are other fields of the terms."""
        caller = self.caller
        return Terms(
            **{
                "caller": caller.name,
                "caller_cost": caller.concurrent_cost,
                "priority": caller.priority,
                "timeout": self.timeout,
                **more,
            }
        )

    async def model(self, name: str | None) -> ModelInfo:
        """The model a request names, or the default; raises :class:`~service.errors.NotFound`."""
        models = {model.name: model for model in await self.broker.models()}
        if not models:
            raise Unavailable("no model is known yet; a worker is being started", retry_after=2)
        if name is None:
            name = self.settings.default_model or next(iter(models))
        if name not in models:
            raise NotFound(
                f"model: got {name[:100]!r}, served are {', '.join(map(repr, models))}",
                code="model_not_found",
                param="model",
            )
        self.request.state.model = name
        return models[name]


async def _context(request: Request) -> Context:
    """A coroutine, since FastAPI would call the class in a thread: dearer than all that the class does."""
    return Context(request)


ContextDependency = Annotated[Context, Depends(_context)]


def resolve_class(model: ModelInfo, value: str | int | None) -> int | None:
    """A class by exact name, then by decimal index; raises :class:`~service.errors.InvalidRequest`."""
    if value is None:
        return None
    names = model.class_names
    if not names:
        raise InvalidRequest(
            f"class: got {str(value)[:100]!r}, but model {model.name!r} is unconditional; leave it out",
            param="class",
            code="class_not_found",
        )
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        lowered = {name.lower(): name for name in names}
        near = [lowered[n] for n in difflib.get_close_matches(value.lower(), lowered, n=3)]
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        shown = ", ".join(map(repr, names[:MOST_SHOWN])) + (", …" if len(names) > MOST_SHOWN else "")
        raise InvalidRequest(
            f"class: got {value[:100]!r}; {hint}allowed are {shown}, or an index from 0 to {len(names) - 1}",
            param="class",
            code="class_not_found",
        )
    # A very long decimal is out of range whatever its value; int() would refuse to read it.
    index = int(value) if isinstance(value, int) or len(value) < 10 else len(names)
    if not 0 <= index < len(names):
        raise InvalidRequest(
            f"class: got index {str(value)[:100]}, allowed is 0 to {len(names) - 1}",
            param="class",
            code="class_not_found",
        )
    return index


def class_name(model: ModelInfo, index: int | None) -> str | None:
    """The name to show for a class index."""
    return None if index is None else model.class_names[index]
