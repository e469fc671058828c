"""What a worker process answers beside its work: whether it is ready, and its metrics."""

from __future__ import annotations

import socket

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from service.worker import operations
from service.worker.operations import answer_operations
from service.worker.watchdog import Watchdog
from tests.service.processes import PATIENCE, metric, wait_until


def test_ready_is_who_has_begun_and_was_heard_lately() -> None:
    registry, watchdog = CollectorRegistry(), Watchdog(600)
    Counter("tarflow_images", "Images", registry=registry).inc(3)
    lately = 0.2
    url = f"http://127.0.0.1:{answer_operations(0, registry, lambda: watchdog.heard_within(lately))}"
    # Loading: alive, with metrics, and not ready, whatever is heard.
    watchdog.alive()
    assert httpx.get(f"{url}/healthz").json() == {"status": "alive"}
    assert metric(httpx.get(f"{url}/metrics").text, "tarflow_images_total") == 3
    refused = httpx.get(f"{url}/readyz")
    assert (refused.status_code, refused.json()) == (503, {"status": "not_ready"})
    watchdog.start()
    try:

        def is_ready(code: int) -> bool:
            return httpx.get(f"{url}/readyz").status_code == code

        def is_ready_when_heard() -> bool:
            watchdog.alive()
            return is_ready(200)

        wait_until(is_ready_when_heard, "it is ready")
        wait_until(lambda: is_ready(503), "it is not, since nothing more was heard")
        assert httpx.get(f"{url}/healthz").status_code == 200
        wait_until(is_ready_when_heard, "it is ready again")
    finally:
        watchdog.stop()
    # Who leaves is not ready.
    lately = 600
    watchdog.alive()
    assert is_ready(503)


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            answer_operations(taken.getsockname()[1], CollectorRegistry(), lambda: True)


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(operations._Quiet, "timeout", 0.1)
    port = answer_operations(0, CollectorRegistry(), lambda: True)
    for said in (b"", b"GET /healthz HT"):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as slow:
            slow.sendall(said)
            assert slow.recv(1) == b""
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    assert capfd.readouterr().err == ""
