"""From latents to images: all blocks by a plan, then the certificate, and again what missed its tolerance."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from model.config import SolverOptions
from model.flow import Flow
from model.sampling.batch import Batch, Boundary, Join, Kind
from model.sampling.certificate import backward_error
from model.sampling.graphs import DecodeGraphs, cuda_captures
from model.sampling.groups import GroupedBlock
from model.sampling.kernel import ATTENTION, BlockKernel, FlowKernel, Memory
from model.sampling.plan import BlockPlan, ConvergenceProfile, CostProfile, Plan, choose
from model.sampling.rows import Progress, Rows
from model.sampling.solver import BlockSolver

DEFAULT_OPTIONS = SolverOptions()
SLICE_SECONDS = 0.02
"""What a parallel pass should take at most, so that urgent work need not wait."""
UNFINISHED = 0.99
"""Progress of a batch of which rows are done again, as a part of its last stage."""


class Redone(IntEnum):
    """Why a row was decoded again, sequentially in float32."""

    NO = 0
    TOLERANCE = 1
    """Its backward error was above the tolerance."""
    NOT_FINITE = 2
    """It had values that are not finite."""


@dataclass(frozen=True)
class Decoded:
    """What a sampler returns: B rows."""

    x_BTD: Tensor
    """Patches in image order."""
    backward_error_B: Tensor
    """max|z' − z| by the certificate; nan where none was asked for."""
    redone_B: Tensor
    """Of :class:`Redone`."""
    passes_B: Tensor
    """Network passes that the row took part in, over all blocks, without the certificate."""
    trajectory: tuple[Tensor, ...] = ()
    """Where asked for, the rows after each block in the order of sampling, (B, T, D) in image order."""

    def select(self, index: Tensor) -> Decoded:
        """The rows at ``index``."""
        trajectory = tuple(x[index] for x in self.trajectory)
        columns = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "trajectory"}
        return Decoded(**columns, trajectory=trajectory)

    def put(self, index: Tensor, other: Decoded) -> None:
        """Replace the rows at ``index`` in place."""
        for field in fields(self):
            own, new = getattr(self, field.name), getattr(other, field.name)
            for a, b in zip(own, new, strict=True) if isinstance(own, tuple) else [(own, new)]:
                a[index] = b


Message = Tensor | Join | None
"""What may be sent to a sampler in flight: indices of the rows to keep, or at a boundary the rows of another."""
Sampling = Generator[Progress, Message, Decoded]
"""A sampler in flight. ``send(keep)`` with row indices drops all other rows before the next slice."""


@dataclass
class _Meter:
    """How much of a sampler's work is done: a draft counts as much as the blocks, a certificate as one block."""

    depths: tuple[int, ...]
    """Layers of the blocks in the order of sampling: a deep block is more work than a shallow one."""
    stages: int
    """How often the rows go through all blocks: twice when a draft is polished."""
    always: bool
    """Whether there is a certificate even of exact rows."""
    iterates: bool
    """Whether rows are iterated, so that they need one; that may change when others join."""
    stage: str = "blocks"
    before: int = 0
    """Blocks of work before the current stage."""
    blocks: int = 0
    """Blocks of the current stage that are finished."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the flow."""
        return len(self.depths)

    def work(self, number: int, share: float = 0.0) -> float:
        """Work of the blocks before the ``number``-th and of a share of it, in blocks of average depth."""
        layers = sum(self.depths[:number]) + (share * self.depths[number] if share else 0)
        return layers * self.num_blocks / sum(self.depths)

    @property
    def parts(self) -> int:
        """Blocks of work in all, those of a draft and the certificate included."""
        return self.num_blocks * self.stages + (self.always or self.iterates)

    def progress(self, part: float, image_BTD: Tensor | None, boundary: Boundary | None = None) -> Progress:
        """After ``part`` blocks of work of the current stage."""
        fraction = (self.before + part) / self.parts
        return Progress(self.blocks, self.num_blocks, fraction, image_BTD, self.stage, boundary)


