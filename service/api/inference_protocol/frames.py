"""Inference requests and answers as bytes: a JSON object, and behind it the values of binary tensors.

Pure functions. Whatever the bytes are, :func:`read_request` gives a request in which every tensor is what it says, or
raises ``MalformedRequest``, ``InvalidRequest`` or ``BodyTooLarge`` naming what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.api.inference_protocol.tensors import (
    DATATYPES,
    LONGEST_AXIS,
    MOST_AXES,
    MOST_VALUES,
    Datatype,
    Tensor,
    from_binary,
    from_json,
    invalid,
    shown,
    to_binary,
    to_json,
)
from service.errors import BodyTooLarge, InvalidRequest, MalformedRequest

LENGTH_HEADER = "Inference-Header-Content-Length"
"""Header with the length of the JSON, where binary tensors follow it."""
MOST_JSON_BYTES = 8 * 2**20
"""Without binary tensors, which cost next to nothing: nothing else runs in the process while JSON is parsed."""
MOST_LISTS = 100_000
"""Lists and objects in the JSON, each some hundred bytes of memory and work for the collector: 64 nested images of
three channels of 64 rows have about 12,500.
"""
MOST_TENSORS = 64
LONGEST_NAME = 100
LONGEST_ID = 1000
REQUEST_FIELDS = ("id", "model_name", "model_version", "parameters", "inputs", "outputs")
INPUT_FIELDS = ("name", "datatype", "shape", "parameters", "data")
INPUT_PARAMETERS = ("binary_data_size", "content_type")
OUTPUT_FIELDS = ("name", "parameters")
OUTPUT_PARAMETERS = ("binary_data",)


@dataclass(frozen=True)
class WantedOutput:
    """An output that is asked for by name."""

    name: str
    binary: bool | None = None
    """Whether its values shall be binary; ``None`` for what the request says of all."""


@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """What a client asks of a model."""

    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    """The model, where the body names it, too."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What is asked beside the tensors; anything of JSON."""
    binary_output: bool = False
    """Whether outputs are binary where nothing else is said of them."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: tuple[WantedOutput, ...] = ()
    """Empty for all that there are."""


# Reading.


def read_request(body: bytes, header_length: str | None) -> InferenceRequest:
    """The request in a body; ``header_length`` is what the header :data:`LENGTH_HEADER` says."""
    length = len(body) if header_length is None else _length(header_length, len(body))
    view = memoryview(body)
    document = _object(_parsed(view[:length], has_header=header_length is not None), "the body")
    _check_fields(document, REQUEST_FIELDS, "the request")
    parameters = dict(_parameters(document, "parameters"))
    return InferenceRequest(
        id=_text(document, "id", longest=LONGEST_ID),
        model_name=_text(document, "model_name"),
        model_version=_text(document, "model_version"),
        binary_output=_flag(parameters.pop("binary_data_output", False), "binary_data_output"),
        parameters=parameters,
        inputs=_inputs(document.get("inputs"), view[length:], has_header=header_length is not None),
        outputs=_outputs(document.get("outputs")),
    )


def _length(text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
        raise MalformedRequest(
            f"{LENGTH_HEADER}: got {text[:40]!r}, allowed is the number of the body's first bytes that are JSON, at "
            f"most {most}",
            param=LENGTH_HEADER,
        )
    return int(text)


def _parsed(data: memoryview, *, has_header: bool) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON; send values that are not finite as binary data")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there more than once in an object")
        return found

    if len(data) > MOST_JSON_BYTES:
        raise BodyTooLarge(
            f"the request has {len(data)} bytes of JSON, allowed are {MOST_JSON_BYTES}; send the tensors as binary data"
        )
    try:
        text = str(data, "utf-8")
        _check_lists(text)
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        hint = "" if has_header else f"; where binary data follows it, the header {LENGTH_HEADER} says how long it is"
        raise MalformedRequest(f"the body is not valid JSON: {error}{hint}") from None


def _check_lists(text: str) -> None:
    """Refuse JSON of so many lists and objects that parsing it would hold up everybody."""
    lists = text.count("[") + text.count("{")
    if lists > MOST_LISTS:
        raise MalformedRequest(
            f"the body has the characters [ and {{ {lists} times, allowed are {MOST_LISTS}, one for each list and "
            "object of its JSON; send the tensors as flat lists or as binary data"
        )


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what}: got {shown(value)}, allowed is a JSON object", param=_param(what))
    return value


def _parameters(document: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    value = document.get("parameters")
    return {} if value is None else _object(value, what)


def _param(what: str) -> str | None:
    return None if " " in what else what


def _check_fields(document: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    """Refuse unknown fields: a misspelt one must not be ignored."""
    unknown = next((name for name in document if name not in allowed), None)
    if unknown is not None:
        raise InvalidRequest(
            f"{what}: got the field {shown(unknown)}, allowed are {', '.join(allowed)}", code="unknown_field"
        )


def _text(document: Mapping[str, Any], name: str, longest: int = LONGEST_NAME) -> str | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > longest or not _is_unicode(value):
        allowed = f"a string of at most {longest} characters"
        raise InvalidRequest(f"{name}: got {shown(value)}, allowed is {allowed}", param=name)
    return value


def _is_unicode(text: str) -> bool:
    """Whether it can be sent back; JSON's escapes can write what is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: got {shown(value)}, allowed is true or false", param=name)
    return value


