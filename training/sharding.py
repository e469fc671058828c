"""Weights, and all that has their shapes, spread over the processes of a run (FSDP2), and made whole again.

A checkpoint has whole tensors: any number of processes continues it, with or without shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.flow import Flow
from training.processes import Processes


def shard(flow: Flow, device: torch.device, processes: Processes) -> None:
    """Leave each process its part of every weight; a block's weights are gathered while the block computes."""
    mesh = init_device_mesh(device.type, (processes.size,))
    for module in (*flow.blocks, flow):
        sharded = fully_shard(module, mesh=mesh)
        if device.type == "cpu":
            # Gloo knows no mean: sums are divided.
            sharded.set_force_sum_reduction_for_comms(True)


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process has a part, or one that is whole already; all processes call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(content: Any, *, keep: bool) -> Any:
    """Nested mappings and lists with every tensor whole; all processes call this together.

    Parts are gathered one after the other and kept in the host's memory, or dropped where they are not wanted: a
    device never has more than one whole tensor.
    """
    if isinstance(content, dict):
        return {key: gathered(value, keep=keep) for key, value in content.items()}
    if isinstance(content, list):
        return [gathered(value, keep=keep) for value in content]
    if isinstance(content, DTensor):
        full = content.full_tensor()
        return full.cpu() if keep else None
    return content


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` is: on its device, or this process's part of it."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    # Every process has the whole of it already: nothing travels.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def placed_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with its averages placed as the parameters that they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = {
        number: {
            name: placed(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": by_number}
