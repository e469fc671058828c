"""The answer of /v1/classify: posteriors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from model.images import Format
from service.api.classify_schemas import ClassifyResponse, ClassifyResult, ClassProbability
from service.api.context import Context
from service.api.recipes.base import Done
from service.api.recipes.inputs import inputs_from_wire, inputs_to_wire
from service.api.rendering import NON_FINITE_VALUE, finite_or_none, warnings
from service.api.schemas import Protocol
from service.api.uploads import Inputs
from service.jobs import JobResult


@dataclass(frozen=True, kw_only=True)
class ClassesRecipe:
    """Each image's classes by probability."""

    inputs: Inputs
    class_names: Sequence[str]
    protocol: Protocol

    def file_format(self, accept: str | None) -> Format | None:
        """See :class:`~service.api.recipes.base.Recipe`, here and below."""
        return None

    async def render(self, context: Context, done: Done) -> ClassifyResponse:
        images = [
            ClassifyResult(
                index=i,
                filename=self.inputs.filenames[i],
                **self._posterior(done.result, i),
                protocol=self.protocol,
                warnings=warnings(changes) + ([] if _all_finite(done.result, i) else [NON_FINITE_VALUE]),
            )
            for i, changes in enumerate(self.inputs.changes)
        ]
        return ClassifyResponse(id=done.job_id, model=done.model, images=images, timing=done.timing)

    def _posterior(self, result: JobResult, image: int) -> dict[str, Any]:
        """One image's fields that come from the worker's arrays."""
        names = ("probability", "log_likelihood", "log_likelihood_no_class", "log_marginal")
        probability_Y, nats_Y, no_class, marginal = (result.arrays[name][image] for name in names)
        known = bool(np.isfinite(probability_Y).all())
        # Hundreds of nats apart, many probabilities are 0 in float64; the likelihoods still have an order.
        order = np.lexsort((-nats_Y, -probability_Y)).tolist() if known else list(range(len(nats_Y)))
        return {
            "class": self.class_names[order[0]] if known else None,
            "probabilities": [
                ClassProbability(
                    **{"class": self.class_names[y]},
                    index=y,
                    probability=finite_or_none(probability_Y[y]),
                    log_likelihood=finite_or_none(nats_Y[y]),
                )
                for y in order
            ],
            "log_likelihood_no_class": finite_or_none(no_class),
            "log_marginal": finite_or_none(marginal),
        }

    def to_wire(self) -> dict[str, Any]:
        names, protocol = list(self.class_names), self.protocol.model_dump()
        return {"inputs": inputs_to_wire(self.inputs), "class_names": names, "protocol": protocol}

    @classmethod
    async def from_wire(cls, context: Context, model: str, data: Mapping[str, Any]) -> Self:
        inputs, protocol = inputs_from_wire(data["inputs"]), Protocol(**data["protocol"])
        return cls(inputs=inputs, class_names=data["class_names"], protocol=protocol)


def _all_finite(result: JobResult, image: int) -> bool:
    return all(bool(np.isfinite(array[image]).all()) for array in result.arrays.values())
