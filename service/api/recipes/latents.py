"""The answer of /v1/encode: latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from model.images import Format
from service.api.context import Context
from service.api.recipes.base import Done
from service.api.recipes.inputs import inputs_from_wire, inputs_to_wire
from service.api.rendering import NON_FINITE_VALUE, finite_or_none, tensor, warnings
from service.api.schemas import EncodeResponse, EncodeResult, Protocol
from service.api.uploads import Inputs


@dataclass(frozen=True, kw_only=True)
class LatentsRecipe:
    """Each image's latent and likelihood."""

    inputs: Inputs
    class_name: str | None
    protocol: Protocol

    def file_format(self, accept: str | None) -> Format | None:
        """See :class:`~service.api.recipes.base.Recipe`, here and below."""
        return None

    async def render(self, context: Context, done: Done) -> EncodeResponse:
        images = []
        for i, changes in enumerate(self.inputs.changes):
            nats = finite_or_none(done.result.arrays["log_likelihood"][i])
            images.append(
                EncodeResult(
                    index=i,
                    filename=self.inputs.filenames[i],
                    latent=tensor(done.result.arrays["latents"][i]),
                    log_likelihood=nats,
                    protocol=self.protocol,
                    warnings=warnings(changes) + ([NON_FINITE_VALUE] if nats is None else []),
                )
            )
        return EncodeResponse(
            id=done.job_id, model=done.model, **{"class": self.class_name}, images=images, timing=done.timing
        )

    def to_wire(self) -> dict[str, Any]:
        protocol = self.protocol.model_dump()
        return {"inputs": inputs_to_wire(self.inputs), "class_name": self.class_name, "protocol": protocol}

    @classmethod
    async def from_wire(cls, context: Context, model: str, data: Mapping[str, Any]) -> Self:
        inputs, protocol = inputs_from_wire(data["inputs"]), Protocol(**data["protocol"])
        return cls(inputs=inputs, class_name=data["class_name"], protocol=protocol)
