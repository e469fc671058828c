"""A cohort: rows of several jobs that go through the sampler together, slice by slice."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import SamplingDefaults, SolverOptions
from model.denoise import denoise
from model.flow import NO_CLASS
from model.likelihood import add_noise, centre_draw
from model.noise import input_noise, latents
from model.sampling.batch import Boundary, Join
from model.sampling.plan import Plan
from model.sampling.rows import Progress, Rows, make_rows
from model.sampling.sampler import Decoded, Message, Sampling
from service.jobs import Job, Op, as_floats
from service.worker.loading import DENOISE_PASSES, LoadedModel
from service.worker.parts import Part
from service.worker.scoring import Arrays

SHOWN_STAGES = ("blocks", "draft")


@dataclass(frozen=True)
class Preview:
    """Rows of a job on the way."""

    part: Part
    block: int
    """Finished blocks."""
    num_blocks: int
    pixels: NDArray[np.uint8]
    """(n, C, H, W), confined to what pixels can show."""


def preview_blocks(num_blocks: int, previews: int) -> frozenset[int]:
    """After which numbers of blocks the state is shown, evenly spread: never after the last, which gives the image."""
    blocks = (int(num_blocks * (i + 1) / (previews + 1) + 0.5) for i in range(previews))
    return frozenset(block for block in blocks if 0 < block < num_blocks)


def _denoises(job: Job) -> bool:
    return job.op is Op.DENOISE or bool(job.payload["options"]["denoise"])


def kind_of(job: Job) -> tuple[Any, ...]:
    """What rows of a cohort have in common: where they are going, and how. Tolerances are each row's own."""
    if job.op is Op.DENOISE:
        return (job.model,)
    solver = job.payload["solver"]
    return (job.model, _denoises(job), solver["solver"], solver["precision"], solver["certify"])


