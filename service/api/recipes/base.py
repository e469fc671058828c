"""What every recipe is.

A synchronous call renders in the process that prepared it; the recipe of another job is kept with it in the broker,
and any process makes the answer of it, as often as it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from fastapi import Response
from pydantic import BaseModel

from model.images import Format
from service.api.context import Context
from service.api.schemas import Timing
from service.api.uploads import Upload
from service.jobs import Job, JobResult


@dataclass(frozen=True, kw_only=True)
class Done:
    """A job that was completed."""

    job_id: str
    model: str
    result: JobResult
    timing: Timing
    file_format: Format | None = None
    """The image file to answer with; ``None`` for JSON."""


class Recipe(Protocol):
    """All that an answer needs beside the job's result."""

    def file_format(self, accept: str | None) -> Format | None:
        """The image file that an Accept header prefers to JSON, or ``None``; raises ``NotAcceptable``."""

    async def render(self, context: Context, done: Done) -> Response | BaseModel:
        """The answer."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data and arrays, for :mod:`service.messages`; may block for some milliseconds."""

    @classmethod
    async def from_wire(cls, context: Context, model: str, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_wire`, in any process, of a job of the model of this name.

        Raises a ``ServiceError`` where what the answer is about has changed since.
        """


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that was checked, as a job that is ready to be submitted."""

    job: Job
    recipe: Recipe
    body: BaseModel
    """What was sent; uploaded images are beside it."""
    uploads: Sequence[Upload] = ()
    previews: int = 0
    """How many states the job shall publish on the way."""
