"""Devices by name, as every command takes them, and what they say when their memory is used up."""

from __future__ import annotations

import torch

HOST_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch's allocator of the host says, on Linux and elsewhere, by a plain ``RuntimeError``."""


def visible_devices() -> list[str]:
    """Every GPU of this machine, or the CPU when there is none."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first GPU, or the CPU when there is none.

    Raises ``ValueError`` for another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device(visible_devices()[0])
    allowed = "auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, allowed is {allowed}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, allowed is {allowed}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, but {torch.cuda.device_count()} CUDA devices are usable here")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows might succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in HOST_MEMORY)
