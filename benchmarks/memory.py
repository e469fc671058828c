"""Peak memory of work on a device, beyond what was held before it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
KIB, GIB = 2**10, 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """The most that ``work`` held at a time, and its result.

    On a GPU what torch allocated. On a CPU the resident size, which knows only memory that was touched; freed memory
    that the process had kept before would hide some, so this belongs into a process of its own.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    _give_back()
    before = _resident("VmRSS")
    result = work()
    return max(0, _resident("VmHWM") - before), result


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable")), None)


def _give_back() -> None:
    """Return freed memory to the system and start the peak anew, where the system can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
    except (AttributeError, OSError):
        return


def _resident(name: str) -> int:
    """A line of this process's status in bytes; elsewhere than on Linux the largest size so far."""
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * KIB for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else KIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
