"""Benchmarks run as programs are, but in this process, which starts faster."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

ENVIRONMENT = {"device", "hardware", "threads", "torch", "python", "system"}


def run(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: str) -> None:
    """The program's ``main`` with these arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: ModuleType, *arguments: str
) -> dict[str, Any]:
    """What it prints with --json: one document and nothing else."""
    run(monkeypatch, module, *arguments, "--json")
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(content["environment"]) == ENVIRONMENT
    assert content["benchmark"] == module.__name__.rpartition(".")[2]
    return content