class Sampler:
    """A flow ready to sample: its kernels, how it converges, and what passes cost on its device.

    It holds no state of a batch: any number of samplings may be in flight.
    """

    def __init__(
        self,
        flow: Flow,
        profile: ConvergenceProfile | None = None,
        costs: CostProfile | None = None,
        rows_per_pass: int = 8,
    ) -> None:
        """``rows_per_pass`` bounds the images in one parallel pass over whole sequences."""
        self.flow, self.profile, self.costs, self.rows_per_pass = flow, profile, costs, rows_per_pass
        self.kernel = FlowKernel(flow)
        self._low_precision: FlowKernel | None = None
        device = flow.prior_variance.device
        self.graphs = DecodeGraphs(flow.config, cuda_captures(device)) if device.type == "cuda" else None
        """Captured decoding steps; without, every step is started kernel by kernel."""

    @property
    def low_precision(self) -> FlowKernel:
        """The weights in bfloat16, cast when first asked for."""
        if self._low_precision is None:
            self._low_precision = FlowKernel(self.flow, torch.bfloat16)
        return self._low_precision

    def plan(self, rows: Rows, options: SolverOptions) -> Plan:
        """How these rows will be solved."""
        network_rows = [len(rows) + len(rows.guided(n, kernel.block)) for n, kernel in enumerate(self.kernel.blocks)]
        return choose(
            options.solver, options.tolerance, self.flow.config, self.profile, self.costs, len(rows), network_rows
        )

    @torch.no_grad()
    def decode(
        self,
        rows: Rows,
        options: SolverOptions = DEFAULT_OPTIONS,
        *,
        plan: Plan | None = None,
        trajectory: bool = False,
        boundaries: bool = False,
    ) -> Sampling:
        """Latents to patches, yielding after every pass. Sending row indices keeps only those rows.

        ``plan`` overrides the choice by ``options``, whose tolerance is for the plan: each row's own counts for
        what it converges to and for its certificate. With ``boundaries`` it yields before every block, too, where a
        :class:`~model.sampling.batch.Join` may be sent; raises ``ValueError`` for rows that stand elsewhere.
        """
        drafts = options.precision == "bf16"
        polishes = drafts and options.certify is not False
        num_blocks = len(self.flow.blocks)
        batch = Batch.start(self.flow, rows, plan or self.plan(rows, options))
        depths = self.flow.config.layer_counts[::-1]
        meter = _Meter(depths, 1 + polishes, drafts or bool(options.certify), batch.iterates)
        kind = Kind(options.solver, options.precision, options.certify, trajectory) if boundaries else None
        if drafts:
            meter.stage = "draft"
            yield from self._blocks(self.low_precision, batch, meter, kind, keeps_states=trajectory or polishes)
        if polishes:
            meter.stage, meter.before, meter.blocks = "polish", num_blocks, 0
            whole = BlockPlan(segment=self.flow.config.num_patches - 1)
            plan = Plan(blocks=(whole,) * num_blocks, gain=batch.plan.gain, floor=batch.plan.floor)
            passes_B, guesses = batch.passes_B, batch.states
            batch = replace(Batch.start(self.flow, batch.rows, plan), passes_B=passes_B, guesses=guesses)
        if polishes or not drafts:
            yield from self._blocks(self.kernel, batch, meter, kind, keeps_states=trajectory)
        exact = not drafts and not batch.iterated
        error_B = torch.full_like(batch.x_BTD[:, 0, 0], float("nan"))
        if meter.always or not exact:
            meter.stage, meter.before = "certificate", num_blocks * meter.stages
            error_B = yield from self._certify(batch, meter)
        result = Decoded(
            x_BTD=batch.x_BTD,
            backward_error_B=error_B,
            redone_B=torch.zeros_like(batch.passes_B),
            passes_B=batch.passes_B,
            trajectory=tuple(batch.states) if trajectory else (),
        )
        if exact:
            return result
        return (yield from self._redo(batch.rows, result, options, meter))

    def _blocks(
        self, kernels: FlowKernel, batch: Batch, meter: _Meter, kind: Kind | None, *, keeps_states: bool
    ) -> Generator[Progress, Message, None]:
        """All blocks of a batch in one precision; ends at once when no row is left."""
        if not len(batch.rows):
            return
        for number, kernel in enumerate(kernels.blocks):
            if kind is not None:
                yield from self._stand(batch, meter, Boundary(kind, meter.stage, number, batch))
                if not len(batch.rows):
                    return
            how = batch.plan.blocks[number]
            batch.iterated |= how.segment != 1
            rows_per_group = self._group_rows(batch.rows, number, kernel, how)
            block = self._grouped(kernel, batch, number, how, rows_per_group)
            threads = self._threads(2 * rows_per_group, how.segment)
            send = _send_on_gpu if batch.x_BTD.device.type == "cuda" else _send
            steps, keep = block.run(), None
            while True:
                try:
                    share = send(steps, keep, threads)
                except StopIteration as stop:
                    x_TBD: Tensor = stop.value
                    break
                keep = _indices((yield meter.progress(meter.work(number, share), batch.x_BTD)))
                if keep is not None:
                    batch.keep(keep)
                    if not len(keep):
                        return
            batch.x_BTD = kernel.block.in_block_order(x_TBD.transpose(0, 1)).contiguous()
            batch.passes_B = batch.passes_B + block.passes_B
            meter.blocks = number + 1
            if keeps_states:
                batch.states.append(batch.x_BTD)

    @staticmethod
    def _stand(batch: Batch, meter: _Meter, boundary: Boundary) -> Generator[Progress, Message, None]:
        """Between two blocks: rows may leave as always, and others join."""
        message = yield meter.progress(meter.work(boundary.block), batch.x_BTD, boundary)
        if isinstance(message, Join):
            if not boundary.meets(message.other):
                raise ValueError(f"rows at {message.other.stage} {message.other.block} cannot join here")
            batch.join(message.other.batch)
            if message.plan is not None:
                batch.plan = message.plan
            meter.iterates = batch.iterates
            message = message.keep
        if message is not None:
            batch.keep(message)

    def _grouped(
        self, kernel: BlockKernel, batch: Batch, number: int, how: BlockPlan, rows_per_group: int
    ) -> GroupedBlock:
        """One block of a batch, ready to run."""
        config = self.flow.config

        def make_solver(rows: Rows, index: Tensor) -> BlockSolver:
            # Rows may have left since, so what is taken from the batch is taken now.
            x_BTD = batch.x_BTD[index]
            guess_BTD = None
            if batch.guesses:
                guess_BTD = batch.guesses[number][index]
            elif how.guess == "zeros":
                guess_BTD = torch.zeros_like(x_BTD)
            turned = kernel.block.in_block_order
            passes = len(rows) + len(rows.guided(number, kernel.block))
            if batch.memory is None or (batch.memory.num_rows, batch.memory.dtype) != (passes, kernel.dtype):
                batch.memory = Memory.allocate(config, passes, kernel.dtype, x_BTD.device)
            return BlockSolver(
                kernel,
                rows,
                number,
                turned(x_BTD).transpose(0, 1).contiguous(),
                batch.memory,
                segment=how.segment,
                residual_B=_residuals(batch.plan, rows.tolerance_B),
                guess_TBD=None if guess_BTD is None else turned(guess_BTD).transpose(0, 1),
                graphs=self.graphs,
            )

        x_TBD = torch.empty_like(batch.x_BTD.transpose(0, 1))
        return GroupedBlock(batch.rows, x_TBD, rows_per_group, make_solver)

    def _group_rows(self, rows: Rows, number: int, kernel: BlockKernel, how: BlockPlan) -> int:
        """Rows that go through a block together: all when decoding, else as many as keep a pass short."""
        if how.segment == 1:
            return len(rows)
        if self.costs is None:
            return max(1, min(self.rows_per_pass, len(rows)))
        passes = (len(rows) + len(rows.guided(number, kernel.block))) / len(rows)
        # Costs are those of the deepest block; others do as much of their own in the same time.
        seconds = SLICE_SECONDS * max(self.flow.config.layer_counts) / len(kernel.layers)
        return self.costs.most_rows(seconds, how.segment, passes, len(rows))

    def _certify(self, batch: Batch, meter: _Meter) -> Generator[Progress, Message, Tensor]:
        """Backward errors (B,) of the rows that are there at the end."""
        alive_B = torch.arange(len(batch.rows), device=batch.x_BTD.device)
        rows_per_pass = max(1, min(self.rows_per_pass, len(batch.rows)))
        threads = self._threads(2 * rows_per_pass, self.flow.config.num_patches)
        steps = backward_error(self.flow, batch.rows, batch.x_BTD, rows_per_pass)
        while True:
            try:
                share = _send(steps, None, threads)
            except StopIteration as stop:
                return stop.value[alive_B]
            keep = _indices((yield meter.progress(share * UNFINISHED, batch.x_BTD)))
            if keep is not None:
                # A pass in work is finished; rows that left are just not returned.
                batch.keep(keep)
                alive_B = alive_B[keep]
                if not len(keep):
                    return batch.x_BTD.new_zeros(0)

    def _redo(
        self, rows: Rows, result: Decoded, options: SolverOptions, meter: _Meter
    ) -> Generator[Progress, Message, Decoded]:
        """Decode again what is not good enough: sequentially in float32, which is final."""
        finite_B = torch.isfinite(result.x_BTD).all(dim=2).all(dim=1)
        missed_B = result.backward_error_B > rows.tolerance_B
        bad_B = ~finite_B if options.certify is False else ~finite_B | missed_B
        bad = bad_B.nonzero().squeeze(1)
        if not len(bad):
            return result
        result.redone_B[bad] = torch.where(finite_B[bad], int(Redone.TOLERANCE), int(Redone.NOT_FINITE))
        meter.stage = "redo"
        final = SolverOptions(solver="sequential", tolerance=options.tolerance, certify=True)
        steps = self.decode(rows.select(bad), final, trajectory=bool(result.trajectory))
        keep_bad: Tensor | None = None
        while True:
            try:
                steps.send(keep_bad)
            except StopIteration as stop:
                again: Decoded = stop.value
                break
            keep = _indices((yield meter.progress(UNFINISHED, result.x_BTD)))
            keep_bad = None
            if keep is not None:
                place_B = torch.full((len(result.x_BTD),), -1, device=keep.device)
                place_B[bad] = torch.arange(len(bad), device=keep.device)
                result = result.select(keep)
                keep_bad = place_B[keep][place_B[keep] >= 0]
                bad = (place_B[keep] >= 0).nonzero().squeeze(1)
                if not len(bad):
                    return result
        # Which it was before stays on record, and so do the passes that were in vain.
        again.redone_B.copy_(result.redone_B[bad])
        again.passes_B.add_(result.passes_B[bad])
        result.put(bad, again)
        return result

    def _threads(self, network_rows: int, patches: int) -> int | None:
        """Threads for passes of a size, or ``None`` to leave them as they are."""
        return None if self.costs is None else self.costs.threads(network_rows, patches)


def _indices(message: Message) -> Tensor | None:
    """What was sent between two passes of a block: nothing but rows to keep."""
    if isinstance(message, Join):
        raise ValueError("rows can join at a boundary of blocks only")
    return message


def _residuals(plan: Plan, tolerance_B: Tensor) -> Tensor:
    """Where each row stops."""
    return torch.tensor([plan.residual(tolerance) for tolerance in tolerance_B.tolist()]).to(tolerance_B)


def _send(steps: Generator[float, Tensor | None, Tensor], keep: Tensor | None, threads: int | None) -> float:
    """One slice with as many threads as suit it: more than small passes can use make them slower."""
    if threads is None:
        return steps.send(keep)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return steps.send(keep)
    finally:
        torch.set_num_threads(before)


def _send_on_gpu(steps: Generator[float, Tensor | None, Tensor], keep: Tensor | None, threads: int | None) -> float:
    """One slice, with the kernels for attention that suit it."""
    with sdpa_kernel(ATTENTION):
        return _send(steps, keep, threads)