def group(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that can share a cohort: the same model, the same stages, the same way to solve."""
    groups: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        groups.setdefault(kind_of(part.job), []).append(part)
    return list(groups.values())


def _strictest(parts: Sequence[Part]) -> SolverOptions:
    """How to solve parts of one group: as the one with the smallest tolerance wants it."""
    return min((SolverOptions(**part.payload["solver"]) for part in parts), key=lambda solver: solver.tolerance)


class Cohort:
    """Parts of one :func:`group` in flight. :meth:`advance` until it returns ``True``, then :meth:`results`.

    One that stands at a :attr:`boundary` may :meth:`join` another that does.
    """

    def __init__(self, model: LoadedModel, parts: Sequence[Part], most_slice_rows: int | None = None) -> None:
        """``most_slice_rows`` bounds the rows in a slice of denoising further than the model does."""
        self.model, self.parts = model, list(parts)
        self.kind = kind_of(parts[0].job)
        self.seconds = 0.0
        self.fraction = 0.0
        self.stage = ""
        """Which part of the work it is in, as the sampler calls it; ``denoise`` when it denoises."""
        self.block: int | None = None
        """Finished blocks of that stage."""
        self.boundary: Boundary | None = None
        """Where it stands, if it stands between two blocks."""
        self.plan: Plan | None = None
        """How sampling inverts the blocks, once it has begun."""
        self._most_slice_rows = most_slice_rows
        self._words: dict[Part, list[str]] = {}
        self._seconds_before = dict.fromkeys(parts, 0.0)
        self._row_parts = [part for part in parts for _ in range(part.rows)]
        self._dropped: set[str] = set()
        self._started = False
        self._decoded: Decoded | None = None
        self._images: Tensor | None = None
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._slices = self._run()

    @property
    def rows(self) -> int:
        """Images in the cohort that nobody has dropped."""
        return sum(part.rows for part in self.parts if part.job.id not in self._dropped)

    @property
    def slice_rows(self) -> int:
        """Images that a slice of the present stage takes together."""
        return min(self.rows, self._denoise_rows()) if self.stage == "denoise" else self.rows

    @property
    def jobs(self) -> list[Job]:
        """Those that have rows here, once each."""
        return list({part.job.id: part.job for part in self.parts}.values())

    def plan_of(self, part: Part) -> Sequence[str]:
        """How each block was inverted for a part; empty for one that was not sampled."""
        return self._words.get(part, ())

    def seconds_of(self, part: Part) -> float:
        """Model time of the cohorts that a part was in."""
        return self.seconds + self._seconds_before[part]

    def _denoise_rows(self) -> int:
        rows = self.model.slice_rows(DENOISE_PASSES)
        return rows if self._most_slice_rows is None else min(rows, self._most_slice_rows)

    def _labels(self) -> Tensor | None:
        if not self.model.flow.config.num_classes:
            return None
        labels = [NO_CLASS if part.payload["label"] is None else part.payload["label"] for part in self._row_parts]
        return torch.tensor(labels, device=self.model.device)

    def _latents(self) -> Tensor:
        config = self.model.flow.config
        parts = [
            latents(part.payload["seeds"], config.num_patches, config.patch_dim)
            if part.job.op is Op.SAMPLE
            else torch.from_numpy(part.payload["latents"].copy())
            for part in self.parts
        ]
        return torch.cat(parts).to(self.model.device)

    def _noisy_images(self) -> Tensor:
        noise = self.model.noise
        parts = []
        for part in self.parts:
            pixels = torch.from_numpy(part.payload["pixels"].copy())
            draw: Tensor | float = centre_draw(noise.kind)
            if part.payload["add_noise"]:
                draw = input_noise(noise.kind, int(part.payload["seed"]), 1, self.model.modelled_shape)
            parts.append(add_noise(self.model.codec.modelled(pixels), noise, draw))
        return self.model.flow.patchify(torch.cat(parts).to(self.model.device))

    def _run(self) -> Generator[Progress, Message, Tensor]:
        for part in self.parts:
            self.model.check_label(part.payload["label"])
        if self.parts[0].job.op is Op.DENOISE:
            x_BTD = self._noisy_images()
        else:
            self._decoded = yield from self._decode()
            x_BTD = self._decoded.x_BTD
        if _denoises(self.parts[0].job):
            self.stage = "denoise"
            rows = self._denoise_rows()
            x_BTD = yield from denoise(self.model.flow, x_BTD, self._labels(), self.model.noise.std, rows)
        return x_BTD

    def _decode(self) -> Sampling:
        """Latents to samples, by the plan for the strictest row; all rows have the same way to solve."""
        labels = [part.payload["label"] for part in self._row_parts]
        options = [SamplingDefaults(**part.payload["options"]) for part in self._row_parts]
        solver = _strictest(self.parts)
        tolerances = [float(part.payload["solver"]["tolerance"]) for part in self._row_parts]
        rows = make_rows(self._latents(), labels, options, tolerances)
        self.plan = self.model.sampler.plan(rows, solver)
        self._words = {part: self.plan.describe() for part in self.parts}
        trajectory = any(part.payload.get("trajectory") for part in self.parts)
        return (
            yield from self.model.sampler.decode(rows, solver, plan=self.plan, trajectory=trajectory, boundaries=True)
        )

    def drop(self, job_ids: Collection[str]) -> None:
        """Let the rows of these jobs leave before the next slice."""
        self._dropped |= {part.job.id for part in self.parts} & set(job_ids)

    def dropped(self, job: Job) -> bool:
        """Whether the job's rows have left or are about to."""
        return job.id in self._dropped or all(part.job.id != job.id for part in self.parts)

    def _keep(self) -> Tensor | None:
        """Indices of the rows that stay, or ``None`` when all do."""
        if not self._dropped or not self._started:
            return None
        index = [i for i, part in enumerate(self._row_parts) if part.job.id not in self._dropped]
        self._row_parts = [self._row_parts[i] for i in index]
        self.parts = [part for part in self.parts if part.job.id not in self._dropped]
        self._dropped = set()
        return torch.tensor(index, dtype=torch.long, device=self.model.device)

    def meets(self, other: Cohort) -> bool:
        """Whether both stand before the same block, on the way to the same kind of result."""
        if self.boundary is None or other.boundary is None:
            return False
        return self.model is other.model and self.kind == other.kind and self.boundary.meets(other.boundary)

    def is_followed_by(self, other: Cohort) -> bool:
        """Whether the other is inside the block before the boundary at which this one stands."""
        if self.boundary is None or other.boundary is not None or other.block is None:
            return False
        place = (other.stage, other.block + 1) == (self.boundary.stage, self.boundary.block)
        return place and self.model is other.model and self.kind == other.kind

    def join(self, other: Cohort) -> bool:
        """Take in the rows of another that :meth:`meets`, and do one slice; the other is finished by that."""
        here, there = self.boundary, other.boundary
        if here is None or there is None:
            raise ValueError("cohorts join where both stand at a boundary")
        # First of all: whatever fails from here on, all parts are known to be here.
        self._row_parts += other._row_parts
        self.parts += other.parts
        self._dropped |= other._dropped
        plan = self._plan_for(here, there, _strictest(self.parts))
        for part in other.parts:
            self._seconds_before[part] = other.seconds_of(part) - self.seconds
        self._words |= other._words
        if plan is not None:
            self.plan, rest = plan, plan.describe()
            self._words = {part: [*words[: here.block], *rest[here.block :]] for part, words in self._words.items()}
        other._slices.close()
        other.boundary = None
        return self._step(there, plan)

    def _plan_for(self, here: Boundary, there: Boundary, solver: SolverOptions) -> Plan | None:
        """How the blocks to come are solved for the rows of both; ``None``: as for those that are here."""
        if here.stage == "polish":
            return None
        if here.block and not (here.batch.iterates or there.batch.iterates):
            # Rows that were exact so far are to stay exact: iterating now would cost a certificate, too.
            return None
        return self.model.sampler.plan(Rows.concatenate([here.rows, there.rows]), solver)

    def advance(self) -> bool:
        """Do one slice; ``True`` when the cohort is finished (or has no rows left)."""
        return self._step()

    def _step(self, joining: Boundary | None = None, plan: Plan | None = None) -> bool:
        keep = self._keep()
        if not self.parts:
            self._slices.close()
            self.boundary = None
            return True
        start = time.perf_counter()
        if keep is not None and self._decoded is not None:
            # Sampling has ended, so it does not hear of the rows that leave.
            self._decoded = self._decoded.select(keep)
        try:
            progress: Progress = self._slices.send(keep if joining is None else Join(joining, plan, keep))
            self._started = True
            self.fraction = max(self.fraction, progress.fraction)
            self.stage, self.block = progress.stage or self.stage, progress.block
            self.boundary = progress.boundary
            self._wait_for_device()
            return False
        except StopIteration as stop:
            self._images = self.model.images(stop.value)
            return True
        finally:
            self.seconds += time.perf_counter() - start

    def _wait_for_device(self) -> None:
        """On a GPU, let at most two slices be queued, so that an urgent batch finds a short queue."""
        if self.model.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append(event)
        if len(self._in_flight) > 2:
            self._in_flight.popleft().synchronize()

    def previews(self) -> list[Preview]:
        """After a slice: the states of those parts that want to be shown where the cohort has just come to."""
        here = self.boundary
        # A polish goes through the blocks once more; its draft has been shown.
        if here is None or here.stage not in SHOWN_STAGES:
            return []
        num_blocks = len(self.model.flow.blocks)
        states: NDArray[np.uint8] | None = None
        previews, start = [], 0
        for part in self.parts:
            rows = slice(start, start + part.rows)
            start += part.rows
            wanted = preview_blocks(num_blocks, part.payload.get("previews", 0))
            if here.block in wanted and part.job.id not in self._dropped:
                if states is None:
                    states = self.model.pixels(self.model.images(here.batch.x_BTD))
                previews.append(Preview(part, here.block, num_blocks, states[rows]))
        return previews

    def results(self) -> list[tuple[Part, Arrays]]:
        """Per part: pixels (n, C, H, W) uint8, finite (n,) uint8, and images float32 where asked for.

        Values that are not finite become the nearest finite grey, and the row's ``finite`` is 0. For sampled and
        decoded images also backward_error (n,) float32 (nan: no certificate), redone (n,) uint8 (index in
        :data:`~service.jobs.REDONE`), passes (n,) int64, and where asked for trajectory (n, blocks, C, H, W), uint8
        or with floats float32.
        """
        if self._images is None:
            return []
        finite = torch.isfinite(self._images).flatten(1).all(dim=1).to(torch.uint8).cpu().numpy()
        pixels = self.model.pixels(self._images)
        results, start = [], 0
        for part in self.parts:
            rows = slice(start, start + part.rows)
            start += part.rows
            if part.job.id in self._dropped:
                continue
            arrays: Arrays = {"pixels": pixels[rows], "finite": finite[rows]}
            if part.payload.get("floats"):
                arrays["images"] = as_floats(self._images[rows].cpu().numpy())
            if self._decoded is not None:
                arrays |= self._certificates(self._decoded, rows)
                if part.payload.get("trajectory"):
                    arrays["trajectory"] = self._trajectory(
                        self._decoded, rows, floats=bool(part.payload.get("floats"))
                    )
            results.append((part, arrays))
        return results

    @staticmethod
    def _certificates(decoded: Decoded, rows: slice) -> Arrays:
        """What the sampler says of its rows."""
        return {
            "backward_error": as_floats(decoded.backward_error_B[rows].cpu().numpy()),
            "redone": decoded.redone_B[rows].to(torch.uint8).cpu().numpy(),
            "passes": decoded.passes_B[rows].cpu().numpy(),
        }

    def _trajectory(self, decoded: Decoded, rows: slice, *, floats: bool) -> NDArray[Any]:
        """The rows after each block, (n, blocks, C, H, W)."""
        states = [self.model.images(state[rows]) for state in decoded.trajectory]
        if floats:
            return as_floats(torch.stack(states, dim=1).cpu().numpy())
        return np.stack([self.model.pixels(state) for state in states], axis=1)
