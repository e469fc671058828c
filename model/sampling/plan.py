"""Which solver each block gets: a choice from how the weights converge and what passes cost on this device.

A :class:`ConvergenceProfile` depends on the weights alone and is stored with the bundle (``tarflow tune``). A
:class:`CostProfile` depends on the device and is measured when a worker warms up. Nothing here imports torch.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from model.config import FlowConfig, Record, Solver, check

Guess = Literal["latent", "zeros"]
"""Where the iterations of a block start: at its latents, or at zeros after the first patch."""

MARGIN = 1.25
"""How far below the worst ratio that tuning saw a row stops, so that redoing a row stays rare."""
DEFAULT_GAIN = 4.0
"""Gain of a model that was not tuned: cautious."""
SHORTEST_SEGMENT = 4
"""Shorter segments win nothing over single patches."""
FLOOR_DISTANCE = 3
"""A tolerance closer to the floor of float32 than this factor is left to sequential decoding."""


Block = TypeVar("Block", bound=Record)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_number(record: Record, name: str, *, positive: bool = False) -> None:
    """Refuse what is not a finite number ≥ 0, or > 0."""
    value = getattr(record, name)
    valid = _is_number(value) and (value > 0 if positive else value >= 0)
    check(valid, name, value, "a number > 0" if positive else "a number >= 0")


def _read_blocks(values: object, kind: type[Block]) -> tuple[Block, ...]:
    """Records of blocks, from records or plain mappings."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"blocks: got {values!r}, allowed is a list of at least one block")
    return tuple(value if isinstance(value, kind) else kind.from_dict(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class BlockPlan(Record):
    """How one block is inverted."""

    segment: int
    """Patches solved together: 1 is sequential decoding, T − 1 the whole sequence at once."""
    guess: Guess = "latent"
    """Start of the iterations; of no meaning when the segment is 1."""

    def __post_init__(self) -> None:
        check(
            isinstance(self.segment, int) and not isinstance(self.segment, bool) and self.segment >= 1,
            "segment",
            self.segment,
            "an integer >= 1",
        )
        check(self.guess in get_args(Guess), "guess", self.guess, " or ".join(get_args(Guess)))


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """How all blocks are inverted, in the order of sampling: the block next to the noise first."""

    blocks: tuple[BlockPlan, ...]
    gain: float = DEFAULT_GAIN
    """Backward error of a finished image per residual at which its rows stopped, at most."""
    floor: float = 0.0
    """Backward error that rounding makes anyway."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _read_blocks(self.blocks, BlockPlan))
        _check_number(self, "gain", positive=True)
        _check_number(self, "floor")

    @property
    def is_sequential(self) -> bool:
        """Whether no block is iterated, so that the result is exact but for rounding."""
        return all(block.segment == 1 for block in self.blocks)

    def residual(self, tolerance: float) -> float:
        """Residual at which rows stop, so that the backward error of the image stays below ``tolerance``."""
        return max(tolerance - self.floor, tolerance / 2) / (self.gain * MARGIN)

    def describe(self) -> list[str]:
        """One word or two for each block, as answers and logs show it."""
        return ["sequential" if block.segment == 1 else f"jacobi/{block.segment}" for block in self.blocks]

    @classmethod
    def sequential(cls, flow: FlowConfig) -> Plan:
        """Every block patch by patch."""
        return cls(blocks=(BlockPlan(segment=1),) * flow.num_blocks)

    @classmethod
    def jacobi(cls, flow: FlowConfig, profile: ConvergenceProfile | None) -> Plan:
        """Every block as one sequence."""
        whole = flow.num_patches - 1
        if profile is None:
            return cls(blocks=(BlockPlan(segment=whole),) * flow.num_blocks)
        return cls(
            blocks=tuple(BlockPlan(segment=whole, guess=b.guess) for b in profile.blocks),
            gain=profile.gain,
            floor=profile.floor,
        )


@dataclass(frozen=True, kw_only=True)
class BlockConvergence(Record):
    """What tuning measured of one block."""

    crm: float
    """Convergence-ranking metric as a share over all blocks: large for a tough block (arXiv 2505.12849)."""
    igm_latent: float
    """Initial-guess metric of the latents: how far one pass moves them."""
    igm_zeros: float
    """Initial-guess metric of zeros after the first patch."""
    active: Mapping[str, tuple[float, ...]]
    """For each segment length: the share of rows that take part in pass 1, 2, … of a segment, on average."""

    def __post_init__(self) -> None:
        for name in ("crm", "igm_latent", "igm_zeros"):
            _check_number(self, name)
        valid = isinstance(self.active, Mapping) and all(
            isinstance(key, str)
            and key.isdecimal()
            and int(key) >= 1
            and isinstance(shares, list | tuple)
            and len(shares) >= 1
            and all(_is_number(share) and 0 <= share <= 1 for share in shares)
            for key, shares in self.active.items()
        )
        check(valid, "active", self.active, "lists of shares in [0, 1] by segment length")
        object.__setattr__(self, "active", {key: tuple(shares) for key, shares in self.active.items()})

    @property
    def guess(self) -> Guess:
        """The better start."""
        return "zeros" if self.igm_zeros < self.igm_latent else "latent"

    @property
    def passes(self) -> dict[int, float]:
        """Mean passes of a row in a segment, by segment length."""
        return {int(segment): sum(shares) for segment, shares in self.active.items()}


@dataclass(frozen=True, kw_only=True)
class ConvergenceProfile(Record):
    """How the iterations of a model converge; measured by ``tarflow tune``, stored in sampler.json."""

    blocks: tuple[BlockConvergence, ...]
    """In the order of sampling."""
    gain: float
    """Largest backward error of an image per residual at which its rows stopped."""
    floor: float
    """Largest backward error of sequentially decoded float32 images: what rounding alone makes."""
    tolerance: float
    """Tolerance that the shares were measured at."""
    num_images: int
    """Images it was measured on."""
    guidance: Mapping[str, Any]
    """Sampling parameters it was measured with."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _read_blocks(self.blocks, BlockConvergence))
        for name in ("gain", "floor", "tolerance"):
            _check_number(self, name, positive=True)
        images = self.num_images
        check(_is_number(images) and isinstance(images, int) and images >= 1, "num_images", images, "an integer >= 1")
        check(isinstance(self.guidance, Mapping), "guidance", self.guidance, "an object")

    def check_fits(self, flow: FlowConfig) -> None:
        """Raise ``ValueError`` when the profile is of another architecture."""
        check(len(self.blocks) == flow.num_blocks, "convergence.blocks", len(self.blocks), f"{flow.num_blocks} blocks")
        known = {str(length) for length in segment_lengths(flow.num_patches)}
        for block in self.blocks:
            check(set(block.active) <= known, "convergence.active", sorted(block.active), f"among {sorted(known)}")

    def to_dict(self) -> dict[str, Any]:
        """The profile as a JSON-ready dictionary."""
        blocks = [
            {**b.to_dict(), "active": {key: list(shares) for key, shares in b.active.items()}} for b in self.blocks
        ]
        return {**super().to_dict(), "blocks": blocks, "guidance": dict(self.guidance)}


@dataclass(frozen=True)
class PassCost:
    """One measured pass."""

    rows: int
    patches: int
    seconds: float
    threads: int


class CostProfile:
    """Seconds of a pass by network rows and patches, between and beyond what was measured."""

    def __init__(self, costs: Sequence[PassCost]) -> None:
        self.costs = tuple(costs)
        self._by_patches: dict[int, list[PassCost]] = {}
        for cost in sorted(costs, key=lambda c: c.rows):
            self._by_patches.setdefault(cost.patches, []).append(cost)
        self._lengths = sorted(self._by_patches)

    def _along_rows(self, patches: int, rows: float) -> float:
        known = self._by_patches[patches]
        place = min(bisect_left([c.rows for c in known], rows), len(known) - 1)
        above = known[place]
        if rows >= above.rows or place == 0:
            # Beyond the last, work grows with the rows; below the first, a pass costs what it costs.
            return above.seconds * max(1.0, rows / above.rows)
        below = known[place - 1]
        share = (rows - below.rows) / (above.rows - below.rows)
        return below.seconds + share * (above.seconds - below.seconds)

    def seconds(self, rows: float, patches: int) -> float:
        """Expected time of a pass of ``patches`` patches of ``rows`` network rows."""
        place = min(bisect_left(self._lengths, patches), len(self._lengths) - 1)
        above = self._lengths[place]
        if patches >= above or place == 0:
            return self._along_rows(above, rows) * max(1.0, patches / above)
        below = self._lengths[place - 1]
        share = (patches - below) / (above - below)
        low, high = self._along_rows(below, rows), self._along_rows(above, rows)
        return low + share * (high - low)

    def most_rows(self, seconds: float, patches: int, passes: float, most: int) -> int:
        """Images, from 1 up to ``most``, of ``passes`` network rows each, that a pass takes in ``seconds``."""
        while most > 1 and self.seconds(passes * most, patches) > seconds:
            most -= 1
        return most

    def threads(self, rows: int, patches: int) -> int:
        """Threads that were faster for the measured pass nearest in size."""
        size = math.log(rows * patches)
        return min(
            self.costs, key=lambda c: (abs(math.log(c.rows * c.patches) - size), abs(c.patches - patches))
        ).threads


def segment_lengths(num_patches: int) -> list[int]:
    """Segments worth trying: the whole sequence, halves, quarters, … down to a few patches."""
    whole = num_patches - 1
    lengths = [math.ceil(whole / 2**k) for k in range(whole.bit_length())]
    return sorted({length for length in lengths if length >= SHORTEST_SEGMENT or length == whole}, reverse=True)


def expected_seconds(
    convergence: BlockConvergence, segment: int, costs: CostProfile, flow: FlowConfig, num_rows: int, network_rows: int
) -> float:
    """Expected time of one of the deepest blocks of a batch of ``num_rows`` images, ``network_rows`` with guidance."""
    patches = flow.num_patches - 1
    if segment == 1:
        return patches * costs.seconds(network_rows, 1)
    per_segment = 0.0
    for done, share in enumerate(convergence.active[str(segment)]):
        # At least one row is there with this probability, if rows stop independently.
        any_row = 1 - (1 - share) ** num_rows
        rows = max(network_rows / num_rows, network_rows * share)
        per_segment += any_row * costs.seconds(rows, max(1, segment - done))
    return math.ceil(patches / segment) * per_segment


def choose(
    solver: Solver,
    tolerance: float,
    flow: FlowConfig,
    profile: ConvergenceProfile | None,
    costs: CostProfile | None,
    num_rows: int,
    network_rows: Sequence[int],
) -> Plan:
    """The plan for a batch: the fastest by expectation, or what ``solver`` forces.

    ``network_rows`` is for each block in the order of sampling, since not every one need be guided.
    Without a profile, without costs, or for a tolerance near the floor of float32, ``auto`` is sequential.
    """
    if solver == "jacobi":
        return Plan.jacobi(flow, profile)
    sequential = Plan.sequential(flow)
    if solver == "sequential" or profile is None or costs is None or tolerance < FLOOR_DISTANCE * profile.floor:
        return sequential
    blocks, saved = [], 0.0
    depths = [depth / max(flow.layer_counts) for depth in reversed(flow.layer_counts)]
    for convergence, depth, passes in zip(profile.blocks, depths, network_rows, strict=True):
        seconds = {
            segment: expected_seconds(convergence, segment, costs, flow, num_rows, passes)
            for segment in [1, *map(int, convergence.active)]
        }
        best = min(seconds, key=lambda segment: seconds[segment])
        saved += depth * (seconds[1] - seconds[best])
        blocks.append(BlockPlan(segment=best, guess=convergence.guess))
    # Iterated images need a certificate, a parallel pass through every block.
    certificate = sum(
        depth * costs.seconds(passes, flow.num_patches) for depth, passes in zip(depths, network_rows, strict=True)
    )
    return Plan(blocks=tuple(blocks), gain=profile.gain, floor=profile.floor) if saved > certificate else sequential
