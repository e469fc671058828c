"""docs/openai.md stays true: its examples run in their order, against a service at another address."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from model.images import load_image
from tests.service.processes import ServerProcess

GUIDE = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()


def blocks(language: str, server: ServerProcess) -> list[str]:
    """The guide's code in one language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return [block.replace("http://127.0.0.1:8000", server.url) for block in found]


def test_the_python_examples_work(server: ServerProcess, tmp_path: Path) -> None:
    script = "\n".join(blocks("python", server))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    for name in ("boot-0", "boot-1", "coat-0", "coat-1", "coat-2", "coat-done"):
        assert load_image((tmp_path / f"{name}.png").read_bytes()).image.size == (28, 28)
    assert "28x28 98 [7, 8]" in done.stdout
    [shown] = re.findall(r"This prints `(.*?) …`", GUIDE)
    assert shown in done.stdout


def test_the_commands_work(server: ServerProcess, tmp_path: Path) -> None:
    commands = blocks("sh", server)
    assert commands
    for command in commands:
        done = subprocess.run(command.replace("curl -s ", "curl -sSf "), shell=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["output_format"] == "webp"
