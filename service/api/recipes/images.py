"""The answers of /v1/sample, /v1/decode and /v1/denoise: images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fastapi import Response

from model.images import Format
from service.api.context import Context
from service.api.recipes.base import Done
from service.api.rendering import NON_FINITE, accepted_image, certificate_headers, image_results, picture
from service.api.schemas import ImagesResponse, Notice, OutputFormat


@dataclass(frozen=True, kw_only=True)
class ImagesRecipe:
    """Image files, each with its own details, and the parameters as they were used."""

    wanted: OutputFormat | None
    """The ``output_format`` that was sent."""
    details: Sequence[Mapping[str, Any]]
    """Each image's own fields: seed, class, warnings."""
    parameters: Mapping[str, Any]
    quality: int | None = None
    """The encoder's, for answers in JSON."""

    def file_format(self, accept: str | None) -> Format | None:
        """See :class:`~service.api.recipes.base.Recipe`, here and below."""
        return accepted_image(accept, self.wanted)

    async def render(self, context: Context, done: Done) -> Response | ImagesResponse:
        result, parameters = done.result, self.parameters
        if done.file_format is not None:
            noted = {notice.code for detail in self.details for notice in detail.get("warnings", ())}
            noted |= set() if result.arrays["finite"].all() else {NON_FINITE.code}
            notes = {"x-tarflow-warnings": ",".join(sorted(noted))} if noted else {}
            seeds = {"x-tarflow-seed": str(parameters["seed"])} if parameters.get("seed") is not None else {}
            exactness = certificate_headers(result, parameters.get("tolerance"))
            headers = {"x-tarflow-model": done.model, "x-tarflow-job": done.job_id, **seeds, **exactness, **notes}
            return await picture(result, done.file_format, headers, denoised=bool(parameters.get("denoise")))
        output_format: OutputFormat = self.wanted or "png"
        return ImagesResponse(
            id=done.job_id,
            model=done.model,
            images=await image_results(
                result, output_format, self.details, parameters.get("tolerance"), quality=self.quality
            ),
            plan=list(result.plan) or None,
            parameters={**parameters, "output_format": output_format},
            timing=done.timing,
        )

    def to_wire(self) -> dict[str, Any]:
        details = [
            {**detail, "warnings": [notice.model_dump() for notice in detail.get("warnings", ())]}
            for detail in self.details
        ]
        parameters = dict(self.parameters)
        return {"wanted": self.wanted, "details": details, "parameters": parameters, "quality": self.quality}

    @classmethod
    async def from_wire(cls, context: Context, model: str, data: Mapping[str, Any]) -> Self:
        details = [
            {**detail, "warnings": [Notice(**notice) for notice in detail["warnings"]]} for detail in data["details"]
        ]
        return cls(**{**data, "details": details})
