"""Learning rate schedule, average of the weights, and the choice of precision."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from training.config import Optimization


def learning_rate(step: int, total_steps: int, warmup_steps: int, options: Optimization) -> float:
    """Linear warm-up from 0 to the peak, then cosine decay to the final rate at ``total_steps``."""
    if step < warmup_steps:
        return options.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return options.final_learning_rate + (options.learning_rate - options.final_learning_rate) * cosine


class WeightAverage:
    """Exponential average of a module's parameters and buffers, with a decay that ramps up.

    The decay at update n is min(decay, (1 + n)/(10 + n)), so that early weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors: dict[str, Tensor] = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            self.tensors[name].lerp_(value, weight)


def bf16_is_faster(device: torch.device) -> bool:
    """Measure whether a bf16 matrix product beats float32 here (CPUs without bf16 units are far slower)."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(384, 384, device=device).to(dtype)
        best = math.inf
        for _ in range(4):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return best

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return seconds(torch.bfloat16) < seconds(torch.float32)
