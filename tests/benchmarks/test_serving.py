"""The benchmark of deployments: what it makes of a load's answers, and that it runs with real processes."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from typing import Any

import pytest

from benchmarks import overhead, serving
from benchmarks.load import Answers, Load, apply, percentile
from tests.benchmarks.programs import document


def test_throughput_does_not_count_what_began_before() -> None:
    """Answers that come in batches of four a second are four a second, however many there are."""
    ended = [float(second) for second in range(1, 11) for _ in range(4)]
    found = Answers(sent=[0.0] * 40, seconds=ended, statuses=[200] * 40)
    assert found.throughput == pytest.approx(4)
    assert Answers(sent=[0.0] * 4, seconds=[2.0] * 4, statuses=[200] * 4).throughput == pytest.approx(2)
    assert Answers(sent=[0.0], seconds=[1.0], statuses=[503]).throughput == 0


def test_answers_are_told_apart() -> None:
    found = Answers(sent=[0.0, 1.0, 2.0, 3.0], seconds=[0.4, 0.3, 0.2, 0.1], statuses=[200, 429, 200, 0])
    assert found.of() == [0.2, 0.4]
    assert found.of(after=1.5) == [0.2]
    assert found.of(429) == [0.3]
    assert found.of(None) == [0.1, 0.3]
    assert percentile(list(map(float, range(100))), 0.99) == 99
    assert percentile(list(map(float, range(100))), 0.5) == 50


def test_a_connection_that_the_service_has_closed_is_not_used_again() -> None:
    """As services do with those that have had nothing to say for a while."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while (line := self.rfile.readline()).strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            found = apply(Load(urls=[url], kind="score", seconds=1.0, rate=5.0))
        finally:
            server.shutdown()
    assert found.statuses == [200] * 5


def measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[tuple[str, str, str], Any]:
    monkeypatch.setattr(sys, "argv", ["serving", *flags, "--json"])
    serving.main()
    rows = json.loads(capsys.readouterr().out)["results"]
    return {(row["measurement"], row["deployment"], row["figure"]): row["value"] for row in rows}


@pytest.mark.long
def test_every_measurement_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """How fast it is, is not this test's business; that all were answered is."""
    found = measured(monkeypatch, capsys, "--seconds", "8")
    for deployment in ("serve", "api + worker", "api + worker, not preempting"):
        assert found["latency", deployment, "scores refused idle"] == 0
        assert found["latency", deployment, "samples/s beside scores"] > 0
    for deployment in ("serve", "2 api + 2 worker"):
        assert found["batching", deployment, "images/s"] > 0
        assert found["overload", deployment, "goodput at 10x"] > 0
        assert found["overload", deployment, "refusals"] > 0
        assert found["overload", deployment, "neither drawn nor refused"] == 0


@pytest.mark.long
def test_memory_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten minutes of moderate load: no process grows by more than 5% after the first minute, and none errs."""
    found = measured(monkeypatch, capsys, "--only", "soak", "--minutes", "10", "--soaked", "2 api + 2 worker")
    grown = {name: value for name, value in found.items() if name[2].endswith("grown after the first minute")}
    print(found)
    # Two APIs, two supervisors with a worker each, and Redis.
    assert len(grown) == 7
    assert max(grown.values()) < 5
    assert found["soak", "2 api + 2 worker", "not answered well"] == 0
    # Some refusals are right where others take the machine's time meanwhile; a queue that is always full is no soak.
    assert found["soak", "2 api + 2 worker", "refused"] < 0.05 * found["soak", "2 api + 2 worker", "answered"]


@pytest.mark.long
def test_the_overhead_of_http(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--concurrency", "1,3", "--seconds", "1", "--rounds", "1"]
    found = document(monkeypatch, capsys, overhead, *flags)["results"]
    assert [row["concurrency"] for row in found] == [1, 3]
    for row in found:
        assert row["calls"] > 0
        assert row["requests"] > 0
        assert 0 < row["in_process_p50_ms"] <= row["in_process_p99_ms"]
        assert 0 < row["http_p50_ms"] <= row["http_p99_ms"]
