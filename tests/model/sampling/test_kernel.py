"""The sampling kernel says the same as the modules, in pieces of any size, on memory that can be cut and mended."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.flow import NO_CLASS, Block, Flow
from model.sampling.kernel import BlockKernel, FlowKernel, Memory
from tests.model.conftest import tiny_flow
from tests.model.sampling.cases import VARIANTS, distance, noise

CPU = torch.device("cpu")
ROWS = 4
LABELS = torch.tensor([2, NO_CLASS, 0, 1])
EVERY = [*VARIANTS, {"width": 24, "head_dim": 24}, {"expansion": 3, "layers_per_block": (3, 1, 2)}]


def temperatures(tempered: bool) -> Tensor | None:
    return torch.tensor([1.0, 0.5, 1.0, 3.0]).double() if tempered else None


def expected(block: Block, x_BTD: Tensor, tempered: bool) -> Tensor:
    """α and μ of the patches after the first, (T − 1, B, 2, D), by the module."""
    labels = LABELS if block.class_embedding is not None else torch.full_like(LABELS, NO_CLASS)
    temperature = temperatures(tempered)
    inverse = None if temperature is None else (1 / temperature).view(-1, 1, 1, 1)
    return torch.stack(block.affine(x_BTD, labels, inverse), dim=2).transpose(0, 1)[1:]


def run(kernel: BlockKernel, x_TBD: Tensor, start: int, end: int, memory: Memory, tempered: bool) -> Tensor:
    temperature = temperatures(tempered)
    inverse = None if temperature is None else 1 / temperature
    return kernel.run(x_TBD[start:end], start, kernel.offset(LABELS), inverse, memory)


def fresh(flow: Flow, rows: int = ROWS) -> Memory:
    """Memory in which every value that was not written spoils what reads it."""
    memory = Memory.allocate(flow.config, rows, torch.float64, CPU)
    for held in memory.qkv:
        held.fill_(float("nan"))
    return memory


def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """The whole sequence in pieces."""
    inner = draw(st.sets(st.integers(1, length - 1), max_size=4))
    bounds = [0, *sorted(inner), length]
    return list(pairwise(bounds))


@pytest.mark.parametrize("variant", EVERY, ids=str)
@pytest.mark.parametrize("tempered", [False, True])
def test_steps_and_whole_passes_are_the_module(variant: dict[str, Any], tempered: bool) -> None:
    flow = tiny_flow(**variant)
    x_BTD = noise(flow, range(ROWS))
    length = flow.config.num_patches - 1
    memory = fresh(flow)
    # The blocks use one memory, one after another.
    for kernel in FlowKernel(flow).blocks:
        x_TBD = x_BTD.transpose(0, 1).contiguous()
        right = expected(kernel.block, x_BTD, tempered)
        assert right.abs().max() > 0.01
        assert distance(run(kernel, x_TBD, 0, length, memory, tempered), right) < 1e-12
        steps = [run(kernel, x_TBD, k, k + 1, memory, tempered) for k in range(length)]
        assert distance(torch.cat(steps), right) < 1e-12


@settings(deadline=None, max_examples=25)
@given(data=st.data(), variant=st.sampled_from(EVERY), tempered=st.booleans())
def test_any_pieces_are_the_whole(data: st.DataObject, variant: dict[str, Any], tempered: bool) -> None:
    flow = tiny_flow(**variant)
    x_BTD = noise(flow, range(ROWS))
    x_TBD = x_BTD.transpose(0, 1).contiguous()
    kernel = FlowKernel(flow).blocks[data.draw(st.integers(0, flow.config.num_blocks - 1))]
    pieces = data.draw(st.composite(cuts)(flow.config.num_patches - 1))
    memory = fresh(flow)
    out = torch.cat([run(kernel, x_TBD, start, end, memory, tempered) for start, end in pieces])
    assert distance(out, expected(kernel.block, x_BTD, tempered)) < 1e-12
    # A pass over patches that were there before takes their place: what comes later is not seen.
    start, end = data.draw(st.sampled_from(pieces))
    again = run(kernel, x_TBD, start, end, memory, tempered)
    assert distance(again, out[start:end]) < 1e-12


def test_inputs_and_weights_are_left_alone() -> None:
    flow = tiny_flow()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    x_TBD = noise(flow, range(ROWS)).transpose(0, 1).contiguous()
    given_TBD = x_TBD.clone()
    for kernel in FlowKernel(flow).blocks:
        run(kernel, x_TBD, 0, 15, fresh(flow), True)
    assert torch.equal(x_TBD, given_TBD)
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


def test_blocks_come_in_the_order_of_sampling() -> None:
    flow = tiny_flow()
    kernels = FlowKernel(flow)
    assert [kernel.block for kernel in kernels.blocks] == list(flow.blocks)[::-1]
    assert kernels.dtype == torch.float64
    assert kernels.blocks[0].proj_out.data_ptr() == flow.blocks[2].proj_out.weight.data_ptr(), "no copy"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_near_and_returns_float32(dtype: torch.dtype) -> None:
    flow = tiny_flow()
    x_BTD = noise(flow, range(ROWS))
    memory = Memory.allocate(flow.config, ROWS, dtype, CPU)
    kernel = FlowKernel(flow, dtype).blocks[1]
    out = run(kernel, x_BTD.float().transpose(0, 1).contiguous(), 0, 15, memory, True)
    assert out.dtype == torch.float32
    off = distance(out.double(), expected(kernel.block, x_BTD, True))
    assert 0 < off < (0.05 if dtype == torch.bfloat16 else 1e-5)


class TestMemory:
    FLOW = tiny_flow()

    def prefix(self, length: int) -> tuple[BlockKernel, Tensor, Memory]:
        """A block, sequences, and memory of their first patches."""
        kernel = FlowKernel(self.FLOW).blocks[0]
        x_TBD = noise(self.FLOW, range(ROWS)).transpose(0, 1).contiguous()
        memory = fresh(self.FLOW)
        if length:
            run(kernel, x_TBD, 0, length, memory, False)
        return kernel, x_TBD, memory

    def rest(
        self, kernel: BlockKernel, x_TBD: Tensor, start: int, memory: Memory, labels: Tensor, pieces: int = 1
    ) -> Tensor:
        size = -(-(15 - start) // pieces)
        ends = [min(first + size, 15) for first in range(start, 15, size)]
        out = [
            kernel.run(x_TBD[first:end], first, kernel.offset(labels), None, memory)
            for first, end in zip(range(start, 15, size), ends, strict=True)
        ]
        return torch.cat(out)

    def test_it_has_room_for_the_deepest_block(self) -> None:
        flow = tiny_flow(layers_per_block=(1, 4, 2))
        memory = Memory.allocate(flow.config, 5, torch.float64, CPU)
        assert memory.num_rows == 5
        assert [tuple(held.shape) for held in memory.qkv] == [(16, 5, 3 * 16)] * 4

    @pytest.mark.parametrize("index", [[0, 1, 2, 3], [3], [2, 0], [1, 1, 3], []])
    @pytest.mark.parametrize("pieces", [1, 3, 9])
    def test_selected_rows_go_on_as_they_would_have(self, index: list[int], pieces: int) -> None:
        kernel, x_TBD, memory = self.prefix(6)
        whole = self.rest(kernel, x_TBD, 6, memory, LABELS)
        _, _, memory = self.prefix(6)
        selected = memory.select(torch.tensor(index, dtype=torch.long), 6)
        assert selected.num_rows == len(index)
        if index:
            out = self.rest(kernel, x_TBD[:, index], 6, selected, LABELS[index], pieces)
            assert distance(out, whole[:, index]) < 1e-12
        assert all(held[6:].isnan().all() for held in memory.qkv), "the source is left alone"

    def test_restored_rows_are_those_of_the_source(self) -> None:
        """Patches 4 to 8 of two rows come from a smaller memory, as when rows leave the iterations."""
        kernel, x_TBD, memory = self.prefix(4)
        subset = torch.tensor([3, 1])
        some = memory.select(subset, 4)
        kernel.run(x_TBD[4:9, subset], 4, kernel.offset(LABELS[subset]), None, some)
        others = torch.tensor([0, 2])
        rest = memory.select(others, 4)
        kernel.run(x_TBD[4:9, others], 4, kernel.offset(LABELS[others]), None, rest)
        memory.restore(some, torch.tensor([1]), torch.tensor([1]), 4, 9)
        memory.restore(some, torch.tensor([3]), torch.tensor([0]), 4, 9)
        memory.restore(rest, others, torch.tensor([0, 1]), 4, 9)
        out = self.rest(kernel, x_TBD, 9, memory, LABELS)
        kernel, x_TBD, untouched = self.prefix(9)
        assert distance(out, self.rest(kernel, x_TBD, 9, untouched, LABELS)) < 1e-12

    def test_restoring_touches_only_what_it_is_told(self) -> None:
        _, _, memory = self.prefix(0)
        _, _, source = self.prefix(15)
        memory.restore(source, torch.tensor([2]), torch.tensor([0]), 3, 5)
        for held, other in zip(memory.qkv, source.qkv, strict=True):
            assert torch.equal(held[3:5, 2], other[3:5, 0])
            written = torch.zeros_like(held, dtype=torch.bool)
            written[3:5, 2] = True
            assert torch.equal(~held.isnan(), written)
