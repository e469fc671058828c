"""Every benchmark runs, and with --json prints one JSON document and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import denoising, sampling

ROOT = Path(__file__).parents[2]
SMALL_SAMPLING = ["sampling", "--random", "14-64-2-1", "--batch", "1,3", "--repeats", "1"]
SMALL_DENOISING = ["denoising", "--image-size", "16", "--width", "64", "--layers", "1", "--rows", "2"]
ENVIRONMENT = {"device", "hardware", "threads", "torch", "python", "system"}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def document(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    assert set(content["environment"]) == ENVIRONMENT
    assert content["benchmark"] == arguments[0]
    return content


def test_sampling() -> None:
    content = document(*SMALL_SAMPLING)
    assert content["model"] == "random 14-64-2-1"
    results = content["results"]
    assert [(row["batch"], row["guided"]) for row in results] == [(1, False), (1, True), (3, False), (3, True)]
    for row in results:
        assert row["images_per_second"] > 0
        assert row["published_images_per_second"] > 0
        assert row["ratio"] > 0
        assert row["max_difference"] < 1e-4


def test_denoising() -> None:
    content = document(*SMALL_DENOISING)
    assert content["size"] == {"blocks": 8, "layers": 1, "width": 64, "image_size": 16, "rows": 2}
    assert content["max_gradient_difference"] < 1e-4 * max(1, content["max_gradient"])
    assert isinstance(content["within_limit"], bool)


def run_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.parametrize(
    ("module", "arguments"), [(sampling, SMALL_SAMPLING), (denoising, SMALL_DENOISING)], ids=["sampling", "denoising"]
)
def test_without_json_a_table_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: ModuleType, arguments: list[str]
) -> None:
    run_here(monkeypatch, module, *arguments[1:])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "ratio" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "nowhere"], "nowhere: no such directory (for random weights give --random)"),
        (["--random", "4-100-4-4"], "width: got 100"),
        (["--random", "big"], "--random"),
        (["--random", "--batch", "0"], "--batch"),
        (["--random", "--repeats", "0"], "--repeats: at least 1"),
    ],
)
def test_wrong_arguments_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, sampling, *arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.out == ""
