"""Tensors of the protocol: their datatypes, and values as JSON or as bytes.

Binary values are little-endian and in row-major order; those of BYTES are each their length, 4 bytes, and themselves.
Whatever is read was counted before: a shape takes no memory, only the values that came with it do. Those of JSON are
objects of Python before they are an array, many times the size of their text, which is why that has limits of its own.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
]
BYTES: Literal["BYTES"] = "BYTES"
"""Strings of any bytes; in numpy an array of objects."""
DATATYPES: dict[Datatype, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BYTES: np.dtype(np.object_),
}
MOST_AXES = 8
LONGEST_AXIS = 2**31 - 1
MOST_VALUES = 2**40
"""That a shape may have when its axes of length 0 are left out; numpy refuses some shapes of no values at all."""
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """A tensor with a name; its values have its shape."""

    name: str
    datatype: Datatype
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self.values.shape


def shown(value: Any) -> str:
    """A value as it was sent, cut short."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    return brief.repr(value)


def invalid(name: str, problem: str, code: str | None = None) -> InvalidRequest:
    """An error about the tensor of this name."""
    return InvalidRequest(f"{name}: {problem}", param=name, code=code)


def from_binary(name: str, datatype: Datatype, shape: Sequence[int], data: memoryview) -> Tensor:
    """A tensor of bytes; raises ``InvalidRequest`` where they are not those of the shape."""
    if datatype == BYTES:
        return Tensor(name, datatype, _objects(_split(name, math.prod(shape), data), shape))
    kind = DATATYPES[datatype]
    expected = math.prod(shape) * kind.itemsize
    if len(data) != expected:
        raise invalid(
            name, f"got {len(data)} bytes, allowed are {expected} for {datatype} of shape {list(shape)}", "invalid_size"
        )
    if datatype == "BOOL" and data and np.frombuffer(data, np.uint8).max() > 1:
        raise invalid(name, "got a byte above 1, allowed are 0 and 1 for BOOL")
    return Tensor(name, datatype, np.frombuffer(data, kind).reshape(shape))


def _split(name: str, count: int, data: memoryview) -> list[bytes]:
    """The elements of a BYTES tensor."""
    elements: list[bytes] = []
    start = 0
    while start < len(data):
        if len(elements) == count:
            raise invalid(name, f"got bytes behind the last of {count} elements, allowed are none", "invalid_size")
        begin = start + _LENGTH.size
        if begin > len(data):
            raise invalid(name, f"got {len(data) - start} bytes where an element's length takes 4", "invalid_size")
        end = begin + _LENGTH.unpack_from(data, start)[0]
        if end > len(data):
            raise invalid(
                name,
                f"got length {end - begin} of element {len(elements)}, allowed are at most the {len(data) - begin} "
                "bytes that are left",
                "invalid_size",
            )
        elements.append(bytes(data[begin:end]))
        start = end
    if len(elements) != count:
        raise invalid(name, f"got {len(elements)} elements, allowed are {count} by the shape", "invalid_size")
    return elements


def from_json(name: str, datatype: Datatype, shape: Sequence[int], data: Any) -> Tensor:
    """A tensor of JSON values, in one flat list or nested as its shape says; raises ``InvalidRequest``."""
    values = _flat(name, shape, data)
    if datatype == BYTES:
        return Tensor(name, datatype, _objects([_encoded(name, value) for value in values], shape))
    kind = DATATYPES[datatype]
    if datatype == "BOOL":
        _check_types(name, datatype, values, (bool,), "true and false")
    elif kind.kind in "iu":
        least, most = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
        _check_types(name, datatype, values, (int,), f"integers from {least} to {most}")
        if values and not (least <= min(values) and max(values) <= most):
            value = next(value for value in values if not least <= value <= most)
            raise invalid(name, f"got {shown(value)}, allowed are {datatype} integers from {least} to {most}")
    else:
        most_float = float(np.finfo(kind).max)
        _check_types(name, datatype, values, (float, int), "numbers")
        # Also what is not finite: 1e999 is read as infinity. And integers are compared exactly, however long.
        wrong = next((value for value in values if not -most_float <= value <= most_float), None)
        if wrong is not None:
            raise invalid(name, f"got {shown(wrong)}, allowed are numbers that are finite in {datatype}")
    return Tensor(name, datatype, np.array(values, kind).reshape(shape))


def _encoded(name: str, value: Any) -> bytes:
    try:
        return value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise invalid(
            name, f"got {shown(value)}, allowed are strings of Unicode for BYTES in JSON; send others as binary data"
        ) from None


def _check_types(name: str, datatype: Datatype, values: list[Any], kinds: tuple[type, ...], allowed: str) -> None:
    """Refuse values of other types: for JSON true is no number, whatever Python thinks."""
    if set(map(type, values)) <= set(kinds):
        return
    value = next(value for value in values if type(value) not in kinds)
    raise invalid(name, f"got {shown(value)}, allowed are {allowed} for {datatype}")


def _flat(name: str, shape: Sequence[int], data: Any) -> list[Any]:
    """The values in row-major order, as many as the shape has."""
    if not isinstance(data, list):
        raise invalid(name, f"got data {shown(data)}, allowed is a list")
    values = data
    if any(isinstance(value, list) for value in data):
        for axis, length in enumerate(shape[:-1]):
            inner = shape[axis + 1]
            if len(values) != math.prod(shape[: axis + 1]) or not all(
                isinstance(value, list) and len(value) == inner for value in values
            ):
                raise invalid(
                    name, f"got nested lists that are not of shape {list(shape)} at axis {axis} of length {length}"
                )
            values = list(chain.from_iterable(values))
    count = math.prod(shape)
    if len(values) != count:
        raise invalid(name, f"got {len(values)} values, allowed are {count} by shape {list(shape)}", "invalid_size")
    return values


def _objects(elements: list[bytes], shape: Sequence[int]) -> NDArray[np.object_]:
    values = np.empty(len(elements), np.object_)
    values[:] = elements
    return values.reshape(shape)


def to_binary(tensor: Tensor) -> bytes:
    """The values as bytes."""
    if tensor.datatype != BYTES:
        return np.ascontiguousarray(tensor.values, DATATYPES[tensor.datatype]).tobytes()
    return b"".join(part for value in tensor.values.ravel() for part in (_LENGTH.pack(len(value)), value))


def to_json(tensor: Tensor) -> list[Any]:
    """The values as JSON knows them, in one flat list; what is not finite is null."""
    values = tensor.values.ravel()
    if tensor.datatype == BYTES:
        return [value.decode() for value in values]
    listed: list[Any] = values.tolist()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return [value if math.isfinite(value) else None for value in listed]
    return listed
