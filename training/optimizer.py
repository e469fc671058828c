"""The optimizer and its schedule, the average of the weights, and the choice of precision."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from model.config import check
from model.flow import Block
from training.config import Optimization
from training.sharding import placed_optimizer

MUON = "muon"
"""Key of Muon's state beside that of AdamW."""


def check_optimizer(options: Optimization) -> None:
    """Refuse Muon where torch is too old to have it; raises ``ValueError``."""
    there = options.optimizer != "muon" or hasattr(torch.optim, "Muon")
    allowed = f"adamw with PyTorch {torch.__version__} (Muon came with 2.9); --set optimizer=adamw takes that"
    check(there, "optimizer", options.optimizer, allowed)


class Optimizer:
    """AdamW for all parameters of a flow, or Muon for the matrices of its layers and AdamW for the rest.

    Muon orthogonalizes each step of a matrix, here to the root mean square that AdamW's steps have (arXiv 2502.16982).
    What enters and leaves a block, embeddings, norms and biases are not what it is for.
    """

    def __init__(self, module: nn.Module, options: Optimization) -> None:
        self._options = options
        matrices = _layer_matrices(module) if options.optimizer == "muon" else []
        taken = {id(matrix) for matrix in matrices}
        self._adamw = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if id(parameter) not in taken],
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self._muon = None
        if matrices:
            self._muon = torch.optim.Muon(
                matrices,
                lr=options.muon_learning_rate,
                weight_decay=options.weight_decay,
                momentum=options.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )

    def zero_grad(self) -> None:
        """Forget the last gradient."""
        for optimizer in self._parts():
            optimizer.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Move the weights by the gradient, where ``rate`` is AdamW's learning rate; Muon's is in proportion to it."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        if self._muon is not None:
            for group in self._muon.param_groups:
                group["lr"] = rate * self._options.muon_learning_rate / self._options.learning_rate
        for optimizer in self._parts():
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and Muon's beside it where there is one."""
        state = self._adamw.state_dict()
        return state if self._muon is None else {**state, MUON: self._muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state with whole tensors."""
        adamw = {key: value for key, value in state.items() if key != MUON}
        self._adamw.load_state_dict(placed_optimizer(adamw, self._adamw))
        if self._muon is not None:
            self._muon.load_state_dict(placed_optimizer(state[MUON], self._muon))

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [self._adamw] if self._muon is None else [self._adamw, self._muon]


def _layer_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weight matrices of attention and MLP in all layers."""
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    layers = [layer for block in blocks for layer in block.layers]
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2]


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
