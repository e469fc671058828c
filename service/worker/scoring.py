"""Score and encode jobs: many jobs' images in common batches, one parallel pass each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.flow import NO_CLASS
from model.likelihood import add_noise, bits_per_dim, centre_draw, combine_draws, encode, log_likelihood
from model.noise import input_noise
from service.jobs import Job, Op
from service.worker.loading import LoadedModel

Arrays = dict[str, NDArray[Any]]


def _noisy_rows(model: LoadedModel, job: Job) -> Iterator[tuple[Tensor, int]]:
    """The rows of a job, draw by draw: continuous image (C, H, W) and label."""
    payload = job.payload
    label = NO_CLASS if payload["label"] is None else int(payload["label"])
    pixels = torch.from_numpy(payload["pixels"].copy())
    draws = int(payload.get("draws", 1))
    for draw in range(draws):
        noise: Tensor | float = centre_draw(model.noise.kind)
        if payload.get("add_noise", True):
            # One draw at a time: K draws of large images together would not fit.
            noise = input_noise(model.noise.kind, int(payload["seed"]), 1, tuple(pixels.shape[1:]), first=draw)[0]
        for image in pixels:
            yield add_noise(image, model.noise, noise), label


def _batches(model: LoadedModel, jobs: Sequence[Job], batch_rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All rows of all jobs in order, as patches (B, T, D) and labels (B,) on the device."""
    batch_rows = model.pass_rows(batch_rows)
    images: list[Tensor] = []
    labels: list[int] = []

    def batch() -> tuple[Tensor, Tensor | None]:
        x_BTD = model.flow.patchify(torch.stack(images).to(model.device))
        y_B = torch.tensor(labels, device=model.device) if model.flow.config.num_classes else None
        return x_BTD, y_B

    for job in jobs:
        for image, label in _noisy_rows(model, job):
            images.append(image)
            labels.append(label)
            if len(images) == batch_rows:
                yield batch()
                images, labels = [], []
    if images:
        yield batch()


@torch.no_grad()
def score(model: LoadedModel, jobs: Sequence[Job], batch_rows: int) -> list[Arrays]:
    """Per job: log_likelihood (n,) nats, its spread over draws (n,), bits_per_dim (n,), as float64."""
    batches = _batches(model, jobs, batch_rows)
    nats = torch.cat([log_likelihood(model.flow, x, y).double().cpu() for x, y in batches])
    results, start = [], 0
    for job in jobs:
        draws = int(job.payload["draws"])
        by_draw = nats[start : start + draws * job.rows].view(draws, job.rows)
        start += draws * job.rows
        combined = combine_draws(by_draw, model.noise)
        spread = by_draw.std(dim=0) if draws > 1 else torch.zeros(job.rows, dtype=torch.float64)
        bits = torch.as_tensor(bits_per_dim(combined, model.flow.config.num_dims, model.noise))
        results.append(
            {"log_likelihood": combined.numpy(), "log_likelihood_std": spread.numpy(), "bits_per_dim": bits.numpy()}
        )
    return results


def encode_images(model: LoadedModel, jobs: Sequence[Job], batch_rows: int) -> list[Arrays]:
    """Per job: latents (n, T, D) float32 and log_likelihood (n,) float64 in nats."""
    parts = [encode(model.flow, x, y) for x, y in _batches(model, jobs, batch_rows)]
    latents = torch.cat([u for u, _ in parts]).float().cpu().numpy()
    nats = torch.cat([value for _, value in parts]).double().cpu().numpy()
    ends = np.cumsum([job.rows for job in jobs])
    return [
        {"latents": latents[end - job.rows : end], "log_likelihood": nats[end - job.rows : end]}
        for job, end in zip(jobs, ends, strict=True)
    ]


RUN = {Op.SCORE: score, Op.ENCODE: encode_images}
