"""Compressed bodies: what tritonclient sends when it is told to, and never more than a plain body may have."""

from __future__ import annotations

import zlib

from service.errors import BodyTooLarge, MalformedRequest

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""zlib's name of each format; ``deflate`` is zlib's, as HTTP has it."""


def unpacks(path: str) -> bool:
    """Whether bodies may be compressed that are sent to a path."""
    return path.startswith("/v2/models/") and path.endswith("/infer")


def decompress(body: bytes, encoding: str | None, most: int) -> bytes:
    """A body without its Content-Encoding; raises where it is no such thing, or has more than ``most`` bytes.

    No more than that is ever unpacked, so that a small body cannot become a large one.
    """
    # An empty list of encodings is none, and HTTP lets empty elements stand in a list.
    name = (encoding or "").strip(" \t,").lower() or "identity"
    if name == "identity":
        return body
    if name not in _WINDOW:
        raise MalformedRequest(
            f"Content-Encoding: got {encoding!r}, allowed are gzip, deflate and none",
            param="Content-Encoding",
            code="unsupported_content_encoding",
        )
    unpacker = zlib.decompressobj(_WINDOW[name])
    try:
        # 0 would mean no limit.
        unpacked = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {name}: {error}", param="Content-Encoding") from None
    if len(unpacked) > most:
        raise BodyTooLarge(f"the request has more than {most} bytes when it is unpacked; send fewer or smaller images")
    if not unpacker.eof:
        raise MalformedRequest(f"the body is not {name}: it is cut off", param="Content-Encoding")
    if unpacker.unused_data:
        raise MalformedRequest(
            f"the body has {len(unpacker.unused_data)} bytes behind the end of its {name}, allowed are none",
            param="Content-Encoding",
        )
    return unpacked
