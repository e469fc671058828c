"""The answer of /v1/score: likelihoods, and verdicts where a calibration was asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import anyio.to_thread
from fastapi import Response

from model.anomaly.calibration import Calibration
from model.images import Format
from service.api.context import Context
from service.api.judging import calibration_used, notices, picture, picture_format, verdict_fields, verdicts_of
from service.api.recipes.base import Done
from service.api.recipes.inputs import inputs_from_wire, inputs_to_wire
from service.api.rendering import NON_FINITE_VALUE, finite_or_none, warnings
from service.api.schemas import Protocol
from service.api.score_schemas import Maps, ScoreResponse, ScoreResult
from service.api.uploads import Inputs
from service.errors import Conflict, InvalidRequest, NotFound
from service.jobs import ModelInfo
from service.verdicts import Question


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a calibration, and of which model's."""

    model: ModelInfo
    question: Question
    is_stored: bool = False
    """Whether it was kept with the job: then the same answer may be asked for again and again."""


@dataclass(frozen=True, kw_only=True)
class ScoresRecipe:
    """Each image's likelihood and verdict."""

    inputs: Inputs
    class_name: str | None
    protocol: Protocol
    maps: Maps
    asked: Asked | None

    def file_format(self, accept: str | None) -> Format | None:
        """See :class:`~service.api.recipes.base.Recipe`, here and below."""
        return picture_format(accept, self.maps)

    async def render(self, context: Context, done: Done) -> Response | ScoreResponse:
        inputs, arrays = self.inputs, done.result.arrays
        question = None if self.asked is None else self.asked.question
        verdicts: list[dict[str, Any]] = [{} for _ in inputs.changes]
        if self.asked is not None and question is not None:
            is_new = not self.asked.is_stored or context.drift.is_new(done.job_id)
            found = await verdicts_of(context, self.asked.model, question, done.result, inputs, observe=is_new)
            if done.file_format is not None:
                headers = {"x-tarflow-model": done.model, "x-tarflow-job": done.job_id}
                return await picture(question, found, inputs, self.maps, done.file_format, headers)
            verdicts = await verdict_fields(question, found, inputs, self.maps)
        images = []
        for i, changes in enumerate(inputs.changes):
            nats, spread, bits = (
                finite_or_none(arrays[name][i]) for name in ("log_likelihood", "log_likelihood_std", "bits_per_dim")
            )
            images.append(
                ScoreResult(
                    index=i,
                    filename=inputs.filenames[i],
                    log_likelihood=nats,
                    # One draw says nothing of the spread.
                    log_likelihood_std=spread if self.protocol.draws > 1 else None,
                    bits_per_dim=bits,
                    protocol=self.protocol,
                    **verdicts[i],
                    warnings=warnings(changes) + notices(question) + ([NON_FINITE_VALUE] if nats is None else []),
                )
            )
        return ScoreResponse(
            id=done.job_id,
            model=done.model,
            **{"class": self.class_name},
            calibration=None if question is None else calibration_used(question),
            correction=None if question is None else question.correction,
            images=images,
            timing=done.timing,
        )

    def to_wire(self) -> dict[str, Any]:
        return {
            # Verdicts look at the images once more.
            "inputs": inputs_to_wire(self.inputs, pixels=self.asked is not None),
            "class_name": self.class_name,
            "protocol": self.protocol.model_dump(),
            "maps": self.maps,
            "question": None if self.asked is None else _question_to_wire(self.asked.question),
        }

    @classmethod
    async def from_wire(cls, context: Context, model: str, data: Mapping[str, Any]) -> Self:
        asked = None
        if data["question"] is not None:
            try:
                info = await context.model(model)
            except NotFound as error:
                raise _changed(f"model: {model!r} is not served any more") from error
            asked = await anyio.to_thread.run_sync(_asked, context, info, data["question"])
        inputs, protocol = inputs_from_wire(data["inputs"]), Protocol(**data["protocol"])
        return cls(inputs=inputs, class_name=data["class_name"], protocol=protocol, maps=data["maps"], asked=asked)


def _digest(calibration: Calibration) -> str:
    return hashlib.sha256(calibration.to_bytes()).hexdigest()


def _question_to_wire(question: Question) -> dict[str, Any]:
    """All but the calibration: it is large, kept elsewhere, and known by its digest."""
    plain = {field.name: getattr(question, field.name) for field in fields(question) if field.name != "calibration"}
    return {**plain, "digest": _digest(question.calibration)}


def _changed(what: str) -> Conflict:
    return Conflict(
        f"{what}, so there is no verdict of this job to give; send the request again",
        param="calibration",
        code="calibration_changed",
    )


def _asked(context: Context, model: ModelInfo, data: Mapping[str, Any]) -> Asked:
    """What was asked; raises ``Conflict`` where the calibration is not the one that was meant."""
    plain = {name: value for name, value in data.items() if name != "digest"}
    try:
        calibration: Calibration | None = context.calibrations.get(model, data["name"])
    except InvalidRequest:
        calibration = None
    if calibration is None or _digest(calibration) != data["digest"]:
        what = "is gone or cannot be used any more" if calibration is None else "was replaced meanwhile"
        raise _changed(f"calibration: {data['name']!r} {what}")
    return Asked(model=model, question=Question(calibration=calibration, **plain), is_stored=True)
