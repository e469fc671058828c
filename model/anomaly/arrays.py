"""Nested frozen dataclasses of arrays to one flat mapping of arrays and back, for safetensors files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def flatten(record: Any, prefix: str = "") -> dict[str, NDArray[np.float32]]:
    """Every array and number of a record by its path, ``patches/center_F``, in float32."""
    flat: dict[str, NDArray[np.float32]] = {}
    for field in dataclasses.fields(record):
        value, path = getattr(record, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{path}/")
        else:
            flat[path] = np.array(value, np.float32, order="C")
    return flat


def unflatten(kind: type[Record], flat: Mapping[str, NDArray[Any]], prefix: str = "") -> Record:
    """The record of :func:`flatten`, with float64 arrays; ``KeyError`` names what is missing."""
    hints, values = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = unflatten(hints[field.name], flat, f"{path}/")
        else:
            array = np.asarray(flat[path], np.float64)
            values[field.name] = float(array) if hints[field.name] is float else array
    return kind(**values)
