"""Score, classify and encode jobs: many jobs' images in common batches, one parallel pass each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bayes import every_label, posterior
from model.flow import NO_CLASS
from model.likelihood import add_noise, bits_per_dim, centre_draw, combine_draws, encode, log_likelihood
from model.noise import input_noise
from service.jobs import Job, Op
from service.worker.loading import LoadedModel
from service.worker.statistics import gives_likelihood, statistics

Arrays = dict[str, NDArray[Any]]


def _labels(model: LoadedModel, job: Job) -> tuple[int, ...]:
    """The labels that each image of a job is scored with: its one, or to classify none and every class."""
    if job.op is Op.CLASSIFY:
        return every_label(model.flow.config.num_classes)
    label = job.payload["label"]
    return (NO_CLASS if label is None else int(label),)


def network_rows(model: LoadedModel, job: Job) -> int:
    """Rows of a job's passes: images × draws × labels."""
    return job.rows * int(job.payload.get("draws", 1)) * len(_labels(model, job))


def _noisy_rows(model: LoadedModel, job: Job) -> Iterator[tuple[Tensor, int]]:
    """The rows of a job, draw by draw, image by image, label by label: continuous image (C, H, W) and label."""
    payload, labels = job.payload, _labels(model, job)
    model.check_label(payload.get("label"))
    pixels = torch.from_numpy(payload["pixels"].copy())
    draws = int(payload.get("draws", 1))
    # Once for all draws: an autoencoder is more work than a pass of many a flow.
    images = model.codec.modelled(pixels)
    for draw in range(draws):
        noise: Tensor | float = centre_draw(model.noise.kind)
        if payload.get("add_noise", True):
            # One draw at a time: K draws of large images together would not fit.
            noise = input_noise(model.noise.kind, int(payload["seed"]), 1, model.modelled_shape, first=draw)[0]
        for image in images:
            noisy = add_noise(image, model.noise, noise)
            yield from ((noisy, label) for label in labels)


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
def _log_likelihoods(model: LoadedModel, jobs: Sequence[Job], batch_rows: int) -> list[Tensor]:
    """Per job: nats (draws, n, labels) float64 of every draw and image given every label."""
    if not jobs:
        return []
    batches = _batches(model, jobs, batch_rows)
    nats = torch.cat([log_likelihood(model.flow, x, y).double().cpu() for x, y in batches])
    shapes = [(int(job.payload["draws"]), job.rows, len(_labels(model, job))) for job in jobs]
    parts = nats.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def score(model: LoadedModel, jobs: Sequence[Job], batch_rows: int) -> list[Arrays]:
    """Per job: log_likelihood (n,) nats, its spread over draws (n,), bits_per_dim (n,), as float64.

    Jobs that ask for statistics get these too: see :mod:`service.worker.statistics`.
    """
    results: list[Arrays] = []
    others = iter(_log_likelihoods(model, [job for job in jobs if not gives_likelihood(job)], batch_rows))
    for job in jobs:
        nats_B, seen = statistics(model, job, batch_rows)
        by_draw = nats_B[None] if nats_B is not None and gives_likelihood(job) else next(others)[..., 0]
        combined = combine_draws(by_draw, model.noise)
        spread = by_draw.std(dim=0) if len(by_draw) > 1 else torch.zeros_like(combined)
        bits = torch.as_tensor(bits_per_dim(combined, model.flow.config.num_dims, model.noise))
        own = {"log_likelihood": combined, "log_likelihood_std": spread, "bits_per_dim": bits}
        results.append({name: values.numpy() for name, values in own.items()} | seen)
    return results


def classify(model: LoadedModel, jobs: Sequence[Job], batch_rows: int) -> list[Arrays]:
    """Per job, as float64: probability and log_likelihood (n, Y) of every class, log_marginal and
    log_likelihood_no_class (n,), in nats."""
    results = []
    for nats in _log_likelihoods(model, jobs, batch_rows):
        found = posterior(nats[..., 1:], model.info.class_prior, model.noise)
        results.append(
            {
                "probability": found.probability_BY.numpy(),
                "log_likelihood": found.log_likelihood_BY.numpy(),
                "log_marginal": found.log_marginal_B.numpy(),
                "log_likelihood_no_class": combine_draws(nats[..., 0], model.noise).numpy(),
            }
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


RUN = {Op.SCORE: score, Op.CLASSIFY: classify, Op.ENCODE: encode_images}
