"""Where commands write: a run's directory is one process's at a time, whatever becomes of that process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.training.conftest import run_command
from training.destinations import LOCK, held

ROOT = Path(__file__).parents[2]
HOLD = "import sys; from pathlib import Path; from training.destinations import held\n"
HOLD += "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@contextmanager
def another_process(out: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the directory until it is killed."""
    command = [sys.executable, "-c", HOLD, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_run_that_another_process_is_training_is_refused_until_that_ends(
    preset_file: Path, idx_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = ("train", preset_file, "--data", idx_data, "--out", out, "--epochs", 1)
    with another_process(out) as process:
        error = run_command(*train, status=2)
        assert (
            error
            == f"Error: out: got {out}, which another process is training into, allowed is a directory of its own\n"
        )
        assert [path.name for path in out.iterdir()] == [LOCK]
        # Killed, it can tidy nothing up.
        process.kill()
        process.wait()
        assert "finished 5 steps" in run_command(*train)
    assert "continuing at step 5 of 5" in run_command(*train)


def test_a_directory_that_nothing_was_written_into_is_gone_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held(out):
        assert out.is_dir()
    assert not out.exists()
    out.mkdir()
    with held(out), pytest.raises(ValueError, match="another process is training into"), held(out):
        pass
    assert out.is_dir()
    with held(tmp_path / "other"):
        (tmp_path / "other" / "file").write_text("kept")
    assert (tmp_path / "other" / "file").read_text() == "kept"
