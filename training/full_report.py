"""From evaluations of bundles to their reports on disk: samples measured, the baseline trained, everything written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from model.bundle import Bundle
from model.weights import load_flow
from training.baselines.equal import (
    LEARNING_RATE,
    Baseline,
    baseline_config,
    baseline_width,
    score_baseline,
    train_baseline,
)
from training.classes import match_labels
from training.destinations import check_directory, check_file
from training.evaluate import Evaluation
from training.feature_files import open_extractor, read_statistics, write_statistics
from training.features import Extractor
from training.frechet import Moments
from training.latents import load_known_images, modelled
from training.quality import Begin, QualityOptions, measure_quality
from training.quality_report import Report, write_report
from training.trainer import StepReport

BASELINE = "baseline"
"""Name of the baseline's run directory in that of the report."""
SECONDS_PER_LINE = 60.0


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report has beside the evaluation."""

    quality: QualityOptions = field(default_factory=QualityOptions)
    """What is drawn, and what it is compared with."""
    extractor: str = "efficientnet-lite0"
    """Name of the features' extractor, or a TorchScript file."""
    statistics: Path | None = None
    """Moments of real images' features in a file."""
    statistics_out: Path | None = None
    """File that the moments of the test images' features are written to."""
    baseline: bool = False
    """Whether to train a coupling flow to compare with."""
    baseline_images: int | None = None
    """Images that it is trained on; as many as the bundle was."""
    baseline_learning_rate: float = LEARNING_RATE
    """Its peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the reports of all bundles share, looked at before anything is measured."""

    out: Path
    """Directory of the report, or of those of several."""
    options: ReportOptions
    extractor: Extractor
    statistics: Moments | None
    statistics_name: str
    cache: Path | None
    """Directory of decoded images, as in :func:`training.data.load_images`."""

    @classmethod
    def prepare(
        cls,
        bundles: Sequence[Bundle],
        options: ReportOptions,
        out: Path,
        device: torch.device,
        cache: Path | None = None,
    ) -> Bench:
        """Raises ``ValueError`` for two bundles of one name, files that are not what they should be or do not go
        together or cannot be written, and a bundle without what its baseline needs."""
        names = [bundle.name for bundle in bundles]
        if len(set(names)) < len(names):
            raise ValueError(f"bundles: got {', '.join(names)}, allowed is different names for reports of several")
        sizes = {f"{b.config.image_channels}x{b.config.image_size}x{b.config.image_size}" for b in bundles}
        if options.statistics_out is not None and len(sizes) > 1:
            raise ValueError(
                f"statistics_out: got bundles of {' and '.join(sorted(sizes))} pixels, allowed is one size of images "
                "in a file"
            )
        if options.baseline:
            for bundle in bundles:
                baseline_width(baseline_config(bundle, options.baseline_images).flow)
        for path in _directories(out, bundles):
            check_directory("report", path)
        if options.statistics_out is not None:
            check_file("statistics_out", options.statistics_out)
        extractor = open_extractor(options.extractor, device)
        statistics = None if options.statistics is None else read_statistics(options.statistics)
        if statistics is not None and len(statistics.mean_F) != extractor.num_features:
            raise ValueError(
                f"statistics: got {len(statistics.mean_F)} features in {options.statistics}, allowed is the "
                f"{extractor.num_features} of {extractor.name}"
            )
        name = "" if options.statistics is None else options.statistics.name
        return cls(
            out=out,
            options=options,
            extractor=extractor,
            statistics=statistics,
            statistics_name=name,
            cache=cache,
        )

    def write_reports(
        self,
        evaluations: Sequence[Evaluation],
        data: Path,
        device: torch.device,
        say: Callable[[str], None] = lambda text: None,
        begin: Begin = lambda text, total: lambda count: None,
    ) -> list[Report]:
        """Write the report of one bundle into :attr:`out`, those of several into directories with the bundles' names.

        Raises what :func:`training.quality.measure_quality` and :func:`training.baselines.equal.train_baseline` raise.
        """
        directories = _directories(self.out, [evaluation.bundle for evaluation in evaluations])
        return [
            self._report(evaluation, data, out, device, say, begin)
            for evaluation, out in zip(evaluations, directories, strict=True)
        ]

    def _report(
        self,
        evaluation: Evaluation,
        data: Path,
        out: Path,
        device: torch.device,
        say: Callable[[str], None],
        begin: Begin,
    ) -> Report:
        bundle, options = evaluation.bundle, self.options
        flow = load_flow(bundle, device)
        quality = measure_quality(
            bundle, flow, data, self.extractor, options.quality, self.statistics, begin, self.cache
        )
        if options.statistics_out is not None:
            write_statistics(options.statistics_out, quality.reference)
        report = Report(evaluation=evaluation, quality=quality, baseline=None, statistics_name=self.statistics_name)
        # Before the baseline too: its training may take hours, and be stopped.
        write_report(out, report)
        if options.baseline:
            say(f"{bundle.name}: the report is in {out}; now its baseline is trained, or continued")
            report = replace(report, baseline=self._baseline(evaluation, data, out / BASELINE, device, say))
            write_report(out, report)
        say(f"{bundle.name}: report.md, report.json and pictures are in {out}")
        return report

    def _baseline(
        self, evaluation: Evaluation, data: Path, run: Path, device: torch.device, say: Callable[[str], None]
    ) -> Baseline:
        """Train it where that is not done yet, and score it on what the bundle was scored on."""
        last_line = time.monotonic()

        def observe(report: StepReport) -> None:
            nonlocal last_line
            if time.monotonic() - last_line > SECONDS_PER_LINE:
                last_line = time.monotonic()
                say(f"baseline: step {report.step} of {report.total_steps}, {report.bits_per_dim:.3f} bits/dim")

        bundle, how = evaluation.bundle, evaluation.options
        count, rate = self.options.baseline_images, self.options.baseline_learning_rate
        flow, trainer = train_baseline(
            bundle, data, run, device, images=count, learning_rate=rate, cache=self.cache, observe=observe
        )
        images = modelled(bundle, load_known_images(bundle, data, how.split, self.cache).part(None, how.limit), device)
        if evaluation.conditional:
            images = match_labels(images, bundle.config.class_names, bundle.name)
        return score_baseline(
            flow,
            trainer,
            images,
            bundle,
            conditional=evaluation.conditional,
            draws=how.draws,
            seed=how.seed,
            batch_size=how.batch_size,
        )


def _directories(out: Path, bundles: Sequence[Bundle]) -> list[Path]:
    """Where the report of each bundle is written."""
    return [out / bundle.name for bundle in bundles] if len(bundles) > 1 else [out]
