"""The vectors of tests/reference/autoencoder-kl are what the package diffusers itself computes, today as when made.

Nothing but this test needs the package, so it lives in a virtual environment of its own, beside that of the tests,
whose torch it borrows; and it belongs to `make verify`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.codecs.weights import DIFFUSERS_WEIGHTS, read_autoencoder

pytestmark = pytest.mark.long
HERE = Path(__file__).parent
VECTORS = HERE.parents[1] / "reference" / "autoencoder-kl"
REQUIREMENTS = HERE / "diffusers-requirements.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package writes now."""
    environment = Path(sys.prefix) / "clients" / "diffusers"
    pinned, python = environment / REQUIREMENTS.name, environment / "bin" / "python"
    if not pinned.is_file() or pinned.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        # Every package is named, so that none brings a torch of its own.
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", REQUIREMENTS]
        subprocess.run(command, check=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        found = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        (Path(found) / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # Last: an installation that was cut off is begun again.
        shutil.copy(REQUIREMENTS, pinned)
    out = tmp_path_factory.mktemp("diffusers")
    home = {"PATH": "", "HOME": str(out), "HF_HUB_OFFLINE": "1"}
    command = [python, HERE / "diffusers_reference.py", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out, env=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(path.name for path in VECTORS.iterdir())
    return out


@pytest.mark.parametrize("name", sorted(path.name for path in VECTORS.iterdir()))
def test_the_vectors_are_those_of_the_package(made: Path, name: str) -> None:
    for file in (DIFFUSERS_WEIGHTS, "expected.safetensors"):
        now, stored = load_file(made / name / file), load_file(VECTORS / name / file)
        assert now.keys() == stored.keys()
        for tensor in now:
            torch.testing.assert_close(now[tensor], stored[tensor], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(path.name for path in VECTORS.iterdir()))
def test_ours_computes_what_the_package_computes_now(made: Path, name: str) -> None:
    codec, expected = read_autoencoder(made / name), load_file(made / name / "expected.safetensors")
    torch.testing.assert_close(codec.encode(expected["images"]), expected["latents"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.decode(expected["given"]), expected["decoded"], atol=1e-5, rtol=1e-5)
