"""Tuning a bundle's samplers: how its blocks converge, written to sampler.json, and what that means here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from model.bundle import Bundle
from model.config import SolverOptions
from model.likelihood import add_noise
from model.noise import input_noise, latents
from model.sampling.convergence import measure_convergence
from model.sampling.costs import measure_costs
from model.sampling.plan import ConvergenceProfile, CostProfile, Plan, choose
from model.sampling.rows import make_rows
from model.sampling.sampler import Sampler
from model.weights import load_flow
from training.classes import match_labels
from training.data import Images
from training.latents import load_known_images, modelled

BATCHES = (1, 16, 64)
"""Batch sizes for which the plan on this device is shown."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What is measured."""

    num_images: int = 32
    """Images that are sampled, and as many of the data that are looked at."""
    tolerance: float = SolverOptions.tolerance
    """Backward error that the images must stay below."""
    split: str = "train"
    """Split of the data."""
    seed: int = 0
    """Image i has the latents, or the noise, of seed + i."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images: got {self.num_images}, allowed is an integer >= 1")
        # Refuses what no request may ask for.
        SolverOptions(tolerance=self.tolerance)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was measured: of the weights, and of passes on this device."""

    profile: ConvergenceProfile
    costs: CostProfile
    plans: dict[int, Plan]
    """The plan by batch size, here, with guidance as measured."""


def tune(
    bundle: Bundle,
    data: Path,
    options: TuneOptions,
    device: torch.device,
    show: Callable[[str], None],
    cache: Path | None = None,
) -> Tuning:
    """Measure a bundle's convergence profile with its recommended sampling parameters.

    ``show`` is told what comes next; ``cache`` is that of :func:`training.data.load_images`. Raises
    :class:`training.data.DataError` for unusable data, and ``ValueError`` for classes that do not fit or a model whose
    samples are not finite.
    """
    config, flow_config = bundle.config, bundle.config.flow
    images = load_known_images(bundle, data, options.split, cache)
    if flow_config.num_classes:
        images = match_labels(images, config.class_names, config.name)
    # Spread over the data, since folders of images come class by class.
    index = np.linspace(0, len(images) - 1, min(options.num_images, len(images))).astype(np.int64)
    images = modelled(bundle, Images(images.pixels[index], images.labels[index], images.class_names), device)
    flow = load_flow(bundle, device)
    seeds = range(options.seed, options.seed + len(images))
    shape = images.pixels.shape[1:]
    noisy = [
        add_noise(torch.from_numpy(pixels), config.noise, input_noise(config.noise.kind, seed, 1, shape)[0])
        for pixels, seed in zip(images.pixels, seeds, strict=True)
    ]
    x_BTD = flow.patchify(torch.stack(noisy).to(device))
    labels: list[int | None] = [None] * len(images)
    y_B = None
    if flow_config.num_classes:
        labels = [i % flow_config.num_classes for i in range(len(images))]
        y_B = torch.from_numpy(images.labels).to(device)
    guidance = replace(bundle.sampling, denoise=False)
    u_BTD = latents(seeds, flow_config.num_patches, flow_config.patch_dim).to(device)
    rows = make_rows(u_BTD, labels, [guidance] * len(labels), options.tolerance)
    steps = measure_convergence(Sampler(flow), rows, x_BTD, y_B, guidance, options.tolerance)
    while True:
        try:
            show(next(steps))
        except StopIteration as stop:
            profile: ConvergenceProfile = stop.value
            break
    show("pass costs on this device")
    guided = [len(rows.guided(number, block)) > 0 for number, block in enumerate(reversed(flow.blocks))]
    costs = measure_costs(Sampler(flow).kernel, 2 * max(BATCHES))
    plans = {
        batch: choose(
            "auto", options.tolerance, flow_config, profile, costs, batch, [batch * (1 + twice) for twice in guided]
        )
        for batch in BATCHES
    }
    return Tuning(profile=profile, costs=costs, plans=plans)


def tables(tuning: Tuning) -> list[Table]:
    """The profile by block, and the plan by batch size."""
    profile = tuning.profile
    segments = sorted(profile.blocks[0].passes, reverse=True)
    blocks = Table(
        title=f"Convergence of {profile.num_images} images to a backward error of {profile.tolerance:g}",
        caption="blocks in the order of sampling; passes are the mean of a row in each segment of so many patches",
    )
    for column in ("block", "CRM share", "IGM latent", "IGM zeros", *(f"passes/{n}" for n in segments)):
        blocks.add_column(column, justify="right")
    for number, block in enumerate(profile.blocks):
        figures = [f"{block.crm:.3f}", f"{block.igm_latent:.2f}", f"{block.igm_zeros:.2f}"]
        blocks.add_row(str(number), *figures, *(f"{block.passes[n]:.1f}" for n in segments))
    plans = Table(title="Plan on this device", caption="jacobi/n: n patches are iterated together")
    plans.add_column("batch", justify="right")
    plans.add_column("blocks")
    for batch, plan in tuning.plans.items():
        plans.add_row(str(batch), ", ".join(plan.describe()))
    return [blocks, plans]
