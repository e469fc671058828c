"""The running service does what its OpenAPI document says, whatever it is sent: schemathesis looks for what it doesn't.

Every route of the document is tried, with examples, with values at the limits of every field, with random requests that
fit the document and others that don't, and with requests that follow from earlier answers. All checks are on but one:
among them that no answer is a 5xx, and that each has a status, content type, headers and content that are documented.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.processes import ServerProcess, wait_until

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
KEY = "tarflow_fuzzing"
KEYS = f'''
[fuzzing]
sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
scopes = ["infer", "admin", "metrics"]
'''
LIMITS = ("--max-images", "4", "--max-draws", "4")
"""Random requests ask for as much as they may."""


@pytest.fixture(scope="module")
def fuzzed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of small models whose state may become anything."""
    log, flags = tmp_path_factory.mktemp("fuzzed") / "log", ("--default-model", "tiny-cond", *LIMITS)
    process = ServerProcess(log, "--models", models, *flags, TARFLOW_KEYS_INLINE=KEYS)
    try:
        yield process.wait_ready()
    finally:
        process.kill()


def _configuration(server: ServerProcess, directory: Path) -> Path:
    """Schemathesis' configuration, with a job that is there."""
    headers = {"authorization": f"Bearer {KEY}", "prefer": "respond-async"}
    with server.client() as client:
        job = client.post("/v1/sample", json={"class": "cat"}, headers=headers).json()["id"]
        wait_until(lambda: client.get(f"/v1/jobs/{job}", headers=headers).json()["state"] == "completed", "it is done")
    path = directory / CONFIGURATION.name
    path.write_text(CONFIGURATION.read_text().replace("JOB", job))
    return path


@pytest.mark.parametrize("examples", [10, pytest.param(50, marks=pytest.mark.long)])
def test_every_answer_is_documented(fuzzed: ServerProcess, tmp_path: Path, examples: int) -> None:
    worker, configuration = fuzzed.worker(), _configuration(fuzzed, tmp_path)
    command = [SCHEMATHESIS, "--config-file", configuration, "run", f"{fuzzed.url}/openapi.json", "--checks", "all"]
    # Deleting a job cancels it; it is still there to tell of that.
    command += ["--exclude-checks", "use_after_free"]
    command += ["--header", f"Authorization: Bearer {KEY}"]
    command += ["--max-examples", str(examples), "--generation-deterministic", "--continue-on-failure", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
    assert "Traceback" not in fuzzed.log
    assert fuzzed.worker() == worker
