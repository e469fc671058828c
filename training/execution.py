"""How a flow's steps are computed: compiled, with recomputed activations, in several processes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.flow import Flow
from training.config import Execution
from training.processes import Processes


def prepare(flow: Flow, execution: Execution, processes: Processes) -> Any:
    """The module whose call is a training pass of ``flow``; the parameters and their names stay the flow's own.

    With several processes the backward pass leaves the mean of their gradients.
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
            block.compile()
    if processes.size == 1:
        return flow
    return DistributedDataParallel(flow, broadcast_buffers=False, gradient_as_bucket_view=True)
