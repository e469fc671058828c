"""What every function of a model needs of a request: its rows and classes as the jobs want them, and jobs for these."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from service.api.context import Context, resolve_class
from service.api.inference_protocol.frames import InferenceRequest
from service.api.inference_protocol.tensors import BYTES, Tensor, invalid
from service.api.running import new_job, run
from service.api.uploads import Inputs, Upload, check_count, fit_uploads
from service.errors import InvalidRequest
from service.jobs import Job, ModelInfo, Op

Arrays = Mapping[str, NDArray[Any]]
Fields = TypeVar("Fields", bound=BaseModel)
IMAGES, CLASS = "images", "class"
NO_CLASS = -1
"""Index that stands for no class; the empty name does so, too."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request of a model's function."""

    context: Context
    model: ModelInfo
    request: InferenceRequest
    wanted: frozenset[str]
    """Names of the outputs to answer with."""
    notes: list[str] = field(default_factory=list)
    """What must be known of the answer, such as changes made to images."""

    def fields(self, kind: type[Fields], allowed: Iterable[str], **fixed: Any) -> Fields:
        """The request's parameters, checked as the native API checks them; ``fixed`` are not the caller's."""
        unknown = next((name for name in self.request.parameters if name not in allowed), None)
        if unknown is not None:
            raise InvalidRequest(
                f"parameters: got {unknown[:100]!r}, allowed are {', '.join(sorted(allowed))}",
                param=unknown[:100],
                code="unknown_field",
            )
        try:
            return kind.model_validate({**fixed, **self.request.parameters})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from error

    def tensor(self, name: str) -> Tensor:
        """An input that must be there."""
        tensor = self.request.inputs.get(name)
        if tensor is None:
            raise invalid(name, "this input is missing", "missing_field")
        return tensor

    def count(self, tensor: Tensor) -> int:
        """Rows of a tensor; refuses none, and more than a request may have."""
        rows = tensor.shape[0] if tensor.shape else 0
        check_count(rows, tensor.name, self.context.settings)
        return rows

    async def images(self) -> Inputs:
        """The images: pixels as they are, or files, decoded and fitted to the model."""
        tensor = self.tensor(IMAGES)
        size, channels = self.model.image_size, self.model.image_channels
        if tensor.datatype == BYTES and len(tensor.shape) == 1:
            uploads = [Upload(data) for data in tensor.values]
            settings, decoding = self.context.settings, self.context.decoding
            inputs = await fit_uploads(self.context.request, uploads, self.model, settings, decoding)
            self.notes.extend(
                f"{IMAGES}.{i}: {change.message}" for i, changes in enumerate(inputs.changes) for change in changes
            )
            return inputs
        if tensor.datatype != "UINT8" or tensor.shape[1:] != (channels, size, size):
            raise invalid(
                tensor.name,
                f"got {tensor.datatype} of shape {list(tensor.shape)}, allowed are pixels, UINT8 of shape [n, "
                f"{channels}, {size}, {size}], or image files, BYTES of shape [n]",
                "invalid_shape",
            )
        rows = len(tensor.values)
        return Inputs(np.ascontiguousarray(tensor.values), [()] * rows, [None] * rows, [(size, size)] * rows)

    def labels(self, rows: int) -> list[int | None]:
        """Each row's class, or ``None``: one of them for all rows, or one for each."""
        tensor = self.request.inputs.get(CLASS)
        if tensor is None:
            return [None] * rows
        if tensor.datatype not in ("INT64", BYTES) or tensor.shape not in ((1,), (rows,)):
            raise invalid(
                CLASS,
                f"got {tensor.datatype} of shape {list(tensor.shape)}, allowed are indices, INT64, or names, BYTES, of "
                f"shape [1] or [{rows}]",
                "invalid_shape",
            )
        labels = [self._label(value) for value in tensor.values.tolist()]
        return labels * rows if len(labels) == 1 else labels

    def _label(self, value: int | bytes) -> int | None:
        if isinstance(value, int):
            return None if value == NO_CLASS else resolve_class(self.model, value)
        try:
            return resolve_class(self.model, value.decode()) if value else None
        except UnicodeDecodeError:
            raise invalid(CLASS, f"got {value[:100]!r}, allowed are names in UTF-8", "class_not_found") from None

    async def run(
        self,
        op: Op,
        labels: Sequence[int | None],
        prepare: Callable[[int | None, list[int]], tuple[Mapping[str, Any], int]],
    ) -> Arrays:
        """Run a job for the rows of every class, at the same time; returns their arrays in the order of the rows.

        ``prepare`` gives the payload of a class's rows and what an image costs in passes.
        """
        groups: dict[int | None, list[int]] = {}
        for row, label in enumerate(labels):
            groups.setdefault(label, []).append(row)
        jobs = []
        for label, rows in groups.items():
            payload, passes = prepare(label, rows)
            jobs.append(new_job(self.model, op, {**payload, "label": label}, len(rows), passes))
        if len(jobs) > 1:
            # A job alone is judged when it is submitted; of several the first would be let in where all never are.
            await self.context.door.check(self.model.name, sum(job.cost for job in jobs))
        parts = await self._all(jobs)
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([np.array(rows) for rows in groups.values()]))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

    async def _all(self, jobs: Sequence[Job]) -> list[Arrays]:
        """Every job's arrays; when one fails the others are given up."""
        tasks = [asyncio.ensure_future(run(self.context, job)) for job in jobs]
        try:
            return [result.arrays for result, _ in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
