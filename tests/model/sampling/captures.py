"""What stands for ``torch.cuda.graph`` on the CPU, and samplers that use it.

``record`` notes the operations of a step with their tensors; to repeat it is to do them again on the same
tensors, without any of the step's Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.flow import Flow
from model.sampling.graphs import Capture, DecodeGraphs, Step
from model.sampling.sampler import Sampler
from tests.model.sampling.cases import Case, case_of, mixed_options, tough_flow

FLOW = tough_flow(2.0, image_size=12)
"""36 patches: five lengths, of which steps use all."""
LENGTHS = [8, 16, 24, 32, 40]


class Recorder(TorchDispatchMode):
    """Notes every operation. Values for the host or for another device are none that a graph could repeat."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert all(x is None or isinstance(x, Tensor) for x in tree_leaves(result)), f"{func} asks the device"
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(x.device.type == self._device for x in tensors), f"{func} crosses devices"
        self.calls.append((func, args, kwargs or {}, result))
        return result


def record(step: Step) -> Step:
    """What a graph is, on the CPU."""
    with Recorder("cpu") as recorder:
        step()

    def repeat() -> None:
        for func, args, kwargs, result in recorder.calls:
            for held, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if held is not None and held.data_ptr() != new.data_ptr():
                    held.copy_(new)

    return repeat


class CountingCapture:
    """:func:`record`, and how often."""

    def __init__(self) -> None:
        self.captured = self.repeated = 0

    def __call__(self, step: Step) -> Step:
        repeat = record(step)
        self.captured += 1

        def counted() -> None:
            self.repeated += 1
            repeat()

        return counted


def graphed(flow: Flow, capture: Capture = record, **options: Any) -> Sampler:
    """A sampler with captured steps."""
    sampler = Sampler(flow)
    sampler.graphs = DecodeGraphs(flow.config, lambda: capture, **options)
    return sampler


def mixed(count: int = 8, first_seed: int = 0, flow: Flow = FLOW) -> Case:
    options = mixed_options(len(flow.blocks)) * (1 + count // 8)
    return case_of(flow, options[:count], first_seed=first_seed)
