"""The samplers that the benchmark compares, each ready to run on one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.calibration import (
    GREY_LEVEL,
    Outcome,
    calibrate,
    calibrate_fastest,
    gs_jacobi_method,
    gs_jacobi_strategies,
    make_trials,
    selective_jacobi_method,
)
from benchmarks.models import Subject
from benchmarks.published import sample
from benchmarks.published.guidance import Guidance
from benchmarks.timing import seconds
from model.config import SamplingDefaults, SolverOptions
from model.noise import latents
from model.sampling.costs import measure_costs
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Sampler

PUBLISHED, SEQUENTIAL, PLAN = "published loop", "our sequential", "our plan"
CALIBRATION_IMAGES = 4
SEGMENTS = (0, 1, 4)
"""Segments tried for the tough blocks of GS-Jacobi; 0 is the published loop there."""
SELECTIVE, GS_JACOBI = "selective Jacobi", "GS-Jacobi"


@dataclass(frozen=True)
class Method:
    """A way to sample a batch."""

    name: str
    run: Callable[[], Tensor]
    """Draws the batch, (B, T, D)."""
    threads: int | None = None
    """Threads that suit it best here; None where it chooses by itself."""
    note: str = ""
    """How it was set."""

    def timed(self, device: torch.device) -> tuple[float, Tensor]:
        """Seconds for the batch, and its patches."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return seconds(self.run, device)
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Batch:
    """What all methods draw."""

    rows: Rows
    y_B: Tensor | None
    guidance: Guidance


def make_batch(subject: Subject, size: int, guidance: Guidance, device: torch.device) -> Batch:
    """Seeds 0, 1, …, classes in turn."""
    config = subject.flow.config
    latent_BTD = latents(range(size), config.num_patches, config.patch_dim).to(device)
    labels: list[int | None] = [i % config.num_classes if config.num_classes else None for i in range(size)]
    options = SamplingDefaults(
        guidance_scale=guidance.scale,
        guidance_schedule="linear" if guidance.linear else "constant",
        attention_temperature=guidance.attention_temperature,
    )
    rows = make_rows(latent_BTD, labels, [options] * size)
    return Batch(rows, rows.label_B if config.num_classes else None, guidance)


def make_methods(subject: Subject, batch: Batch, names: list[str], device: torch.device, bf16: bool) -> list[Method]:
    """The named methods; the approximate ones with the loosest setting that keeps calibration images within a level."""
    flow, rows = subject.flow, batch.rows
    sampler = Sampler(flow, subject.convergence)
    sampler.costs = measure_costs(sampler.kernel, 2 * len(rows), sampler.graphs)

    def ours(options: SolverOptions) -> Callable[[], Tensor]:
        return lambda: finish(sampler.decode(rows, options)).x_BTD

    methods = []
    if PUBLISHED in names:
        methods.append(
            _with_best_threads(PUBLISHED, lambda: sample(flow, rows.latent_BTD, batch.y_B, *batch.guidance), device)
        )
    if SEQUENTIAL in names:
        methods.append(Method(SEQUENTIAL, ours(SolverOptions(solver="sequential"))))
    approximate = {SELECTIVE, GS_JACOBI} & set(names)
    # A tolerance that suits one small batch may not suit the next.
    count = max(1, CALIBRATION_IMAGES // len(rows))
    trials = make_trials(flow, len(rows), count, batch.guidance) if approximate else []
    if SELECTIVE in names:
        selective = selective_jacobi_method(flow, batch.guidance)
        outcome = calibrate(selective, trials)
        tolerance = outcome.tolerance
        methods.append(
            _with_best_threads(
                SELECTIVE, lambda: selective(rows.latent_BTD, batch.y_B, tolerance)[0], device, _note(outcome)
            )
        )
    if GS_JACOBI in names:
        strategies = gs_jacobi_strategies(flow, trials, SEGMENTS)
        candidates = {count: gs_jacobi_method(flow, batch.guidance, s) for count, s in strategies.items()}
        segments, best = calibrate_fastest(candidates, trials, repeats=1)
        gs_jacobi = candidates[segments]
        note = f"{segments} segments in tough blocks, {_note(best)}"
        methods.append(
            _with_best_threads(
                GS_JACOBI, lambda: gs_jacobi(rows.latent_BTD, batch.y_B, best.tolerance)[0], device, note
            )
        )
    if PLAN in names:
        options = SolverOptions()
        plan = sampler.plan(rows, options)
        words = ", ".join(plan.describe()) + ("" if plan.is_sequential else "; certificate included")
        methods.append(Method(PLAN, ours(options), note=words))
    if bf16:
        draft = SolverOptions(solver="sequential", precision="bf16", certify=False)
        methods.append(Method("our bf16 draft", ours(draft), note="certificate included, not polished"))
    return methods


def _note(outcome: Outcome) -> str:
    within = "" if outcome.within(GREY_LEVEL) else ", more than a grey level off"
    return f"tolerance {outcome.tolerance:g}{within}"


def _with_best_threads(name: str, run: Callable[[], Tensor], device: torch.device, note: str = "") -> Method:
    """The method with one thread or with all, whichever is faster for this batch."""
    if device.type != "cpu":
        return Method(name, run, note=note)
    choices = [Method(name, run, threads, note) for threads in sorted({1, torch.get_num_threads()})]
    for method in choices:
        method.timed(device)
    return min(choices, key=lambda method: method.timed(device)[0])
