"""CUDA graphs of the decoding step: one call of the host starts a step, instead of a hundred.

What a graph repeats is in :mod:`model.sampling.static_step`; a block has one for each of a few lengths of memory.
They are captured when a block first meets a size of batch, and compared there with :class:`BlockKernel` on random
values. What goes wrong until then switches graphs off for this sampler, with one warning, and decoding goes on without.

All of it belongs to one thread and one stream: graphs share the memory of what they compute in between.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from model.config import FlowConfig
from model.sampling.guided import Guidance
from model.sampling.kernel import ATTENTION, BlockKernel, Memory
from model.sampling.rows import Rows
from model.sampling.static_step import StepBuffers, Variant, cache_lengths, decode_step

log = logging.getLogger(__name__)

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""From a step to a call that repeats it on the same addresses. It may run the step, or not."""

MOST_ROWS = 256
"""Network rows of a step that takes longer than its hundred kernels take to start."""
MOST_SETS = 4
"""Sets of buffers, lent or not. Each is as large as the memory of its batch, and holds the graphs of its size."""
CHECKED_STEPS = 3
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest |x − x'| / (1 + |x'|) of repeated steps x against :class:`BlockKernel`'s x', by precision of the weights.
They differ in how many keys attention sums over, so by rounding."""
LOW_PRECISION_TOLERANCE = 0.1
"""The same for bfloat16, which has 8 bits."""


def padded_rows(network_rows: int) -> int:
    """Rows of the buffers for a batch: 2, 4, 8, 16, 32, and multiples of 32, so that few sizes are captured."""
    if network_rows > 32:
        return 32 * math.ceil(network_rows / 32)
    return max(2, 1 << (network_rows - 1).bit_length())


class GraphedSteps:
    """Buffers and the steps that were captured on them, for one batch at a time."""

    def __init__(self, config: FlowConfig, num_rows: int, dtype: torch.dtype, z_TBD: Tensor, capture: Capture) -> None:
        self.capture = capture
        self._buffers = StepBuffers(config, num_rows, dtype, z_TBD)
        self._lengths = cache_lengths(config.num_patches)
        self._captured: dict[tuple[BlockKernel, Variant], list[Step]] = {}
        self._repeats: list[Step] = []
        self._position, self._num_rows = 0, 0

    @property
    def memory(self) -> Memory:
        """Queries, keys and values of all steps so far."""
        return self._buffers.memory

    def fits(self, num_rows: int, dtype: torch.dtype, z_TBD: Tensor) -> bool:
        """Whether it is for batches like this."""
        buffers = self._buffers
        return (buffers.num_rows, buffers.memory.dtype, buffers.z_TRD.dtype) == (num_rows, dtype, z_TBD.dtype)

    def begin(self, kernel: BlockKernel, rows: Rows, guidance: Guidance, z_TBD: Tensor) -> None:
        """Start a block. Raises ``RuntimeError`` when its steps cannot be captured or do something else."""
        variant = self._buffers.load(kernel, rows, guidance)
        if (kernel, variant) not in self._captured:
            with sdpa_kernel(ATTENTION):
                steps = [self._checked(kernel, guidance, length, variant) for length in self._lengths]
            self._captured[kernel, variant] = steps
        self._repeats = self._captured[kernel, variant]
        self._position, self._num_rows = 0, guidance.num_rows
        self._buffers.start(z_TBD)

    def advance(self) -> None:
        """One more patch."""
        self._repeats[self._position // self._lengths[0]]()
        self._position += 1

    def values(self) -> Tensor:
        """x (T, B, D) as far as it is known."""
        return self._buffers.x_TRD[:, : self._num_rows].clone()

    def _checked(self, kernel: BlockKernel, guidance: Guidance, length: int, variant: Variant) -> Step:
        """A step of one length, captured and compared on random values."""
        buffers, B = self._buffers, guidance.num_rows
        generator = torch.Generator(buffers.x_TRD.device).manual_seed(length)
        start = length - self._lengths[0]
        stop = min(start + CHECKED_STEPS, length, buffers.num_patches - 1)
        buffers.z_TRD.normal_(generator=generator)
        buffers.x_TRD.normal_(generator=generator)
        buffers.randomize(0, length, generator)
        given_TRD = buffers.x_TRD.clone()
        temperature = buffers.inverse_temperature_R1 if variant.tempered else None
        expected, found = [], []
        for position in range(start, stop):
            x_1RD = given_TRD[position : position + 1].index_select(1, buffers.source_R)
            out = kernel.run(x_1RD, position, buffers.offset_RW, temperature, buffers.memory)
            alpha, mu = guidance.combine(out[:, : guidance.num_passes], position + 1)
            expected.append(torch.addcmul(mu[0], buffers.z_TRD[position + 1, :B], alpha[0].exp()))
        buffers.seek(start)
        repeat = self.capture(lambda: decode_step(kernel, buffers, length, variant))
        # A capture may have run the step.
        buffers.randomize(start, length, generator)
        buffers.seek(start)
        for position in range(start, stop):
            # Every step starts from what was given: what comes of random values may be too large to go on from.
            buffers.x_TRD.copy_(given_TRD)
            repeat()
            found.append(buffers.x_TRD[position + 1, :B].clone())
        want, got = torch.stack(expected), torch.stack(found)
        error = float(((got - want).abs() / (1 + want.abs())).max())
        allowed = CHECK_TOLERANCE.get(kernel.dtype, LOW_PRECISION_TOLERANCE)
        # What is not a number is no agreement.
        if not error <= allowed:
            raise RuntimeError(f"repeated steps from patch {start} differ by {error:.1e}, allowed is {allowed:g}")
        if int(buffers.position_1) != stop:
            raise RuntimeError(f"repeated steps went to patch {int(buffers.position_1)} instead of {stop}")
        return repeat


class DecodeGraphs:
    """The graphs of one sampler: lends them to one batch at a time, keeps them for the next of its size."""

    def __init__(self, config: FlowConfig, make_capture: Callable[[], Capture], most_sets: int = MOST_SETS) -> None:
        """``make_capture`` is called for every set of buffers; what captured for a set that is gone is used again."""
        self._config, self._make_capture, self._most_sets = config, make_capture, most_sets
        self._idle: list[GraphedSteps] = []  # the least recently used first
        self._lent = 0
        self._captures: list[Capture] = []
        self.reason: str | None = None
        """Why graphs were switched off."""

    @contextmanager
    def lend(self, kernel: BlockKernel, rows: Rows, guidance: Guidance, z_TBD: Tensor) -> Iterator[GraphedSteps | None]:
        """Steps that are about to decode z (T, B, D) through a block; ``None`` when there are none to be had."""
        steps = self._take(kernel, rows, guidance, z_TBD)
        if steps is None:
            yield None
            return
        self._lent += 1
        try:
            yield steps
        finally:
            self._lent -= 1
            if self.reason is None:
                self._idle.append(steps)

    def _take(self, kernel: BlockKernel, rows: Rows, guidance: Guidance, z_TBD: Tensor) -> GraphedSteps | None:
        num_rows = padded_rows(guidance.num_passes)
        if self.reason is not None or num_rows > MOST_ROWS:
            return None
        try:
            steps = self._find(num_rows, kernel.dtype, z_TBD)
            if steps is not None:
                steps.begin(kernel, rows, guidance, z_TBD)
            return steps
        except torch.OutOfMemoryError as error:
            # Other batches may be smaller, or come at a better time; what the idle sets hold may be what lacks.
            log.warning("a batch is decoded without CUDA graphs: %s", error)
            self._idle.clear()
            return None
        except RuntimeError as error:
            self.reason = str(error)
            log.warning("decoding goes on without CUDA graphs: %s", error)
            self._idle.clear()
            return None

    def _find(self, num_rows: int, dtype: torch.dtype, z_TBD: Tensor) -> GraphedSteps | None:
        """A set for such a batch: the one used last, a new one in place of the one unused longest, or none."""
        for place in reversed(range(len(self._idle))):
            if self._idle[place].fits(num_rows, dtype, z_TBD):
                return self._idle.pop(place)
        if self._lent + len(self._idle) >= self._most_sets:
            if not self._idle:
                return None
            self._captures.append(self._idle.pop(0).capture)
        capture = self._captures.pop() if self._captures else self._make_capture()
        return GraphedSteps(self._config, num_rows, dtype, z_TBD, capture)


def cuda_captures(device: torch.device) -> Callable[[], Capture]:
    """Captures by ``torch.cuda.graph``, all into one pool of memory, each on a stream of its own.

    Of its own because a graph that is destroyed takes cuBLAS's workspace of its stream along, which others that were
    captured there still point to (pytorch issue 193402); a set of buffers and all graphs on it go together.
    """
    pool = torch.cuda.graph_pool_handle()

    def make() -> Capture:
        stream = torch.cuda.Stream(device)
        return lambda step: _capture(step, stream, pool)

    return make


def _capture(step: Step, stream: torch.cuda.Stream, pool: Any) -> Step:
    current = torch.cuda.current_stream(stream.device)
    # A capture that fails leaves its stream the current one; the outer context puts back what was.
    with torch.cuda.device(stream.device), torch.cuda.stream(current):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()  # In its first run libraries get ready, which cannot be captured.
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that load data or watch collectives may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay
