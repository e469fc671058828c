"""The samplers that the benchmark compares, each ready to run on one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from benchmarks.calibration import Method as ApproximateMethod
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
LEVEL_PLAN = "our plan to a level"
"""Our plan with the loosest tolerance that keeps a grey level, as the published methods have it."""
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
    y_B = torch.arange(size, device=device) % config.num_classes if config.num_classes else None
    return Batch(_rows(latent_BTD, y_B, guidance), y_B, guidance)


def _rows(
    latent_BTD: Tensor, y_B: Tensor | None, guidance: Guidance, tolerance: float = SolverOptions.tolerance
) -> Rows:
    """Our own form of what the published methods take."""
    labels: list[int | None] = [None] * len(latent_BTD) if y_B is None else [int(y) for y in y_B]
    options = SamplingDefaults(
        guidance_scale=guidance.scale,
        guidance_schedule="linear" if guidance.linear else "constant",
        attention_temperature=guidance.attention_temperature,
    )
    return make_rows(latent_BTD, labels, [options] * len(latent_BTD), [tolerance] * len(latent_BTD))


def make_methods(subject: Subject, batch: Batch, names: list[str], device: torch.device, bf16: bool) -> list[Method]:
    """The named methods; the approximate ones with the loosest setting that keeps calibration images within a level."""
    flow, rows = subject.flow, batch.rows
    sampler = Sampler(flow, subject.convergence)
    sampler.costs = measure_costs(sampler.kernel, 2 * len(rows), sampler.graphs)

    def ours(options: SolverOptions) -> Callable[[], Tensor]:
        ours = replace(rows, tolerance_B=torch.full_like(rows.tolerance_B, options.tolerance))
        return lambda: finish(sampler.decode(ours, options)).x_BTD

    methods = []
    if PUBLISHED in names:
        methods.append(
            _with_best_threads(PUBLISHED, lambda: sample(flow, rows.latent_BTD, batch.y_B, *batch.guidance), device)
        )
    if SEQUENTIAL in names:
        methods.append(Method(SEQUENTIAL, ours(SolverOptions(solver="sequential"))))
    approximate = {SELECTIVE, GS_JACOBI, LEVEL_PLAN} & set(names)
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
        methods.append(Method(PLAN, ours(options), note=_plan_note(sampler, rows, options)))
    if LEVEL_PLAN in names:
        outcome = calibrate(_plan_method(sampler, batch.guidance), trials)
        options = SolverOptions(tolerance=outcome.tolerance)
        methods.append(
            Method(LEVEL_PLAN, ours(options), note=f"{_plan_note(sampler, rows, options)}; {_note(outcome)}")
        )
    if bf16:
        draft = SolverOptions(solver="sequential", precision="bf16", certify=False)
        methods.append(Method("our bf16 draft", ours(draft), note="certificate included, not polished"))
    return methods


def _plan_method(sampler: Sampler, guidance: Guidance) -> ApproximateMethod:
    """Our sampler with only its tolerance left open; its iterations are not counted by block."""

    def method(latent_BTD: Tensor, y_B: Tensor | None, tolerance: float) -> tuple[Tensor, list[int]]:
        rows = _rows(latent_BTD, y_B, guidance, tolerance)
        return finish(sampler.decode(rows, SolverOptions(tolerance=tolerance))).x_BTD, []

    return method


def _plan_note(sampler: Sampler, rows: Rows, options: SolverOptions) -> str:
    plan = sampler.plan(rows, options)
    return ", ".join(plan.describe()) + ("" if plan.is_sequential else "; certificate included")


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
