"""The JSON of /v1/jobs: what a job looks like from afar."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.api.classify_schemas import ClassifyResponse
from service.api.schemas import EncodeResponse, ErrorBody, ImagesResponse
from service.api.score_schemas import ScoreResponse
from service.broker.base import JobStatus
from service.errors import ServiceError
from service.jobs import JobState, Op

Answer = ImagesResponse | ScoreResponse | EncodeResponse | ClassifyResponse


class JobLinks(BaseModel):
    """Where to ask for a job."""

    self_: str = Field(alias="self")
    events: str


class JobDocument(BaseModel):
    """A job that outlives its connection."""

    model_config = ConfigDict(protected_namespaces=())
    id: str
    object: Literal["job"] = "job"
    op: Op
    model: str
    state: JobState = Field(description="queued, running, or at the end completed, failed or canceled.")
    progress: float = Field(description="Fraction of the work that is done.")
    position: int | None = Field(description="How many jobs go before it, while it waits.")
    created: float = Field(description="Unix time of acceptance; so are the next three.")
    started: float | None
    ended: float | None
    expires: float | None = Field(description="When a job that has ended is forgotten, and its result with it.")
    error: ErrorBody | None = Field(description="Why it failed or was canceled.")
    result: Answer | None = Field(
        None, description="What the synchronous call would have answered; null until it is completed, and in lists."
    )
    links: JobLinks


class JobList(BaseModel):
    """A caller's jobs."""

    object: Literal["list"] = "list"
    data: list[JobDocument] = Field(description="The newest first.")


def links_of(job_id: str) -> JobLinks:
    """Where a job is."""
    return JobLinks(**{"self": f"/v1/jobs/{job_id}"}, events=f"/v1/jobs/{job_id}/events")


def error_body(error: ServiceError) -> ErrorBody:
    """An error as documents and events have it."""
    return ErrorBody(message=error.message, type=error.type, param=error.param, code=error.code)


def document_of(status: JobStatus, result: Any = None) -> JobDocument:
    """A job's document, with its answer where there is one."""
    return JobDocument(
        id=status.id,
        op=status.op,
        model=status.model,
        state=status.state,
        progress=status.progress,
        position=status.position,
        created=status.created,
        started=status.started,
        ended=status.ended,
        expires=status.expires,
        error=None if status.error is None else error_body(status.error),
        result=result,
        links=links_of(status.id),
    )
