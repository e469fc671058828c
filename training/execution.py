"""How a flow's steps are computed: compiled, with recomputed activations, in several processes."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.config import check
from model.flow import Flow
from training.config import Execution
from training.processes import Processes
from training.sharding import shard


def check_compiler(execution: Execution) -> None:
    """Refuse to compile where torch finds no compiler of its own for it; raises ``ValueError``."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    found = not execution.compile or any(shutil.which(name) for name in names)
    check(found, "execution.compile", execution.compile, "false where there is no C++ compiler (g++ or clang++)")


def prepare(flow: Flow, execution: Execution, device: torch.device, processes: Processes) -> Any:
    """The module whose call is a training pass of ``flow``; the parameters' names stay the flow's own.

    With several processes the backward pass leaves the mean of their gradients. With shards the flow's parameters are
    other objects afterwards: an optimizer is made of these.
    """
    if execution.recompute:
        for block in flow.blocks:
            for layer in block.layers:
                # On the instance: a wrapping module would change the names of the weights.
                layer.__dict__["forward"] = partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
    if execution.compile:
        for block in flow.blocks:
            for layer in block.layers:
                # Layers are alike: what is compiled for one of them serves all.
                layer.compile()
    if processes.size == 1:
        return flow
    if execution.shard:
        shard(flow, device, processes)
        return flow
    return DistributedDataParallel(flow, broadcast_buffers=False, gradient_as_bucket_view=True)


def part_of_batch(model: Any, *, is_last: bool) -> AbstractContextManager[None]:
    """Around a part's passes: gradients travel between processes once, with the last part."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()
