"""From evaluations of bundles to their reports on disk: samples measured, the baseline trained, everything written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.weights import load_flow
from training.baselines.equal import Baseline, score_baseline, train_baseline
from training.classes import match_labels
from training.data import load_images
from training.evaluate import Evaluation
from training.quality import QualityOptions, measure_quality
from training.quality_report import write_report
from training.trainer import StepReport

BASELINE = "baseline"
"""Name of the baseline's run directory in that of the report."""
SECONDS_PER_LINE = 60.0


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report has beside the evaluation."""

    num_samples: int = 1000
    """Samples that are measured."""
    extractor: str = "efficientnet-lite0"
    """Name of the features' extractor, or a TorchScript file."""
    statistics: Path | None = None
    """Moments of real images' features in a file."""
    baseline: bool = False
    """Whether to train a coupling flow to compare with."""
    baseline_images: int | None = None
    """Images that it is trained on; as many as the bundle was."""


def write_reports(
    evaluations: Sequence[Evaluation],
    data: Path,
    out: Path,
    options: ReportOptions,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the report of one bundle into ``out``, those of several into directories with the bundles' names.

    Raises ``ValueError`` for two bundles of one name, and what :func:`training.quality.measure_quality` and
    :func:`training.baselines.equal.train_baseline` raise.
    """
    names = [evaluation.bundle.name for evaluation in evaluations]
    if len(set(names)) < len(names):
        raise ValueError(f"bundles: got {', '.join(names)}, allowed is different names for reports of several")
    for name, evaluation in zip(names, evaluations, strict=True):
        _write(evaluation, data, out / name if len(names) > 1 else out, options, device, say)


def _write(
    evaluation: Evaluation,
    data: Path,
    out: Path,
    options: ReportOptions,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    bundle = evaluation.bundle
    flow = load_flow(bundle, device)
    quality_options = QualityOptions(
        num_samples=options.num_samples,
        extractor=options.extractor,
        statistics=options.statistics,
        seed=evaluation.options.seed,
    )

    def tell(text: str, count: int) -> None:
        if text == "samples":
            say(f"{bundle.name}: {count:,} samples are drawn; now they are measured")

    quality = measure_quality(bundle, flow, data, quality_options, tell)
    baseline = _baseline(evaluation, data, out / BASELINE, options, device, say) if options.baseline else None
    document = write_report(out, evaluation, quality, baseline)
    (out / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    say(f"{bundle.name}: report.md, report.json and pictures are in {out}")


def _baseline(
    evaluation: Evaluation,
    data: Path,
    run: Path,
    options: ReportOptions,
    device: torch.device,
    say: Callable[[str], None],
) -> Baseline:
    """Train it where that is not done yet, and score it on what the bundle was scored on."""
    last_line = time.monotonic()

    def observe(report: StepReport) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > SECONDS_PER_LINE:
            last_line = time.monotonic()
            say(f"baseline: step {report.step} of {report.total_steps}, {report.bits_per_dim:.3f} bits/dim")

    bundle, how = evaluation.bundle, evaluation.options
    flow, trainer = train_baseline(bundle, data, run, device, images=options.baseline_images, observe=observe)
    config = bundle.config
    images = load_images(data, how.split, config.flow.image_size, config.flow.channels).part(None, how.limit)
    if evaluation.conditional:
        images = match_labels(images, config.class_names, config.name)
    return score_baseline(
        flow,
        trainer,
        images,
        conditional=evaluation.conditional,
        draws=how.draws,
        seed=how.seed,
        batch_size=how.batch_size,
    )
