"""The functions of a model, each a model of its own for clients of the protocol: NAME, NAME:encode, NAME:sample, …

A model of the protocol has one signature, which its metadata tells: a client may send every input and gets every
output. One model with a parameter for what to do could not be described like that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from model.config import MAX_SEED
from service.api.inference_protocol.calls import CLASS, IMAGES, Arrays, Call
from service.api.inference_protocol.tensors import BYTES, Datatype, invalid
from service.api.judging import notices, question_of, verdicts_of
from service.api.options import asked
from service.api.rendering import NON_FINITE
from service.api.running import cost_of
from service.api.schemas import EncodeRequest, SamplerFields
from service.api.score_schemas import ScoreRequest
from service.api.scoring import check_draws
from service.jobs import JobResult, ModelInfo, Op

SEPARATOR = ":"
"""Between a model's name, which cannot have it, and that of a function."""
SEED, LATENTS = "seed", "latents"
SAMPLER = frozenset(SamplerFields.model_fields) - {"trajectory", "output_format", "previews"}
PLACEHOLDER = {"images": ["-"]}
"""Stands for the images in the validation; they are tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a signature; -1 stands for the number of rows."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...] = (-1,)
    optional: bool = False


class Function(Protocol):
    """What can be done with a model."""

    name: str
    op: Op
    parameters: frozenset[str]
    """Names of the parameters that a request may have."""

    def inputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        """The tensors that a request has; more datatypes may be allowed than those named."""

    def outputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        """The tensors of the answer."""

    async def run(self, call: Call) -> Arrays:
        """The values of the outputs, at least of those that are wanted."""


def _images(model: ModelInfo, name: str = IMAGES, datatype: Datatype = "UINT8") -> TensorSpec:
    return TensorSpec(name, datatype, (-1, model.image_channels, model.image_size, model.image_size))


def _latents(model: ModelInfo) -> TensorSpec:
    return TensorSpec(LATENTS, "FP32", (-1, model.flow.num_patches, model.flow.patch_dim))


def _class(model: ModelInfo) -> tuple[TensorSpec, ...]:
    return (TensorSpec(CLASS, "INT64", optional=True),) if model.flow.num_classes else ()


class Likelihood:
    """How likely images are."""

    name, op = "", Op.SCORE
    parameters = frozenset({"draws", "seed"})

    def inputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        """See :class:`Function`, here and below."""
        return (_images(model), *_class(model))

    def outputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "FP64") for name in ("log_likelihood", "log_likelihood_std", "bits_per_dim"))

    async def run(self, call: Call) -> Arrays:
        body = call.fields(ScoreRequest, self.parameters, **PLACEHOLDER)
        check_draws(body.draws, call.context.settings)
        rows = call.count(call.tensor(IMAGES))
        labels = call.labels(rows)
        await call.context.door.check(call.model.name, cost_of(call.model, rows, body.draws))
        pixels = (await call.images()).pixels

        def prepare(label: int | None, rows: list[int]) -> tuple[Mapping[str, Any], int]:
            return {"pixels": pixels[rows], "draws": body.draws, "seed": body.seed, "statistics": None}, body.draws

        arrays = dict(await call.run(self.op, labels, prepare))
        if body.draws == 1:
            # One draw says nothing of the spread.
            arrays["log_likelihood_std"] = np.full(rows, np.nan)
        return arrays


class Anomaly:
    """Whether images are normal, by a calibration; with maps also where they are not."""

    op = Op.SCORE
    parameters = frozenset({"alpha", "threshold", "score", "calibration", "correction", "draws", "seed"})

    def __init__(self, *, maps: bool) -> None:
        self._maps = maps
        self.name = "anomaly_map" if maps else "anomaly"

    def inputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return (_images(model), *_class(model))

    def outputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        size = model.image_size
        numbers = (TensorSpec(name, "FP64") for name in ("p_value", "score", "threshold"))
        likelihoods = (TensorSpec(name, "FP64") for name in ("log_likelihood", "bits_per_dim"))
        where = (TensorSpec("map", "FP32", (-1, size, size)),) if self._maps else ()
        return (TensorSpec("is_anomaly", "BOOL"), *numbers, TensorSpec("direction", BYTES), *likelihoods, *where)

    async def run(self, call: Call) -> Arrays:
        # The score is what asks for verdicts.
        fixed = {**PLACEHOLDER, "maps": "array" if self._maps else "none", "score": "combined"}
        body = call.fields(ScoreRequest, self.parameters, **fixed)
        check_draws(body.draws, call.context.settings)
        rows = call.count(call.tensor(IMAGES))
        labels = call.labels(rows)
        question = await question_of(call.context, call.model, body)
        if question is None:
            raise AssertionError("a score was asked for")
        passes = body.draws + question.passes
        await call.context.door.check(call.model.name, cost_of(call.model, rows, passes))
        inputs = await call.images()

        def prepare(label: int | None, rows: list[int]) -> tuple[Mapping[str, Any], int]:
            payload = {"pixels": inputs.pixels[rows], "draws": body.draws, "seed": body.seed}
            return {**payload, "statistics": question.wanted}, passes

        arrays = await call.run(self.op, labels, prepare)
        # All rows together, whatever their classes: a correction decides about the whole request.
        result = JobResult(arrays=arrays, inference_seconds=0.0)
        verdicts = await verdicts_of(call.context, call.model, question, result, inputs)
        call.notes.extend(notice.message for notice in notices(question))
        threshold = np.nan if question.threshold is None else question.threshold
        found: dict[str, Any] = {
            "is_anomaly": np.array([verdict.is_anomaly for verdict in verdicts]),
            "p_value": np.array([verdict.p_value for verdict in verdicts]),
            "score": np.array([verdict.score for verdict in verdicts]),
            "threshold": np.full(rows, threshold),
            "direction": np.array([verdict.direction.encode() for verdict in verdicts], np.object_),
        }
        maps = [verdict.map_HW for verdict in verdicts if verdict.map_HW is not None]
        return {**arrays, **found, **({"map": np.stack(maps)} if self._maps else {})}


class Encode:
    """Images to latents."""

    name, op = "encode", Op.ENCODE
    parameters = frozenset({"add_noise", "seed"})

    def inputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return (_images(model), *_class(model))

    def outputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return (_latents(model), TensorSpec("log_likelihood", "FP64"))

    async def run(self, call: Call) -> Arrays:
        body = call.fields(EncodeRequest, self.parameters, **PLACEHOLDER)
        rows = call.count(call.tensor(IMAGES))
        labels = call.labels(rows)
        await call.context.door.check(call.model.name, cost_of(call.model, rows))
        pixels = (await call.images()).pixels

        def prepare(label: int | None, rows: list[int]) -> tuple[Mapping[str, Any], int]:
            return {"pixels": pixels[rows], "add_noise": body.add_noise, "seed": body.seed}, 1

        return await call.run(self.op, labels, prepare)


class _Sampling:
    """What gives images."""

    parameters = SAMPLER

    def outputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return (_images(model), _images(model, "samples", "FP32"), TensorSpec("backward_error", "FP64"))

    @staticmethod
    def answer(call: Call, arrays: Arrays) -> Arrays:
        """The outputs: 8-bit images, and the floats before they were rounded."""
        if not arrays["finite"].all():
            call.notes.append(NON_FINITE.message)
        floats = {"samples": arrays["images"]} if "samples" in call.wanted else {}
        return {IMAGES: arrays["pixels"], "backward_error": arrays["backward_error"], **floats}


class Decode(_Sampling):
    """Latents to images: without guidance and denoising, unless they are asked for, the exact inverse of encoding."""

    name, op = "decode", Op.DECODE

    def inputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return (_latents(model), *_class(model))

    async def run(self, call: Call) -> Arrays:
        body = call.fields(SamplerFields, self.parameters)
        tensor, flow = call.tensor(LATENTS), call.model.flow
        latents = tensor.values
        if tensor.datatype != "FP32" or tensor.shape[1:] != (flow.num_patches, flow.patch_dim):
            raise invalid(
                LATENTS,
                f"got {tensor.datatype} of shape {list(tensor.shape)}, allowed is FP32 [n, {flow.num_patches}, "
                f"{flow.patch_dim}]",
                "invalid_shape",
            )
        labels = call.labels(call.count(tensor))
        if not np.isfinite(latents).all():
            raise invalid(LATENTS, "got values that are not finite, allowed are finite ones", "non_finite_latent")
        exact = {"guidance_scale": body.guidance_scale or 0.0, "denoise": bool(body.denoise)}

        def prepare(label: int | None, rows: list[int]) -> tuple[Mapping[str, Any], int]:
            used, passes = asked(call.model, body, label, **exact)
            return {"latents": latents[rows], **used, "floats": "samples" in call.wanted}, passes

        return self.answer(call, await call.run(self.op, labels, prepare))


class Sample(_Sampling):
    """Images of seeds: as many as there are of these."""

    name, op = "sample", Op.SAMPLE

    def inputs(self, model: ModelInfo) -> tuple[TensorSpec, ...]:
        return (TensorSpec(SEED, "INT64"), *_class(model))

    async def run(self, call: Call) -> Arrays:
        body = call.fields(SamplerFields, self.parameters)
        tensor = call.tensor(SEED)
        if tensor.datatype != "INT64" or len(tensor.shape) != 1:
            raise invalid(
                SEED, f"got {tensor.datatype} of shape {list(tensor.shape)}, allowed is INT64 [n]", "invalid_shape"
            )
        labels = call.labels(call.count(tensor))
        seeds: list[int] = tensor.values.tolist()
        wrong = next((seed for seed in seeds if not 0 <= seed <= MAX_SEED), None)
        if wrong is not None:
            raise invalid(SEED, f"got {wrong}, allowed are 0 to {MAX_SEED}")

        def prepare(label: int | None, rows: list[int]) -> tuple[Mapping[str, Any], int]:
            used, passes = asked(call.model, body, label)
            return {"seeds": [seeds[row] for row in rows], **used, "floats": "samples" in call.wanted}, passes

        return self.answer(call, await call.run(self.op, labels, prepare))


FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (Likelihood(), Anomaly(maps=False), Anomaly(maps=True), Encode(), Decode(), Sample())
}
"""By name; the one without a name is that of the model itself."""


def model_names(model: str) -> list[str]:
    """The names under which a model's functions are called."""
    return [model + (SEPARATOR + name if name else "") for name in FUNCTIONS]
