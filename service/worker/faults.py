"""What goes wrong on a device, and what that means for those who come after."""

from __future__ import annotations

import gc
import logging

import torch

from model.device import is_out_of_memory
from service.jobs import EXIT_DEVICE_LOST

log = logging.getLogger(__name__)

BATCH_FAULTS = (RuntimeError, ValueError, MemoryError)
"""What torch raises on a batch it cannot do; anything else is a fault of ours and ends the process."""


class DeviceLost(SystemExit):
    """The device can do nothing more for this process: the process ends, and others do its work."""

    def __init__(self) -> None:
        super().__init__(EXIT_DEVICE_LOST)


def works(device: torch.device) -> bool:
    """Whether a device still computes: after some errors, such as an illegal address, every call fails."""
    try:
        return bool((torch.zeros(1, device=device) + 1).item() == 1)
    except RuntimeError as error:
        # Without memory for a single value nothing can be said.
        return is_out_of_memory(error)


def check_device(device: torch.device) -> None:
    """Raise :class:`DeviceLost` unless the device still works."""
    if not works(device):
        log.critical("%s does not work any more; this process ends", device)
        raise DeviceLost


def make_room(device: torch.device) -> None:
    """Give back what a failed batch has left behind; not to be called while its exception is handled."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
