"""The options of ``evaluate --report``, checked before anything is measured."""

from __future__ import annotations

import math
from pathlib import Path

from model.config import check
from training.baselines.equal import LEARNING_RATE
from training.full_report import ReportOptions
from training.quality import QualityOptions


def report_options(
    report: Path | None,
    *,
    extractor: str | None,
    statistics: Path | None,
    statistics_out: Path | None,
    samples: int | None,
    reference_images: int | None,
    seed: int,
    baseline: bool | None,
    baseline_images: int | None,
    baseline_learning_rate: float | None,
) -> ReportOptions | None:
    """What was asked for, with what was left out as it is by default; None without ``--report``.

    Raises ``ValueError`` for an option of a report that is not asked for, or one that does not fit.
    """
    given = {
        "extractor": extractor,
        "statistics": statistics,
        "statistics_out": statistics_out,
        "reference_images": reference_images,
        "baseline": baseline,
        "baseline_images": baseline_images,
        "baseline_learning_rate": baseline_learning_rate,
    }
    if report is None:
        for name, value in given.items():
            check(value is None, name, value, "with --report only")
        return None
    if baseline_learning_rate is not None:
        allowed = "a finite number above 0"
        check(0 < baseline_learning_rate < math.inf, "baseline_learning_rate", baseline_learning_rate, allowed)
    counts = {"num_samples": samples, "reference_images": reference_images}
    return ReportOptions(
        quality=QualityOptions(seed=seed, **{name: count for name, count in counts.items() if count is not None}),
        extractor=extractor or ReportOptions.extractor,
        statistics=statistics,
        statistics_out=statistics_out,
        baseline=bool(baseline) or baseline_images is not None or baseline_learning_rate is not None,
        baseline_images=baseline_images,
        baseline_learning_rate=baseline_learning_rate or LEARNING_RATE,
    )
