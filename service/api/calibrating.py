"""/v1/calibrations: what is normal, made from normal images without training."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from model.anomaly.calibration import Calibration
from model.anomaly.conformal import AlphaTooSmall, false_positive_interval, smallest_alpha, threshold
from model.bundle import NAMES, PATTERN, is_name
from service.api.calibration_schemas import (
    CalibrationDetails,
    CalibrationFacts,
    CalibrationList,
    CalibrationRequest,
    CalibrationSummary,
    ScoreFacts,
    ScoreHistogram,
    ScoreThreshold,
)
from service.api.context import ContextDependency
from service.api.forms import Form, spooled_form
from service.api.normals import read_normals
from service.api.rendering import finite_or_none
from service.api.schemas import ErrorBody, ErrorResponse, Notice
from service.calibrations import OWN, Stored
from service.calibrator import new_pending
from service.errors import InternalError, InvalidRequest
from service.jobs import ModelInfo
from service.pending import Run

PATH = "/v1/calibrations"
ALPHAS = (0.1, 0.05, 0.01)
"""Levels whose thresholds are shown."""
FILES = ("files", "file", "files[]")
TEXTS = ("name", "model")
"""Fields that are text whatever they look like."""
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be done now"},
}

router = APIRouter(prefix=PATH, tags=["calibrations"], responses=ERRORS)
NamePath = Annotated[
    str, Path(description=f"Name of the calibration: {NAMES}.", json_schema_extra={"pattern": PATTERN})
]
ModelQuery = Annotated[str | None, Query(description="Name of the model; by default the service's first.")]


def _form_body() -> dict[str, Any]:
    """OpenAPI description of the form."""
    fields = CalibrationRequest.model_json_schema()["properties"]
    files = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
        "description": "Normal images (PNG, JPEG, WebP, BMP, TIFF or single-frame GIF), zip archives of them, or both.",
    }
    schema = {"type": "object", "required": ["name", "files"], "properties": {**fields, "files": files}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_fields(form: Form) -> CalibrationRequest:
    """The fields of the form; raises ``InvalidRequest`` or a validation error naming the one that is wrong."""
    fields: dict[str, Any] = {}
    for name, text in form.fields:
        if name in FILES:
            raise InvalidRequest("files: got text, expected files (curl: -F files=@images.zip)", param="files")
        if name in fields:
            raise InvalidRequest(f"{name[:100]}: got it more than once, allowed is once", param=name[:100])
        fields[name] = (text or None) if name in TEXTS else _json_value(text)
    for file in form.files:
        if file.field not in FILES:
            raise InvalidRequest(
                f"{file.field[:100]}: files belong in the field 'files'", param=file.field[:100], code="unknown_field"
            )
    try:
        request = CalibrationRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from error
    if not is_name(request.name):
        raise InvalidRequest(f"name: got {request.name[:100]!r}, allowed is {NAMES}", param="name")
    if request.name == OWN:
        raise InvalidRequest(
            f"name: got {OWN!r}, which is the bundle's own calibration; choose another", param="name", code="reserved"
        )
    if not form.files:
        raise InvalidRequest(
            "files: images are needed (curl: -F files=@images.zip)", param="files", code="missing_field"
        )
    return request


def _summary(model: ModelInfo, stored: Stored | None, run: Run | None) -> dict[str, Any]:
    """Fields of :class:`CalibrationSummary`, from what is finished and what is in the making, one of them or both."""
    calibration = stored.calibration if stored is not None else None
    usable = stored is not None and stored.reason is None
    if run is not None:
        pending, failed = run.pending, run.pending.error
        error = None
        if failed is not None:
            code, message = failed
            error = ErrorBody(message=message, type=InternalError.type, param=None, code=code)
        missing = "it failed; see error" if failed is not None else "it is not finished"
        return {
            "id": pending.name,
            "name": pending.name,
            "model": model.name,
            "status": "running" if failed is None else "failed",
            "usable": usable,
            "reason": None if usable else missing if stored is None else stored.reason,
            "progress": run.progress,
            "num_images": pending.num_images,
            "created": pending.created,
            "error": error,
            "warnings": [Notice(code=code, message=message) for code, message in pending.notices],
        }
    if stored is None:
        raise AssertionError("either is there")
    record = None if calibration is None else calibration.record
    return {
        "id": stored.name,
        "name": stored.name,
        "model": model.name,
        "status": "ready",
        "usable": usable,
        "reason": stored.reason,
        "progress": 1.0,
        "num_images": None if record is None else record.num_fit + record.num_calibration,
        "created": None if record is None else record.created,
    }


def _facts(calibration: Calibration) -> CalibrationFacts:
    record = calibration.record
    return CalibrationFacts(
        num_fit=record.num_fit,
        num_calibration=record.num_calibration,
        smallest_alpha=smallest_alpha(record.num_calibration),
        default_alpha=record.default_alpha,
        seed=record.seed,
        noise=dict(record.noise),
        created=record.created,
        codecs_match=calibration.codecs_match,
        source=record.source,
    )


def _score_facts(calibration: Calibration, score: str) -> ScoreFacts:
    edges, counts = calibration.histogram(score)
    count, thresholds = calibration.record.num_calibration, []
    for alpha in ALPHAS:
        try:
            interval = false_positive_interval(alpha, count)
        except AlphaTooSmall:
            continue
        limit = finite_or_none(threshold(calibration.sorted_scores[score], alpha))
        thresholds.append(ScoreThreshold(alpha=alpha, threshold=limit, false_positive_rate=interval))
    return ScoreFacts(histogram=ScoreHistogram(edges=edges.tolist(), counts=counts.tolist()), thresholds=thresholds)


@router.post(
    "",
    status_code=202,
    response_model=CalibrationSummary,
    summary="Make a calibration from normal images",
    openapi_extra=_form_body(),
)
async def create_calibration(request: Request, response: Response, context: ContextDependency) -> CalibrationSummary:
    """Take normal images as what is normal for a model, without training.

    The answer comes when every image was read and kept; the calibration is made in the background. Location says where
    its progress is. A name that is taken is refused with 409 unless ``replace`` is true.
    """
    settings = context.settings
    async with spooled_form(request, context.spool, settings.max_calibration_images) as form:
        fields = _read_fields(form)
        model = await context.model(fields.model)
        # Before the work of decoding.
        await context.calibrator.check(model, fields.name, replace=fields.replace)
        normals = await read_normals(request, form.files, model, settings, context.decoding)
    pending = new_pending(model, fields.name, fields.seed, normals.pixels, normals.source, normals.notices)
    run = await context.calibrator.submit(model, pending, normals.pixels, replace=fields.replace)
    response.headers["Location"] = f"{PATH}/{quote(fields.name)}?model={quote(model.name)}"
    stored = await anyio.to_thread.run_sync(context.calibrations.entry, model, fields.name)
    return CalibrationSummary(**_summary(model, stored, run))


@router.get("", response_model=CalibrationList, summary="List the calibrations of a model")
async def list_calibrations(context: ContextDependency, model: ModelQuery = None) -> CalibrationList:
    """The bundle's own as ``default``, then finished ones, then those in the making and those that failed."""
    served = await context.model(model)
    # The runs first: one that is finished meanwhile is then among both, and not among none.
    runs = {run.pending.name: run for run in await context.calibrator.runs(served.name)}
    entries = await anyio.to_thread.run_sync(lambda: list(context.calibrations.entries(served)))
    kept = {stored.name: stored for stored in entries}
    summaries = [_summary(served, stored, None) for name, stored in kept.items() if name not in runs]
    summaries += [_summary(served, kept.get(name), run) for name, run in runs.items()]
    return CalibrationList(data=[CalibrationSummary(**summary) for summary in summaries])


@router.get("/{name}", response_model=CalibrationDetails, summary="Describe a calibration")
async def describe_calibration(
    name: NamePath, context: ContextDependency, model: ModelQuery = None
) -> CalibrationDetails:
    """How far it is, what it was made of, and what scores and levels mean for normal images."""
    served = await context.model(model)
    run = await context.calibrator.find(served.name, name)

    def build() -> CalibrationDetails:
        stored = context.calibrations.entry(served, name)
        if stored is None and run is None:
            raise context.calibrations.missing(served, name)
        calibration = None if stored is None else stored.calibration
        details = CalibrationDetails(**_summary(served, stored, run))
        if calibration is not None:
            details.record = _facts(calibration)
            details.scores = {score: _score_facts(calibration, score) for score in calibration.scores}
        return details

    return await anyio.to_thread.run_sync(build)


@router.delete("/{name}", status_code=204, summary="Delete a calibration")
async def delete_calibration(name: NamePath, context: ContextDependency, model: ModelQuery = None) -> None:
    """Forget a calibration, whatever its state; one in the making is given up. The bundle's own stays."""
    await context.calibrator.delete(await context.model(model), name)
