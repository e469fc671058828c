"""The processes of one run: alone, or as ``torchrun`` starts them, one for each GPU.

Tensors that are on the device travel by its own backend (NCCL on GPUs); everything else, and everything on a CPU, by
gloo. What one process is refused with, all are, so that none waits for one that is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from training.commands import ToldElsewhere

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first one draws samples and writes while they wait."""
Value = TypeVar("Value")


class ProcessError(ValueError):
    """The processes of a run cannot work together; the message says why."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Each takes an equal part of every batch, and only the first one writes."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Number of this process among those of its host, from 0."""
    control: Any = None
    """The group over gloo for everything that is no tensor on the device; None for a single process."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes of a tensor on the device."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, value: Value) -> list[Value]:
        """Each process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Value) -> Value:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set in any of them."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(counts, group=self.control)
        return [count > 0 for count in counts.tolist()]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """What is inside, the first process does alone; then the first one of every other host, which finds what that
        made where they share a disk; at last the others, which find what was made on their own host."""
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.gather(None)
        try:
            yield
        finally:
            for _ in range(turn, 2):
                self.gather(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """When one process is refused something inside, all are; the first one says what, and where."""
        failure: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        messages = self.gather(None if failure is None else str(failure))
        told = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if not told:
            return
        if not self.is_first:
            raise ToldElsewhere(told[0][1]) from failure
        if failure is not None:
            raise failure
        rank, message = told[0]
        raise ProcessError(f"process {rank} of {self.size}: {message}")


ALONE = Processes()
"""A run in a single process."""


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ProcessError(f"{name}: got {text!r}, allowed is a number, as torchrun sets it")
    return int(text)


def local_device(device: torch.device) -> torch.device:
    """The device of this process: with several on a host, each has a GPU of its own."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    index, count = _number("LOCAL_RANK"), torch.cuda.device_count()
    if index >= count:
        raise ProcessError(f"--nproc-per-node: this host has {count} GPUs, but torchrun started a process {index}")
    return torch.device("cuda", index)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes that ``torchrun`` started, if it did; raises :class:`ProcessError`."""
    if "WORLD_SIZE" not in os.environ or _number("WORLD_SIZE") == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    rank, size = dist.get_rank(), dist.get_world_size()
    # Where another launcher does not say which processes share a host, all wait for the first one.
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    processes = Processes(rank, size, local_rank, cast("Any", dist.new_group(backend="gloo", timeout=PATIENCE)))
    try:
        yield processes
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise ProcessError(
            f"process {rank} of {size} lost another one, which has ended; its own message says why. "
            "The same command continues the run from its last checkpoint"
        ) from error
    # After an error there is nobody to take leave of.
    dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error is what torch's backends raise when a peer is gone; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "Connection closed" in str(error)
