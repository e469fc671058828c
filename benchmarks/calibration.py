"""Approximate samplers at equal quality: the loosest tolerance that keeps every value within one grey level.

A tolerance means something else in every method, and in some something else for every batch size.
Comparing speeds at the same images needs a tolerance for each, found on seeds that are not measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.published.gs_jacobi import Strategy, gs_jacobi
from benchmarks.published.guidance import Guidance
from benchmarks.published.loop import sample
from benchmarks.published.selective_jacobi import selective_jacobi
from benchmarks.published.strategy import PUBLISHED_ITERATIONS, choose_strategy
from benchmarks.timing import seconds
from model.flow import Flow
from model.noise import latents

GREY_LEVEL = 2 / 255
"""One of 255 grey levels on the scale [−1, 1] of the patches."""

LADDER = tuple(digit * 10.0**power for power in range(-1, -7, -1) for digit in (5, 2, 1))
"""Tolerances from loose to tight: 0.5, 0.2, 0.1 … 1e-6."""

SEGMENTS = (0, 1, 2, 4, 7)
"""Into how many segments the tough blocks of GS-Jacobi may be divided; 0 for the published loop there."""

FIRST_SEED = 1_000_000
"""Calibration begins at this seed, away from the small ones that benchmarks measure."""

Method = Callable[[Tensor, Tensor | None, float], tuple[Tensor, list[int]]]
"""Latents (B, T, D), classes (B,) and a tolerance to patches (B, T, D) and each block's iterations."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Trial:
    """A batch to sample and the images that it should give."""

    latent_BTD: Tensor
    y_B: Tensor | None
    exact_BTD: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a method did on some trials with a tolerance."""

    tolerance: float
    max_difference: float
    """Largest |Δ| of all values on the scale [−1, 1]; NaN when an iteration overflowed."""
    iterations: list[float]
    """Iterations of each block in the order of sampling, the mean over the trials."""

    def within(self, limit: float) -> bool:
        """Whether no value is further off than ``limit``."""
        return self.max_difference <= limit


def make_trials(flow: Flow, batch: int, count: int, guidance: Guidance, first_seed: int = FIRST_SEED) -> list[Trial]:
    """``count`` batches with the published loop's images in the flow's own precision."""
    config, like = flow.config, flow.blocks[0].proj_in.weight
    trials = []
    for start in range(first_seed, first_seed + batch * count, batch):
        seeds = range(start, start + batch)
        latent_BTD = latents(seeds, config.num_patches, config.patch_dim).to(like)
        y_B = None
        if config.num_classes:
            y_B = torch.tensor([seed % config.num_classes for seed in seeds], device=like.device)
        trials.append(Trial(latent_BTD, y_B, sample(flow, latent_BTD, y_B, *guidance)))
    return trials


def try_out(method: Method, trials: Sequence[Trial], tolerance: float, limit: float = math.inf) -> Outcome:
    """Run ``method`` with one tolerance on the trials, up to the first that is further off than ``limit``."""
    differences: list[float] = []
    iterations = []
    for trial in trials:
        x_BTD, counts = method(trial.latent_BTD, trial.y_B, tolerance)
        differences.append(float((x_BTD - trial.exact_BTD).abs().max()))
        iterations.append(counts)
        # Written so that a NaN ends it too.
        if not differences[-1] <= limit:
            break
    # Unlike Python's max, torch's keeps a NaN.
    largest = float(torch.tensor(differences).max())
    return Outcome(tolerance, largest, [statistics.mean(counts) for counts in zip(*iterations, strict=True)])


def calibrate(
    method: Method, trials: Sequence[Trial], ladder: Sequence[float] = LADDER, limit: float = GREY_LEVEL
) -> Outcome:
    """The outcome of the loosest tolerance in ``ladder`` that keeps all trials within ``limit``.

    When none does, that of the last one, whose :meth:`Outcome.within` is then false.
    """
    for tolerance in ladder:
        outcome = try_out(method, trials, tolerance, limit)
        if outcome.within(limit):
            break
    return outcome


def calibrate_fastest(
    methods: Mapping[Key, Method],
    trials: Sequence[Trial],
    ladder: Sequence[float] = LADDER,
    limit: float = GREY_LEVEL,
    repeats: int = 3,
) -> tuple[Key, Outcome]:
    """Calibrate every method; the fastest of those within ``limit`` on the trials, and its outcome.

    When none is within the limit, the fastest of all at the end of the ladder.
    """
    outcomes = {key: calibrate(method, trials, ladder, limit) for key, method in methods.items()}
    qualified = [key for key, outcome in outcomes.items() if outcome.within(limit)] or list(outcomes)
    device = trials[0].latent_BTD.device
    taken: dict[Key, list[float]] = {key: [] for key in qualified}
    # In turns, so that what else the machine does hits all.
    for _ in range(repeats):
        for key in qualified:
            run = partial(try_out, methods[key], trials, outcomes[key].tolerance)
            taken[key].append(seconds(run, device)[0])
    best = min(qualified, key=lambda key: statistics.median(taken[key]))
    return best, outcomes[best]


def selective_jacobi_method(flow: Flow, guidance: Guidance) -> Method:
    """Selective Jacobi decoding with only its tolerance left open."""

    def method(latent_BTD: Tensor, y_B: Tensor | None, tolerance: float) -> tuple[Tensor, list[int]]:
        return selective_jacobi(flow, latent_BTD, y_B, *guidance, tolerance)

    return method


def gs_jacobi_method(flow: Flow, guidance: Guidance, strategy: Strategy) -> Method:
    """GS-Jacobi with only its tolerance left open."""

    def method(latent_BTD: Tensor, y_B: Tensor | None, tolerance: float) -> tuple[Tensor, list[int]]:
        return gs_jacobi(flow, latent_BTD, y_B, *guidance, strategy, tolerance)

    return method


def _images(trials: Sequence[Trial]) -> tuple[Tensor, Tensor | None]:
    """All exact images of the trials and their classes."""
    labels = [trial.y_B for trial in trials if trial.y_B is not None]
    return torch.cat([trial.exact_BTD for trial in trials]), torch.cat(labels) if labels else None


def published_gs_jacobi_strategy(flow: Flow, trials: Sequence[Trial]) -> Strategy:
    """The authors' segments and limits on iterations, with metrics taken on the trials' images."""
    return choose_strategy(flow, *_images(trials), iterations=PUBLISHED_ITERATIONS)


def gs_jacobi_strategies(
    flow: Flow, trials: Sequence[Trial], segments: Sequence[int] = SEGMENTS
) -> dict[int, Strategy]:
    """A strategy for each number of segments in the tough blocks, with metrics taken on the trials' images."""
    chosen = choose_strategy(flow, *_images(trials))
    tough = [count > 1 for count in chosen.segments]
    return {count: replace(chosen, segments=[count if it else 1 for it in tough]) for count in segments}
