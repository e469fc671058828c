"""What the API side reads of the model starts without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["model", "model.config", "model.images", "model.bundle"])
def test_no_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules, 'safetensors' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
