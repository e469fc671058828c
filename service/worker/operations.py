"""What Prometheus and orchestrators ask a worker process: /metrics, /healthz and /readyz, on a port of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

READY, ALIVE, NOT_READY = ({"status": status} for status in ("ready", "alive", "not_ready"))


class _Quiet(WSGIRequestHandler):
    """Nobody wants to read of every scrape, nor of one that broke off or never came."""

    timeout = 10.0
    """Seconds without a word from who has connected: each connection has a thread."""

    def handle(self) -> None:
        """Answer one request, if it comes."""
        with suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        """Say nothing."""


def answer_operations(port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> int:
    """Answer in threads, on all addresses, until the process ends; returns the port, a free one where it is 0.

    /readyz is 200 while ``is_ready`` says so, and else 503; /healthz is 200. Every other path has the metrics. Raises
    ``OSError`` where the port is taken.
    """
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] not in ("/healthz", "/readyz"):
            return metrics(environ, start_response)
        content = ALIVE if environ["PATH_INFO"] == "/healthz" else READY if is_ready() else NOT_READY
        status = HTTPStatus.SERVICE_UNAVAILABLE if content is NOT_READY else HTTPStatus.OK
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
        return [json.dumps(content).encode()]

    server = make_server("", port, answer, server_class=ThreadingWSGIServer, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, name="operations", daemon=True).start()
    return server.server_port
