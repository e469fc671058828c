"""How many rows of sampling the memory has room for: their keys and values are by far the most of what they take."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from service.worker.loading import GUIDED_PASSES, LoadedModel

DEVICE_SHARE = 0.8
"""Of what is free on a GPU: the rest is for parallel passes and what the allocator cannot use."""
HOST_SHARE = 0.25
"""Of what is free on the host: other processes, and other workers, want some, too."""
COPIES = 2
"""When rows leave, the memory of those that stay is copied before the old one is freed."""
STATES = 8
"""Images that are kept of a row on the way: latents, inputs and outputs of blocks, iterates."""
VALUE_BYTES = 4
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
UNKNOWN_FREE = 4 * 2**30
"""Where the host does not tell."""
MEASURE_SECONDS = 1.0


def row_bytes(model: LoadedModel) -> int:
    """Memory of a guided row with its trajectory while it is sampled."""
    config = model.flow.config
    memory = GUIDED_PASSES * COPIES * max(config.layer_counts) * 3 * config.width
    states = (STATES + 2 * config.num_blocks) * config.patch_dim
    return VALUE_BYTES * config.num_patches * (memory + states)


def free_bytes(device: torch.device) -> int:
    """Memory that new work could have on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return min(_host_free(), _cgroup_free())


def _host_free() -> int:
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return UNKNOWN_FREE


def _cgroup_free() -> int:
    """What the container may still take; files in its cache can be taken back."""
    try:
        most = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, most - used + int(statistics["inactive_file"]))
    except (OSError, LookupError, ValueError):
        return _host_free()


class Room:
    """What sampling may take of a device's memory; measured again when nothing is being sampled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._share = DEVICE_SHARE if device.type == "cuda" else HOST_SHARE
        self._measured = 0.0
        self.measure()

    def measure(self) -> None:
        """Ask for what is free; to be called while no rows are in flight."""
        if time.monotonic() - self._measured > MEASURE_SECONDS:
            self._measured = time.monotonic()
            self._bytes = self._share * free_bytes(self._device)

    def rows(self, model: LoadedModel) -> int:
        """Rows of a model that all of it has room for; at least one, which may prove too large."""
        return max(1, int(self._bytes // row_bytes(model)))
