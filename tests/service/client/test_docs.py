"""docs/client.md stays true: its examples are executed, in its order."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.service.processes import TARFLOW, ServerProcess, environment

PAGE = (Path(__file__).parents[3] / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_example_works(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for language, code in EXAMPLES:
        here = code.replace("http://127.0.0.1:8000", server.url)
        if language == "python":
            exec(compile(here, "docs/client.md", "exec"), known)  # noqa: S102
            continue
        path = f"{TARFLOW.parent}:{environment()['PATH']}"
        command = ["bash", "-euo", "pipefail", "-c", here]
        done = subprocess.run(command, env=environment(PATH=path), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{here}\n{done.stdout}\n{done.stderr}"
    assert [language for language, _ in EXAMPLES].count("python") >= 8
    assert {path.name for path in tmp_path.iterdir()} == {"boot.png", "bags.png", "overlays"}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert target.startswith("https://") or (Path(__file__).parents[3] / "docs" / target).is_file(), target
