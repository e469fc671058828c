"""docs/own-checkpoint.md stays true: its commands run in their order, as one session of a shell in the clone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.bundle import read_bundle
from model.images import load_image
from tests.faults.cluster import free_port
from tests.service.processes import PATIENCE, environment

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-checkpoint.md").read_text()


@pytest.mark.long
def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    for entry in ("tests", "model", "service"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 11
    commands = "".join(blocks).replace("8004", str(free_port()))
    # -f makes curl fail on an HTTP error, and -w ends what it prints.
    commands = commands.replace("curl -s ", r"curl -fsSw '\n' ")
    assert commands.count("curl -fsSw") == commands.count("curl ") == 5
    # What it leaves running ends with it, as with a terminal.
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p); wait' EXIT\n{commands}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(PATH=path, TARFLOW_STATE=str(tmp_path / "state"), TARFLOW_DEVICE="cpu"),
    )
    try:
        printed, log = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, printed + log
    bundle = read_bundle(tmp_path / "models" / "tiny")
    assert bundle.config.class_names == ("cat", "dog", "horse", "fox", "owl")
    assert bundle.convergence is not None
    assert bundle.calibration is not None
    assert "not checked whether tiny was trained on these images" in printed
    assert load_image((tmp_path / "grid.png").read_bytes()).image.mode == "RGB"
    certificates = re.search(r"^\[\(.*\)\]$", printed, re.MULTILINE)
    assert certificates is not None
    assert certificates[0].count("True") == 2
    [verdict] = [json.loads(line) for line in re.findall(r'^\{.*"p_value".*\}$', printed, re.MULTILINE)]
    assert verdict["images"][0]["is_anomaly"] is True
    tuned = read_bundle(tmp_path / "models" / "tuned")
    assert tuned.config.training["from"]["model_id"] == bundle.model_id
    # The service says so of what it serves.
    assert tuned.model_id in printed
    described = next(line for line in printed.splitlines() if '"recommended"' in line)
    assert json.loads(described)["anomaly"]["calibrated"] is True


def test_links_lead_somewhere() -> None:
    for name in ("own-checkpoint", "deployment", "troubleshooting"):
        page = (ROOT / "docs" / f"{name}.md").read_text()
        for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", page):
            assert target.startswith("https://") or (ROOT / "docs" / target).exists(), (name, target)
            if anchor:
                text = (ROOT / "docs" / (target or f"{name}.md")).read_text()
                headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, (name, target, anchor)
