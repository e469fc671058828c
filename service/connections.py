"""HTTP connections as uvicorn's, with bounds on what comes before a request: its head is not read without end."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.envelope import STATUS, envelope_of
from service.api.security_headers import HEADERS
from service.errors import MalformedRequest, ServiceError, TooManyHeaders

MOST_HEAD_BYTES = 64 * 1024
"""Of the request line and the headers; what comes in one read is looked at in one piece, so it may be somewhat more."""
HEAD_SECONDS = 30.0
"""Until the head is there, from its first byte; and until that, from the connection's beginning."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes, self._in_body = 0, False
        self.url = b""
        self.waits_since: float | None = None
        """Since when a head is waited for, by the monotonic clock; None while there is none to come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected and is expected to ask."""
        super().connection_made(transport)
        self.waits_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head has grown too large."""
        # The end of a head and every part of a body set it back: what is counted is neither.
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        answered = self.cycle is not None and self.cycle.response_complete
        if answered and self.waits_since is None and self.timeout_keep_alive_task is None:
            # uvicorn's timer ends with the first byte behind an answer, even of a body that nobody reads any more.
            self.waits_since = time.monotonic()
        if self._head_bytes > MOST_HEAD_BYTES:
            if self._in_body:
                self.transport.close()
            else:
                self._refuse(TooManyHeaders(f"the request's head is larger than {MOST_HEAD_BYTES} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; not those behind a body, for which nobody asks."""
        if not self._in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A part of the body is there."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is there."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the envelope like all else."""
        self._refuse(MalformedRequest(f"this is not HTTP: {msg}", code="malformed_request"))

    def _refuse(self, error: ServiceError) -> None:
        """Answer before there is a request, and hang up."""
        # As far as its path has come.
        envelope = envelope_of(self.url.partition(b"?")[0].decode("latin-1"))
        status = envelope.status.get(type(error), STATUS[type(error)])
        content = json.dumps(envelope.body(error)).encode()
        headers = HEADERS | {
            b"content-type": b"application/json",
            b"content-length": b"%d" % len(content),
            b"connection": b"close",
            b"x-request-id": secrets.token_hex(8).encode(),
        }
        lines = [b"HTTP/1.1 %d Refused" % status, *(b": ".join(pair) for pair in headers.items())]
        self.transport.write(b"\r\n".join([*lines, b"", content]))
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.waits_since, self._head_bytes = time.monotonic(), 0

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self.waits_since, self._head_bytes, self._in_body = None, 0, True
        super().on_headers_complete()

    def close_if_late(self) -> None:
        """Close a connection on which a head was waited for too long."""
        if self.waits_since is not None and time.monotonic() - self.waits_since > HEAD_SECONDS:
            self.transport.close()
