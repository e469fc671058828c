"""The unmodified inference client of KServe against the running service.

Its package pulls some 70 others, about 450 MB, so it lives in a virtual environment of its own, beside that of the
tests, where it is found again; and it belongs to `make verify`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.pictures import b64, file, opened
from tests.service.processes import ServerProcess

pytestmark = pytest.mark.long
HERE = Path(__file__).parent
REQUIREMENTS = HERE / "kserve-requirements.txt"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has kserve, of just the versions that are pinned."""
    environment = Path(sys.prefix) / "clients" / "kserve"
    pinned, found = environment / REQUIREMENTS.name, environment / "bin" / "python"
    if not pinned.is_file() or pinned.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([found, "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS], check=True)
        # Last: an installation that was cut off is begun again.
        shutil.copy(REQUIREMENTS, pinned)
    return found


@pytest.fixture(scope="module")
def got(python: Path, server: ServerProcess) -> dict[str, Any]:
    """What the client got."""
    command = [python, HERE / "kserve_calls.py", server.url]
    # Away from here, where no other package is in its way.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=python.parent, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_health(got: dict[str, Any]) -> None:
    assert (got["live"], got["ready"]) == (True, True)
    assert got["models"] == [True, True, False]


def test_numbers_are_those_of_the_native_api(got: dict[str, Any], client: httpx.Client) -> None:
    files = [b64(file(np.array(image[0], np.uint8))) for image in got["images"]]
    body = {"images": files, "class": "Bag", "draws": 2, "seed": 3}
    images = client.post("/v1/score", json=body).json()["images"]
    expected = {name: [image[name] for image in images] for name in ("log_likelihood", "bits_per_dim")}
    assert got["likelihoods"] == [{"id": "mine", "model": "fashion-mnist", **expected}] * 4


def test_images_are_those_of_the_native_api(got: dict[str, Any], client: httpx.Client) -> None:
    images = client.post("/v1/sample", json={"seed": 7, "num_images": 2}).json()["images"]
    assert np.array_equal(np.array(got["sampled"])[:, 0], [opened(image["b64"]) for image in images])
    assert got["dictionary"] == "fashion-mnist:sample"


def test_errors_are_read(got: dict[str, Any]) -> None:
    status, said = got["unknown"]
    assert (status, "model: got 'nothing', served are 'fashion-mnist'" in said) == (404, True)
    status, said = got["wrong"]
    assert (status, "images: this input is missing" in said) == (400, True)
