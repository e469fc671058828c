"""The decoding step with static shapes is a step of the kernels, and one that a graph can hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.flow import Flow
from model.sampling.guided import Guidance
from model.sampling.kernel import FlowKernel, Memory
from model.sampling.rows import finish
from model.sampling.solver import BlockSolver
from model.sampling.static_step import StepBuffers, Variant, cache_lengths, decode_step
from tests.model.sampling.captures import FLOW, Recorder
from tests.model.sampling.cases import ROUNDING, Case, cases, distance


@settings(deadline=None, max_examples=40)
@given(data=st.data(), case=cases(tolerances=[1e-3]))
def test_a_static_step_is_a_step_of_the_kernel(data: st.DataObject, case: Case) -> None:
    """Whatever the guidance, from the first patch to the last, also in buffers that are larger than the batch."""
    number = data.draw(st.integers(0, len(case.flow.blocks) - 1))
    kernel, rows = FlowKernel(case.flow).blocks[number], case.rows()
    z_TBD = case.latent_BTD.transpose(0, 1).contiguous()
    guidance = Guidance(rows, number, kernel.block)
    memory = Memory.allocate(case.flow.config, guidance.num_passes, kernel.dtype, z_TBD.device)
    expected = finish(BlockSolver(kernel, rows, number, z_TBD, memory, segment=1).run())
    room = guidance.num_passes + data.draw(st.integers(0, 3))
    buffers = StepBuffers(case.flow.config, room, kernel.dtype, z_TBD)
    variant = buffers.load(kernel, rows, guidance)
    buffers.start(z_TBD)
    for position in range(len(z_TBD) - 1):
        lengths = [length for length in cache_lengths(len(z_TBD)) if length > position]
        decode_step(kernel, buffers, data.draw(st.sampled_from(lengths)), variant)
    assert distance(buffers.x_TRD[:, : len(rows)], expected) < ROUNDING
    used = (slice(0, len(z_TBD) - 1), slice(0, guidance.num_passes))
    for layer in range(len(kernel.layers)):
        assert distance(buffers.memory.qkv[layer][used], memory.qkv[layer][used]) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "variant", [Variant(False, False, False), Variant(True, True, False), Variant(True, True, True)]
)
@pytest.mark.parametrize("volume_preserving", [False, True])
@torch.no_grad()
def test_a_step_neither_asks_the_device_nor_copies_to_it(
    dtype: torch.dtype, variant: Variant, volume_preserving: bool
) -> None:
    """On a device that has no values to ask for, and nothing of another device takes part."""
    with torch.device("meta"):
        config = replace(FLOW.config, volume_preserving=volume_preserving)
        kernel = FlowKernel(Flow(config), dtype).blocks[0]
        buffers = StepBuffers(config, 4, dtype, torch.zeros(config.num_patches, 2, config.patch_dim))
    with Recorder("meta") as recorder:
        decode_step(kernel, buffers, 16, variant)
    assert len(recorder.calls) > 20


@pytest.mark.parametrize("num_patches", [2, 4, 8, 9, 16, 17, 49, 64, 65, 256, 1024, 4096])
def test_lengths_hold_every_step_and_waste_little(num_patches: int) -> None:
    lengths = cache_lengths(num_patches)
    assert all(length % 8 == 0 for length in lengths)
    assert len(lengths) <= 8
    # The step at patch i looks at i + 1 patches, and the last is at T − 2.
    assert lengths[-1] >= num_patches - 1
    assert len(lengths) == 1 or lengths[-2] < num_patches - 1
    assert lengths[0] < num_patches / 8 + 8
