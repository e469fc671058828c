"""HTTP connections as uvicorn's, with bounds on what comes before a request: its head is not read without end."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 * 1024
"""Of the request line and the headers; what comes in one read is looked at in one piece, so it may be a little more."""
HEAD_SECONDS = 30.0
"""Until the head is there, from its first byte; and until that, from the connection's beginning."""

_TOO_LARGE = b"the request's head is larger than %d bytes" % MOST_HEAD_BYTES


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self.waits_since: float | None = None
        """Since when a head is waited for, by the monotonic clock; None while there is none to come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected and is expected to ask."""
        super().connection_made(transport)
        self.waits_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head has grown too large."""
        super().data_received(data)
        if self.waits_since is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\n"
                    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_TOO_LARGE), _TOO_LARGE)
                )
                self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.waits_since, self._head_bytes = time.monotonic(), 0

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self.waits_since = None
        super().on_headers_complete()

    def close_if_late(self) -> None:
        """Close a connection on which a head was waited for too long."""
        if self.waits_since is not None and time.monotonic() - self.waits_since > HEAD_SECONDS:
            self.transport.close()
