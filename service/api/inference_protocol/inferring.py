"""POST /v2/models/{name}/infer: a function of a model, as tensors."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Path, Request, Response

from service.api.context import ContextDependency
from service.api.inference_protocol.calls import Arrays, Call
from service.api.inference_protocol.compression import decompress
from service.api.inference_protocol.describing import ERRORS, VERSION, find
from service.api.inference_protocol.frames import LENGTH_HEADER, InferenceRequest, read_request, write_answer
from service.api.inference_protocol.functions import TensorSpec
from service.api.inference_protocol.schemas import InferenceAnswer, InferenceRequestBody
from service.api.inference_protocol.tensors import BYTES, DATATYPES, Tensor, shown
from service.errors import InvalidRequest, NotFound, TimedOut
from service.jobs import URGENT

MICROSECONDS = 1_000_000
LONGEST_TIMEOUT = 2**53
OF_LATENTS = "likelihoods are those of an autoencoder's latents of the images; they are no likelihoods of pixels"

router = APIRouter(prefix="/v2", tags=["inference protocol"], responses=ERRORS)


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with what it refers to in its place: in OpenAPI's document its own definitions are out of reach."""
    definitions = schema.pop("$defs")

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolved(definitions[value["$ref"].rpartition("/")[2]])
        return {name: resolved(inner) for name, inner in value.items()}

    inlined: dict[str, Any] = resolved(schema)
    return inlined


def _documented() -> dict[str, Any]:
    """OpenAPI's description of the body, which is parsed by hand: its length is not told by its type."""
    schema = _inlined(InferenceRequestBody.model_json_schema())
    content = {
        "application/json": {"schema": schema},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "/models/{model_name}/infer",
    summary="Use a model",
    response_model=InferenceAnswer,
    responses={200: {"content": {"application/octet-stream": {}}}},
    openapi_extra=_documented(),
)
@router.post("/models/{model_name}/versions/{version}/infer", include_in_schema=False)
async def infer(
    model_name: Annotated[str, Path(examples=["fashion-mnist:sample"])],
    request: Request,
    context: ContextDependency,
    version: str | None = None,
) -> Response:
    """Tensors in, tensors out, as JSON or with the extension for binary data. GET /v2/models/{model_name} tells which.

    The header Inference-Header-Content-Length says how long the JSON is where binary tensors follow it, in requests
    and in answers. Bodies may be compressed with gzip or deflate.
    """
    model, function = await find(context, model_name, version)
    request.state.op = str(function.op)
    body, limit = await request.body(), context.settings.max_body_bytes
    encoding, length = request.headers.get("content-encoding"), request.headers.get(LENGTH_HEADER)

    def read() -> InferenceRequest:
        return read_request(decompress(body, encoding, limit), length)

    asked = await anyio.to_thread.run_sync(read, limiter=context.decoding)
    _check_model(asked, model_name)
    _check_inputs(asked, function.inputs(model))
    wanted = _wanted(asked, function.outputs(model))
    timeout, asked = _timeout(asked, context.timeout)
    call = Call(context=context, model=model, request=asked, wanted=frozenset(spec.name for spec, _ in wanted))
    try:
        async with asyncio.timeout(timeout):
            arrays = await function.run(call)
    except TimeoutError:
        raise TimedOut(f"timeout: the work was not finished in {timeout:g} seconds") from None
    document: dict[str, Any] = {"model_name": model_name, "model_version": VERSION}
    document |= {} if asked.id is None else {"id": asked.id}
    if model.noise.space == "latents" and function.op in URGENT:
        call.notes.append(OF_LATENTS)
    document |= {"parameters": {"warnings": "; ".join(call.notes)}} if call.notes else {}

    def write() -> Response:
        data, head = write_answer(document, [(_tensor(spec, arrays), binary) for spec, binary in wanted])
        if head is None:
            return Response(data, media_type="application/json")
        return Response(data, media_type="application/octet-stream", headers={LENGTH_HEADER: str(head)})

    return await anyio.to_thread.run_sync(write)


def _check_model(asked: InferenceRequest, name: str) -> None:
    """Refuse a body for another model than the path's."""
    for field, got, allowed in (
        ("model_name", asked.model_name, name),
        ("model_version", asked.model_version, VERSION),
    ):
        # Some clients leave the version empty.
        if got and got != allowed:
            raise NotFound(f"{field}: got {got!r} in the body, allowed is {allowed!r}, as in the path", param=field)


def _check_inputs(asked: InferenceRequest, specs: tuple[TensorSpec, ...]) -> None:
    known = [spec.name for spec in specs]
    unknown = next((name for name in asked.inputs if name not in known), None)
    if unknown is not None:
        raise InvalidRequest(
            f"inputs: got {unknown!r}, allowed are {', '.join(known)}", param=unknown, code="unknown_input"
        )


def _wanted(asked: InferenceRequest, specs: tuple[TensorSpec, ...]) -> list[tuple[TensorSpec, bool]]:
    """The outputs to answer with, and whether each is binary."""
    if not asked.outputs:
        return [(spec, asked.binary_output) for spec in specs]
    by_name = {spec.name: spec for spec in specs}
    unknown = next((output.name for output in asked.outputs if output.name not in by_name), None)
    if unknown is not None:
        raise InvalidRequest(
            f"outputs: got {unknown!r}, allowed are {', '.join(by_name)}", param=unknown, code="unknown_output"
        )
    return [
        (by_name[output.name], asked.binary_output if output.binary is None else output.binary)
        for output in asked.outputs
    ]


def _timeout(asked: InferenceRequest, most: float) -> tuple[float, InferenceRequest]:
    """Seconds that the request may take, by its parameter in microseconds; and the request without that."""
    parameters = dict(asked.parameters)
    value = parameters.pop("timeout", None)
    if value is None:
        return most, asked
    if type(value) is not int or not 0 < value <= LONGEST_TIMEOUT:
        raise InvalidRequest(
            f"timeout: got {shown(value)}, allowed are 1 to {LONGEST_TIMEOUT} microseconds", param="timeout"
        )
    return min(most, value / MICROSECONDS), replace(asked, parameters=parameters)


def _tensor(spec: TensorSpec, arrays: Arrays) -> Tensor:
    values = arrays[spec.name]
    return Tensor(
        spec.name, spec.datatype, values if spec.datatype == BYTES else np.asarray(values, DATATYPES[spec.datatype])
    )
