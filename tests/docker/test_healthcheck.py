"""The images' healthcheck asks the service in its own container, and nobody else."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.docker.compose import ROOT
from tests.faults.cluster import free_port


class Service(BaseHTTPRequestHandler):
    """Well at /healthz, not ready at /readyz."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()
        self.wfile.write(self.path.encode())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where such a service listens."""
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def check(port: int, path: str) -> subprocess.CompletedProcess[str]:
    nobody = f"http://127.0.0.1:{free_port()}"
    return subprocess.run(
        [sys.executable, "-I", ROOT / "docker" / "healthcheck.py", "TARFLOW_PORT", path],
        env={"TARFLOW_PORT": str(port), "http_proxy": nobody, "HTTP_PROXY": nobody},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("path", "status", "printed"), [("/healthz", 0, "200 /healthz"), ("/readyz", 1, "503 /readyz")]
)
def test_it_says_what_the_service_says(port: int, path: str, status: int, printed: str) -> None:
    done = check(port, path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (status, printed, "")


def test_it_fails_where_nobody_answers() -> None:
    done = check(port := free_port(), "/healthz")
    assert done.returncode == 1
    assert done.stderr.startswith(f"port {port}: ")
    assert "Traceback" not in done.stderr
