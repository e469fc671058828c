"""Verdicts in requests and answers: what /v1/score asks of a calibration, and how it shows what comes back."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anyio.to_thread
from fastapi import Response

from model.anomaly.calibration import Calibration
from model.images import Format, encode_image, grid, original_box
from service.api.context import Context
from service.api.overlay import TOP, Pixels, heat_map, overlay
from service.api.rendering import accepted_image, finite_or_none, tensor
from service.api.schemas import Notice
from service.api.score_schemas import CalibrationUsed, MapColours, MapResult, Maps, Rate, RegionResult, ScoreRequest
from service.api.uploads import Inputs
from service.calibrations import OWN
from service.jobs import JobResult, ModelInfo
from service.verdicts import Question, Verdict, ask, judge, statistics_of


async def question_of(context: Context, model: ModelInfo, body: ScoreRequest) -> Question | None:
    """What a request asks of a calibration, or ``None``; raises ``InvalidRequest`` before any work is done."""
    if not body.asks_verdicts:
        return None

    def checked() -> Question:
        return ask(
            context.calibrations.get(model, body.calibration),
            body.calibration or OWN,
            score=body.score,
            alpha=body.alpha,
            threshold=body.threshold,
            correction=body.correction,
            maps=body.maps != "none",
        )

    return await anyio.to_thread.run_sync(checked)


def picture_format(accept: str | None, maps: Maps) -> Format | None:
    """The image format that an Accept header prefers to JSON, where maps are pictures; raises ``NotAcceptable``."""
    return accepted_image(accept, "png") if maps in ("png", "overlay") else None


async def verdicts_of(
    context: Context, model: ModelInfo, question: Question, result: JobResult, inputs: Inputs, *, observe: bool = True
) -> list[Verdict]:
    """Each image's verdict, from what the worker computed; with ``observe`` drift is watched on the way."""

    def judged() -> tuple[list[Verdict], bool]:
        verdicts = judge(question, statistics_of(result.arrays), inputs.pixels)
        return verdicts, context.calibrations.is_current(model, question.name, question.calibration)

    verdicts, is_current = await anyio.to_thread.run_sync(judged)
    # One that was deleted or replaced meanwhile is forgotten, and its p-values say nothing of its successor.
    if not (observe and is_current):
        return verdicts
    context.drift.observe(
        model.name,
        question.name,
        question.score,
        [verdict.p_value for verdict in verdicts],
        [verdict.is_anomaly for verdict in verdicts],
        num_calibration=question.calibration.record.num_calibration,
        version=question.calibration,
    )
    return verdicts


async def verdict_fields(
    question: Question, verdicts: Sequence[Verdict], inputs: Inputs, maps: Maps
) -> list[dict[str, Any]]:
    """Each image's fields of the answer that are about its verdict."""
    return await anyio.to_thread.run_sync(fields, question, verdicts, inputs, maps)


async def picture(
    question: Question,
    verdicts: Sequence[Verdict],
    inputs: Inputs,
    maps: Maps,
    file_format: Format,
    headers: Mapping[str, str],
) -> Response:
    """The map of an image, or a grid of several, as the answer itself; the verdicts are in a header."""

    def build() -> bytes:
        pairs = zip(verdicts, inputs.pixels, strict=True)
        drawn = [_drawn(question.calibration, verdict, pixels, maps) for verdict, pixels in pairs]
        return encode_image(drawn[0] if len(drawn) == 1 else grid(drawn), file_format)

    told = {"x-tarflow-verdicts": ",".join("anomaly" if verdict.is_anomaly else "normal" for verdict in verdicts)}
    noted = {change.code for changes in inputs.changes for change in changes}
    noted |= {notice.code for notice in notices(question)}
    notes = {"x-tarflow-warnings": ",".join(sorted(noted))} if noted else {}
    data = await anyio.to_thread.run_sync(build)
    return Response(data, media_type=f"image/{file_format}", headers={**headers, **told, **notes})


def fields(question: Question, verdicts: Sequence[Verdict], inputs: Inputs, maps: Maps) -> list[dict[str, Any]]:
    """The same as :func:`verdict_fields`, where blocking is fine."""
    return [_fields(question, verdict, inputs, i, maps) for i, verdict in enumerate(verdicts)]


def calibration_used(question: Question) -> CalibrationUsed:
    """What the answer says of the calibration."""
    count = question.calibration.record.num_calibration
    return CalibrationUsed(name=question.name, num_calibration=count, score=question.score)


def notices(question: Question | None) -> list[Notice]:
    """What must be known of every verdict."""
    if question is None or question.notice is None:
        return []
    return [Notice(code="codec_changed", message=question.notice)]


def _fields(question: Question, verdict: Verdict, inputs: Inputs, index: int, maps: Maps) -> dict[str, Any]:
    threshold, rate = question.threshold, question.false_positive_rate
    image_size = inputs.pixels.shape[-1]
    return {
        "is_anomaly": verdict.is_anomaly,
        "p_value": verdict.p_value,
        "score": finite_or_none(verdict.score),
        "threshold": None if threshold is None else finite_or_none(threshold),
        "alpha": question.alpha,
        "expected_false_positive_rate": None if rate is None else Rate(low=rate[0], high=rate[1]),
        "direction": verdict.direction,
        "features": {name: finite_or_none(value) for name, value in verdict.features.items()},
        "map": None if maps == "none" else _map(question.calibration, verdict, inputs.pixels[index], maps),
        "regions": None
        if maps == "none"
        else [
            RegionResult(
                bbox=region.bbox,
                bbox_original=original_box(region.bbox, image_size, inputs.original_sizes[index]),
                area=region.area,
                peak=finite_or_none(region.peak),
            )
            for region in verdict.regions
        ],
    }


def _map(calibration: Calibration, verdict: Verdict, pixels_CHW: Pixels, maps: Maps) -> MapResult:
    threshold, map_HW = calibration.maps.threshold, verdict.map_HW
    scale = MapColours(threshold=finite_or_none(threshold), top=finite_or_none(TOP * threshold))
    if maps == "array" and map_HW is not None:
        value = tensor(map_HW)
        return MapResult(format="array", shape=value.shape, b64=value.b64, scale=scale)
    data = encode_image(_drawn(calibration, verdict, pixels_CHW, maps), "png")
    kind: Literal["png", "overlay"] = "png" if maps == "png" else "overlay"
    return MapResult(format=kind, shape=None, b64=base64.b64encode(data).decode(), scale=scale)


def _drawn(calibration: Calibration, verdict: Verdict, pixels_CHW: Pixels, maps: Maps) -> Pixels:
    if verdict.map_HW is None:
        raise AssertionError("maps were asked for")
    threshold = calibration.maps.threshold
    if maps == "png":
        return heat_map(verdict.map_HW, threshold)
    return overlay(pixels_CHW, verdict.map_HW, threshold, [region.bbox for region in verdict.regions])
