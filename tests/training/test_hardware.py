"""The card's line about the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import hardware


def test_a_processor_is_described_by_its_model_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Processor 9000\nflags\t: many\n")
    monkeypatch.setattr(hardware, "_CPU_INFO", info)
    assert hardware.describe_hardware(torch.device("cpu")) == "A Processor 9000, 1 thread"
    torch.set_num_threads(2)
    assert hardware.describe_hardware(torch.device("cpu")).endswith("2 threads")


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "missing")
    assert hardware.describe_hardware(torch.device("cpu")).endswith("1 thread")
