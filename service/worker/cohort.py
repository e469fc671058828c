"""A cohort: rows of several jobs that go through the sampler together, slice by slice."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from model.config import SamplingDefaults
from model.denoise import ROWS_PER_SLICE, denoise
from model.flow import NO_CLASS
from model.likelihood import add_noise, centre_draw, to_pixels
from model.noise import input_noise, latents
from model.sampling.rows import Progress, Slices, make_rows
from model.sampling.sequential import decode
from service.jobs import Job, Op, as_floats
from service.worker.loading import LoadedModel
from service.worker.scoring import Arrays

GPU_DENOISE_ROWS = 64


def _denoises(job: Job) -> bool:
    return job.op is Op.DENOISE or bool(job.payload["options"]["denoise"])


def group(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can share a cohort: the same model, and the same stages."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.model, job.op is Op.DENOISE, _denoises(job)), []).append(job)
    return list(groups.values())


class Cohort:
    """Jobs of one :func:`group` in flight. :meth:`advance` until it returns ``True``, then :meth:`results`."""

    def __init__(self, model: LoadedModel, jobs: Sequence[Job]) -> None:
        self.model, self.jobs = model, list(jobs)
        self.seconds = 0.0
        self.fraction = 0.0
        self._row_jobs = [job for job in jobs for _ in range(job.rows)]
        self._dropped: set[str] = set()
        self._started = False
        self._images: Tensor | None = None
        # On a CPU a slice should stay short; a GPU wants rows.
        self._denoise_rows = model.pass_rows(ROWS_PER_SLICE if model.device.type == "cpu" else GPU_DENOISE_ROWS)
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
            labels = [job.payload["label"] for job in self._row_jobs]
            options = [SamplingDefaults(**job.payload["options"]) for job in self._row_jobs]
            x_BTD = yield from decode(self.model.flow, make_rows(self._latents(), labels, options))
        if _denoises(self.jobs[0]):
            x_BTD = yield from denoise(self.model.flow, x_BTD, self._labels(), self.model.noise.std, self._denoise_rows)
        return x_BTD

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

        Values that are not finite become the nearest finite grey, and the row's ``finite`` is 0.
        """
        if self._images is None:
            return []
        finite = torch.isfinite(self._images).flatten(1).all(dim=1)
        images = torch.nan_to_num(self._images, nan=0.0, posinf=1.0, neginf=-1.0)
        pixels = to_pixels(images, self.model.noise.kind).cpu().numpy()
        results, start = [], 0
        for job in self.jobs:
            rows = slice(start, start + job.rows)
            start += job.rows
            if job.id in self._dropped:
                continue
            arrays: Arrays = {"pixels": pixels[rows], "finite": finite[rows].to(torch.uint8).cpu().numpy()}
            if job.payload.get("floats"):
                arrays["images"] = as_floats(self._images[rows].cpu().numpy())
            results.append((job, arrays))
        return results