def _entries(value: Any, what: str) -> list[tuple[str, Mapping[str, Any]]]:
    """A list of objects with names of their own."""
    if not isinstance(value, list) or len(value) > MOST_TENSORS:
        raise InvalidRequest(
            f"{what}: got {shown(value)}, allowed is a list of at most {MOST_TENSORS} tensors", param=what
        )
    found: dict[str, Mapping[str, Any]] = {}
    for i, entry in enumerate(value):
        document = _object(entry, f"{what}.{i}")
        name = _text(document, "name")
        if not name:
            raise InvalidRequest(f"{what}.{i}: got no name, allowed is a string", param=what, code="missing_field")
        if name in found:
            raise InvalidRequest(f"{what}: got {name!r} more than once, allowed is once", param=what)
        found[name] = document
    return list(found.items())


def _inputs(value: Any, data: memoryview, *, has_header: bool) -> dict[str, Tensor]:
    if value is None:
        raise InvalidRequest("inputs: got none, allowed is a list of tensors", param="inputs", code="missing_field")
    inputs: dict[str, Tensor] = {}
    for name, entry in _entries(value, "inputs"):
        _check_fields(entry, INPUT_FIELDS, name)
        parameters = _parameters(entry, f"{name} parameters")
        _check_parameters(name, parameters, INPUT_PARAMETERS)
        datatype, shape = _datatype(name, entry.get("datatype")), _shape(name, entry.get("shape"))
        size, values = parameters.get("binary_data_size"), entry.get("data")
        if size is not None and values is not None:
            raise invalid(name, "got data and binary_data_size, allowed is one of them")
        if values is not None:
            inputs[name] = from_json(name, datatype, shape, values)
            continue
        if size is None:
            raise invalid(name, "got no data; give data, or binary_data_size and the bytes", "missing_field")
        if type(size) is not int or not 0 <= size <= len(data):
            hint = "" if has_header else f"; the header {LENGTH_HEADER} must say where they begin"
            raise invalid(
                name,
                f"got binary_data_size {shown(size)}, allowed are 0 to {len(data)}, the bytes that are left behind "
                f"the JSON{hint}",
                "invalid_size",
            )
        inputs[name] = from_binary(name, datatype, shape, data[:size])
        data = data[size:]
    if len(data):
        raise MalformedRequest(f"the body has {len(data)} bytes behind its last tensor, allowed are none")
    return inputs


def _datatype(name: str, value: Any) -> Datatype:
    found = next((datatype for datatype in DATATYPES if datatype == value), None)
    if found is None:
        raise invalid(name, f"got datatype {shown(value)}, allowed are {', '.join(DATATYPES)}", "invalid_datatype")
    return found


def _shape(name: str, value: Any) -> list[int]:
    is_shape = isinstance(value, list) and len(value) <= MOST_AXES
    if not is_shape or not all(type(length) is int and 0 <= length <= LONGEST_AXIS for length in value):
        raise invalid(
            name,
            f"got shape {shown(value)}, allowed are at most {MOST_AXES} integers from 0 to {LONGEST_AXIS}",
            "invalid_shape",
        )
    if math.prod(max(1, length) for length in value) > MOST_VALUES:
        raise invalid(name, f"got shape {value}, allowed are at most {MOST_VALUES} values", "invalid_shape")
    return list(value)


def _check_parameters(name: str, parameters: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse what would be ignored: shared memory, classification and what is misspelt."""
    unknown = next((parameter for parameter in parameters if parameter not in allowed), None)
    if unknown is not None:
        raise invalid(name, f"got the parameter {shown(unknown)}, allowed are {', '.join(allowed)}", "not_supported")


def _outputs(value: Any) -> tuple[WantedOutput, ...]:
    wanted = []
    for name, entry in _entries([] if value is None else value, "outputs"):
        _check_fields(entry, OUTPUT_FIELDS, name)
        parameters = _parameters(entry, f"{name} parameters")
        _check_parameters(name, parameters, OUTPUT_PARAMETERS)
        binary = parameters.get("binary_data")
        wanted.append(WantedOutput(name, None if binary is None else _flag(binary, f"{name} binary_data")))
    return tuple(wanted)


# Writing.


def write_answer(document: Mapping[str, Any], outputs: Sequence[tuple[Tensor, bool]]) -> tuple[bytes, int | None]:
    """An answer's body of fields and tensors, each binary or not; and the length of its JSON where any is."""
    described, parts = [], []
    for tensor, binary in outputs:
        entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if binary:
            parts.append(to_binary(tensor))
            described.append({**entry, "parameters": {"binary_data_size": len(parts[-1])}})
        else:
            described.append({**entry, "data": to_json(tensor)})
    text = json.dumps({**document, "outputs": described}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = text.encode()
    return b"".join([head, *parts]), len(head) if parts else None
