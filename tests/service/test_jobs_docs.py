"""docs/jobs.md stays true: its commands are executed, in their order, as one session of a shell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from model.images import load_image
from service.api.jobs.streaming import KEEP_ALIVE_SECONDS, MOST_RESULT_BYTES
from service.settings import Settings
from tests.service.processes import PATIENCE, ServerProcess

PAGE = Path(__file__).parents[2] / "docs" / "jobs.md"
ADDRESS = "http://127.0.0.1:8000"


def test_the_commands_do_what_the_page_says(server: ServerProcess, tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    # -f makes curl fail on an HTTP error.
    script = "set -euo pipefail\n" + "".join(blocks).replace("curl -s", "curl -fsS").replace(ADDRESS, server.url)
    assert ADDRESS not in script
    assert script.count("curl -fsS") == script.count("curl") == 7
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert load_image((tmp_path / "coats.png").read_bytes()).image.mode == "L"
    kinds = re.findall(r"event: (\w+)", done.stdout)
    assert [kind for kind in kinds if kind not in ("progress", "preview")] == ["queued", "started", "completed"] * 2
    assert kinds.count("preview") == 2
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_its_figures_are_those_of_the_service() -> None:
    text = PAGE.read_text()
    fields = Settings.model_fields
    assert {fields[name].default for name in ("job_timeout", "result_seconds")} == {3600.0}
    assert text.count("(an hour)") == 2
    assert f"more than {MOST_RESULT_BYTES // 2**20} MiB" in text
    assert f"every {KEEP_ALIVE_SECONDS:g} seconds" in text
