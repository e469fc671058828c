"""The state directory belongs to one service at a time, and is free again however that ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from service.state import LOCK, claimed
from tests.service.conftest import Start
from tests.service.processes import tarflow


def test_a_second_service_refuses_to_start(models: Path, tmp_path: Path, start: Start) -> None:
    state = tmp_path / "state"
    first = start("--models", models, "--state", state)
    assert first.url
    second = tarflow("serve", "--models", models, "--port", "0", "--state", state)
    assert second.returncode == 2, second.stderr
    output = second.stdout + second.stderr
    for word in ("--state", "TARFLOW_STATE", f"process {first.process.pid}"):
        assert word in output
    assert "Traceback" not in output
    assert first.get("/healthz").status_code == 200
    # Killed, so that it cannot tidy up; its worker may still be there.
    first.stop(signal.SIGKILL)
    third = start("--models", models, "--state", state)
    assert third.wait_ready().stop() == 0
    with claimed(state):
        pass


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "state"):
        with pytest.raises(ValueError, match="--state"), claimed(tmp_path / "new" / "state"):
            pass
        with claimed(tmp_path):
            pass
    with claimed(tmp_path / "new" / "state"):
        assert [path.name for path in (tmp_path / "new" / "state").iterdir()] == [LOCK]


def test_a_directory_that_cannot_be_written_is_no_reason_not_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with claimed(tmp_path / "file"):
        assert "cannot be locked" in caplog.text
