"""A cohort: rows of several jobs that go through the sampler together, slice by slice."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import SamplingDefaults, SolverOptions
from model.denoise import denoise
from model.flow import NO_CLASS
from model.likelihood import add_noise, centre_draw, to_pixels
from model.noise import input_noise, latents
from model.sampling.plan import Plan
from model.sampling.rows import Progress, Slices, make_rows
from model.sampling.sampler import Decoded, Sampling
from service.jobs import Job, Op, as_floats
from service.worker.loading import DENOISE_PASSES, LoadedModel
from service.worker.scoring import Arrays


def _denoises(job: Job) -> bool:
    return job.op is Op.DENOISE or bool(job.payload["options"]["denoise"])


def _stages(job: Job) -> tuple[Any, ...]:
    """What rows of a cohort have in common: where they are going, and how. Tolerances are each row's own."""
    if job.op is Op.DENOISE:
        return (job.model,)
    solver = job.payload["solver"]
    return (job.model, _denoises(job), solver["solver"], solver["precision"], solver["certify"])


def group(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can share a cohort: the same model, the same stages, the same way to solve."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(_stages(job), []).append(job)
    return list(groups.values())


class Cohort:
    """Jobs of one :func:`group` in flight. :meth:`advance` until it returns ``True``, then :meth:`results`."""

    def __init__(self, model: LoadedModel, jobs: Sequence[Job]) -> None:
        self.model, self.jobs = model, list(jobs)
        self.seconds = 0.0
        self.fraction = 0.0
        self.plan: Plan | None = None
        """How sampling inverts the blocks, once it has begun."""
        self._row_jobs = [job for job in jobs for _ in range(job.rows)]
        self._dropped: set[str] = set()
        self._started = False
        self._decoded: Decoded | None = None
        self._images: Tensor | None = None
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._slices = self._run()

    @property
    def rows(self) -> int:
        """Images still in the cohort."""
        return len(self._row_jobs)

    def _labels(self) -> Tensor | None:
        if not self.model.flow.config.num_classes:
            return None
        labels = [NO_CLASS if job.payload["label"] is None else job.payload["label"] for job in self._row_jobs]
        return torch.tensor(labels, device=self.model.device)

    def _latents(self) -> Tensor:
        config = self.model.flow.config
        parts = [
            latents(job.payload["seeds"], config.num_patches, config.patch_dim)
            if job.op is Op.SAMPLE
            else torch.from_numpy(job.payload["latents"].copy())
            for job in self.jobs
        ]
        return torch.cat(parts).to(self.model.device)

    def _noisy_images(self) -> Tensor:
        noise = self.model.noise
        parts = []
        for job in self.jobs:
            pixels = torch.from_numpy(job.payload["pixels"].copy())
            draw: Tensor | float = centre_draw(noise.kind)
            if job.payload["add_noise"]:
                draw = input_noise(noise.kind, int(job.payload["seed"]), 1, tuple(pixels.shape[1:]))
            parts.append(add_noise(pixels, noise, draw))
        return self.model.flow.patchify(torch.cat(parts).to(self.model.device))

    def _run(self) -> Slices:
        if self.jobs[0].op is Op.DENOISE:
            x_BTD = self._noisy_images()
        else:
            self._decoded = yield from self._decode()
            x_BTD = self._decoded.x_BTD
        if _denoises(self.jobs[0]):
            rows = self.model.slice_rows(DENOISE_PASSES)
            x_BTD = yield from denoise(self.model.flow, x_BTD, self._labels(), self.model.noise.std, rows)
        return x_BTD

    def _decode(self) -> Sampling:
        """Latents to samples, by the plan for the strictest row; all rows have the same way to solve."""
        labels = [job.payload["label"] for job in self._row_jobs]
        options = [SamplingDefaults(**job.payload["options"]) for job in self._row_jobs]
        solver = min((SolverOptions(**job.payload["solver"]) for job in self.jobs), key=lambda s: s.tolerance)
        tolerances = [float(job.payload["solver"]["tolerance"]) for job in self._row_jobs]
        rows = make_rows(self._latents(), labels, options, tolerances)
        self.plan = self.model.sampler.plan(rows, solver)
        trajectory = any(job.payload.get("trajectory") for job in self.jobs)
        return (yield from self.model.sampler.decode(rows, solver, plan=self.plan, trajectory=trajectory))

    def drop(self, job_ids: Collection[str]) -> None:
        """Let the rows of these jobs leave before the next slice."""
        self._dropped |= {job.id for job in self.jobs} & set(job_ids)

    def _keep(self) -> Tensor | None:
        """Indices of the rows that stay, or ``None`` when all do."""
        if not self._dropped or not self._started:
            return None
        index = [i for i, job in enumerate(self._row_jobs) if job.id not in self._dropped]
        self._row_jobs = [self._row_jobs[i] for i in index]
        self.jobs = [job for job in self.jobs if job.id not in self._dropped]
        self._dropped = set()
        return torch.tensor(index, dtype=torch.long, device=self.model.device)

    def advance(self) -> bool:
        """Do one slice; ``True`` when the cohort is finished (or has no rows left)."""
        keep = self._keep()
        if not self.jobs:
            self._slices.close()
            return True
        start = time.perf_counter()
        if keep is not None and self._decoded is not None:
            # Sampling has ended, so it does not hear of the rows that leave.
            self._decoded = self._decoded.select(keep)
        try:
            progress: Progress = self._slices.send(keep)
            self._started = True
            self.fraction = progress.fraction
            self._wait_for_device()
            return False
        except StopIteration as stop:
            self._images = self.model.flow.unpatchify(stop.value)
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

    def results(self) -> list[tuple[Job, Arrays]]:
        """Per job: pixels (n, C, H, W) uint8, finite (n,) uint8, and images float32 where asked for.

        Values that are not finite become the nearest finite grey, and the row's ``finite`` is 0. For sampled and
        decoded images also backward_error (n,) float32 (nan: no certificate), redone (n,) uint8 (index in
        :data:`~service.jobs.REDONE`), passes (n,) int64, and where asked for trajectory (n, blocks, C, H, W), uint8
        or with floats float32.
        """
        if self._images is None:
            return []
        finite = torch.isfinite(self._images).flatten(1).all(dim=1).to(torch.uint8).cpu().numpy()
        pixels = self._to_pixels(self._images)
        results, start = [], 0
        for job in self.jobs:
            rows = slice(start, start + job.rows)
            start += job.rows
            if job.id in self._dropped:
                continue
            arrays: Arrays = {"pixels": pixels[rows], "finite": finite[rows]}
            if job.payload.get("floats"):
                arrays["images"] = as_floats(self._images[rows].cpu().numpy())
            if self._decoded is not None:
                arrays |= self._certificates(self._decoded, rows)
                if job.payload.get("trajectory"):
                    arrays["trajectory"] = self._trajectory(self._decoded, rows, floats=bool(job.payload.get("floats")))
            results.append((job, arrays))
        return results

    def _to_pixels(self, images: Tensor) -> NDArray[np.uint8]:
        finite = torch.nan_to_num(images, nan=0.0, posinf=1.0, neginf=-1.0)
        return to_pixels(finite, self.model.noise.kind).cpu().numpy()

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
        states = [self.model.flow.unpatchify(state[rows]) for state in decoded.trajectory]
        if floats:
            return as_floats(torch.stack(states, dim=1).cpu().numpy())
        return np.stack([self._to_pixels(state) for state in states], axis=1)
