"""Wall-clock time of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def seconds(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """How long ``work`` took, what it left in the device's queue included, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
