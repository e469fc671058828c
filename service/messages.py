"""The versioned binary form of what goes between the API, the broker and the workers.

msgpack with numpy arrays as an extension type; nothing in a message can execute anything.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

VERSION = 1
MAX_FRAME_BYTES = 2**30
FRAME_HEADER = struct.Struct(">I")
_ARRAY = 1
_DTYPES = {"|u1", "<i8", "<f4", "<f8"}


class MessageError(ValueError):
    """Bytes that are not a message of this version."""


def _pack_extension(value: Any) -> msgpack.ExtType:
    if isinstance(value, np.ndarray) and value.dtype.str in _DTYPES:
        content = (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
        return msgpack.ExtType(_ARRAY, msgpack.packb(content))
    raise TypeError(f"cannot be sent: {type(value).__name__} {getattr(value, 'dtype', '')}")


def _unpack_extension(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise MessageError(f"unknown extension type {code}")
    dtype, shape, content = msgpack.unpackb(data)
    if dtype not in _DTYPES:
        raise MessageError(f"unknown array type {dtype!r}")
    return np.frombuffer(content, dtype).reshape(shape)


def pack(content: Any) -> bytes:
    """Plain data and numpy arrays (uint8, int64, float32, float64) to bytes."""
    return msgpack.packb((VERSION, content), default=_pack_extension)


def unpack(data: bytes) -> Any:
    """The content of :func:`pack`; arrays are read-only. Raises :class:`MessageError`."""
    try:
        version, content = msgpack.unpackb(data, ext_hook=_unpack_extension, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise MessageError(f"not a message: {error}") from error
    if version != VERSION:
        raise MessageError(f"message version {version}, this program speaks {VERSION}")
    return content


def frame(content: Any) -> bytes:
    """A packed message behind its length, for a byte stream."""
    data = pack(content)
    return FRAME_HEADER.pack(len(data)) + data


def frame_length(header: bytes) -> int:
    """Length of the message behind a frame's header; :class:`MessageError` when it cannot be."""
    length: int = FRAME_HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise MessageError(f"a frame of {length} bytes, allowed are {MAX_FRAME_BYTES}")
    return length
