"""What passes cost on this device: measured when a worker warms up, for the choice of plan and threads."""

from __future__ import annotations

import time
from collections.abc import Generator

import torch

from model.config import FlowConfig, SamplingDefaults
from model.sampling.graphs import DecodeGraphs
from model.sampling.guided import Guidance
from model.sampling.kernel import BlockKernel, FlowKernel, Memory
from model.sampling.plan import CostProfile, PassCost, segment_lengths
from model.sampling.rows import finish, make_rows

LONG_SECONDS = 0.02
"""Rows are not added to a pass this long: beyond it, time grows with the rows."""
VERY_LONG_SECONDS = 0.5
"""A pass this long is not repeated."""
REPEATS = 3
LARGE = 64
"""Patches from which on several threads ought to be faster than one."""
HOPELESS = 1.5
"""Several threads that are slower by this for a large pass have no cores of their own, and are not tried again."""


@torch.no_grad()
def measure_costs(
    kernels: FlowKernel, most_rows: int, graphs: DecodeGraphs | None = None, *, segments: bool = True
) -> CostProfile:
    """Time passes of the deepest block, of one patch up to all, and of 1, 2, 4, … up to ``most_rows`` network rows.

    On a CPU each with one thread and with as many as torch has now; the faster counts. A pass of one patch is a
    step of ``graphs``, where there are some. Without ``segments`` only one patch and the whole sequence are measured:
    a model that was not tuned needs no more.
    """
    return finish(cost_steps(kernels, most_rows, graphs, segments=segments))


@torch.no_grad()
def cost_steps(
    kernels: FlowKernel, most_rows: int, graphs: DecodeGraphs | None = None, *, segments: bool = True
) -> Generator[None, None, CostProfile]:
    """:func:`measure_costs` that yields after every size, for work in between; threads are the caller's then."""
    config = kernels.flow.config
    kernel = max(kernels.blocks, key=lambda k: len(k.layers))
    device = kernel.in_bias.device
    given = torch.get_num_threads()
    choices = sorted({1, given}) if device.type == "cpu" else [given]
    costs = []
    between = reversed(segment_lengths(config.num_patches)) if segments else ()
    for patches in [1, *between, config.num_patches]:
        rows = 1
        while True:
            timed = {}
            for threads in choices:
                try:
                    timed[threads] = _seconds(kernel, config, rows, patches, threads)
                finally:
                    torch.set_num_threads(given)
                yield
            threads = min(choices, key=lambda n: timed[n])
            seconds = timed[threads]
            if graphs is not None and patches == 1:
                seconds = min(seconds, _repeated_seconds(kernel, config, rows, graphs))
            if rows * patches >= LARGE and timed[choices[-1]] > HOPELESS * seconds:
                choices = choices[:1]
            costs.append(PassCost(rows=rows, patches=patches, seconds=seconds, threads=threads))
            if rows >= most_rows or seconds > LONG_SECONDS:
                break
            rows = min(2 * rows, most_rows)
    return CostProfile(costs)


def _seconds(kernel: BlockKernel, config: FlowConfig, rows: int, patches: int, threads: int) -> float:
    """The fastest of a few passes of one size, half-way through the sequence."""
    torch.set_num_threads(threads)
    device = kernel.in_bias.device
    memory = Memory.allocate(config, rows, kernel.dtype, device)
    for held in memory.qkv:
        held.zero_()
    start = (config.num_patches - patches) // 2
    x_NRD = torch.zeros(patches, rows, config.patch_dim, device=device)
    offset_RW = kernel.in_bias.expand(rows, -1)
    best = float("inf")
    # The first run warms caches up and does not count.
    for repeat in range(REPEATS + 1):
        begin = time.perf_counter()
        kernel.run(x_NRD, start, offset_RW, None, memory)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        if repeat or seconds > VERY_LONG_SECONDS:
            best = min(best, seconds)
        if seconds > VERY_LONG_SECONDS:
            break
    return best


def _repeated_seconds(kernel: BlockKernel, config: FlowConfig, rows: int, graphs: DecodeGraphs) -> float:
    """The fastest of a few captured steps half-way through the sequence; infinite where there are none."""
    device, middle = kernel.in_bias.device, config.num_patches // 2
    latent_BTD = torch.zeros(rows, config.num_patches, config.patch_dim, device=device)
    batch = make_rows(latent_BTD, [None] * rows, [SamplingDefaults()] * rows)
    best = float("inf")
    with graphs.lend(kernel, batch, Guidance(batch, 0, kernel.block), latent_BTD.transpose(0, 1)) as steps:
        if steps is None:
            return best
        for position in range(min(middle + REPEATS, config.num_patches - 1)):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            steps.advance()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if position >= middle:
                best = min(best, time.perf_counter() - begin)
    return best
