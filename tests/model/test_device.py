"""Device names: what auto means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from model.device import resolve_device, visible_devices


@pytest.mark.parametrize(("gpus", "first"), [(0, "cpu"), (1, "cuda:0"), (3, "cuda:0")])
def test_auto_is_the_first_gpu_or_the_cpu(monkeypatch: pytest.MonkeyPatch, gpus: int, first: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device("auto") == torch.device(first)
    assert visible_devices() == ([f"cuda:{i}" for i in range(gpus)] or ["cpu"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("tpu", "allowed is auto, cpu"), ("meta", "allowed is auto, cpu"), ("cuda:2", "2 CUDA devices"), ("", "allowed")],
)
def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=reason):
        resolve_device(name)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
