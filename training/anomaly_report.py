"""A comparison of normal and anomalous images for the terminal, for programs (JSON), and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from model.anomaly.conformal import INTERVAL, smallest_alpha, threshold
from training.anomaly import ALPHAS, Comparison, FalsePositives, ScoredSet, SetFigures
from training.detection_plot import detection_plot

NAMES = {"auroc": "AUROC", "aupr": "AUPR", "fpr_at_95_tpr": "FPR@95TPR", "f1_max": "F1max"}
"""Names of the figures for people."""


def tables(comparison: Comparison) -> list[Table]:
    """Every score on every set, the maps where there are masks, and the false positives."""
    found = [_detection(comparison)]
    if any(of.pixels for of in comparison.sets):
        found.append(_pixels(comparison))
    return [*found, guarantee(comparison.false_positives, comparison.normal.name)]


def _detection(comparison: Comparison) -> Table:
    normal = comparison.normal
    caption = f"{len(normal):,} normal images of {normal.name}; brackets: 95% bootstrap interval" * bool(
        comparison.resamples
    )
    table = Table(title="Normal and anomalous images told apart", caption=caption or None)
    table.add_column("set")
    table.add_column("score")
    for name in (*NAMES.values(), f"flagged at {comparison.alpha:.3g}"):
        table.add_column(name, justify="right")
    for of in comparison.sets:
        first = f"{of.name} ({of.num_images:,})"
        for score, found in of.scores.items():
            figures = found.figures.to_dict()
            shown = [_with_interval(figures[name], found.intervals.get(name), name == "auroc") for name in NAMES]
            table.add_row(first, score, *shown, f"{found.flagged:.1%}")
            first = ""
        table.add_section()
    return table


def _with_interval(value: float, interval: tuple[float, float] | None, is_shown: bool) -> str:
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval and is_shown else "")


def _pixels(comparison: Comparison) -> Table:
    table = Table(title="Where: maps and masks", caption="pixels of the normal images count as normal ones")
    table.add_column("set")
    for name in ("pixel AUROC", "AUPRO"):
        table.add_column(name, justify="right")
    for of in comparison.sets:
        if of.pixels:
            table.add_row(of.name, f"{of.pixels.auroc:.4f}", f"{of.pixels.aupro:.4f}")
    return table


def guarantee(found: Mapping[str, Sequence[FalsePositives]], name: str) -> Table:
    """The realised false-positive rate of every score beside what was stated."""
    table = Table(title=f"False positives on {name}")
    table.add_column("score")
    levels = [known.alpha for known in next(iter(found.values()))]
    for alpha in levels:
        table.add_column(f"at {alpha:.3g}", justify="right")
    for score, rates in found.items():
        table.add_row(score, *(f"{rate.rate:.2%}{'' if rate.holds else ' !'}" for rate in rates))
    table.add_section()
    stated = [f"{low:.2%} to {high:.2%}" for low, high in (rate.interval for rate in next(iter(found.values())))]
    table.add_row(f"stated, {INTERVAL:.0%}", *stated)
    left_out = [f"{alpha:g}" for alpha in ALPHAS if alpha not in levels]
    if left_out:
        table.caption = f"too few calibration images for a level of {', '.join(left_out)}"
    return table


def to_json(comparison: Comparison) -> dict[str, Any]:
    """One JSON document with everything that the tables say, and all intervals."""
    record, normal = comparison.calibration.record, comparison.normal
    # The fixed pictures' code lengths are of use to programs alone.
    described = {name: value for name, value in asdict(record).items() if name != "codec_fingerprint"}
    return {
        "model": record.model,
        "model_id": record.model_id,
        "calibration": {**described, "smallest_alpha": smallest_alpha(record.num_calibration)},
        "alpha": comparison.alpha,
        "bootstrap": {"resamples": comparison.resamples, "seed": comparison.seed},
        "normal": {"name": normal.name, "num_images": len(normal)},
        "sets": [set_json(of) for of in comparison.sets],
        "false_positives": false_positives_json(comparison.false_positives),
    }


def set_json(of: SetFigures) -> dict[str, Any]:
    """The figures of one set."""
    return {
        "name": of.name,
        "num_images": of.num_images,
        "scores": {
            score: {
                **found.figures.to_dict(),
                "intervals_95": {name: list(interval) for name, interval in found.intervals.items()} or None,
                "flagged": found.flagged,
            }
            for score, found in of.scores.items()
        },
        "pixels": None if of.pixels is None else asdict(of.pixels),
    }


def false_positives_json(found: Mapping[str, Sequence[FalsePositives]]) -> dict[str, list[dict[str, Any]]]:
    """Realised and stated rates by score."""
    return {
        score: [
            {
                "alpha": rate.alpha,
                "flagged": rate.flagged,
                "num_images": rate.num_images,
                "rate": rate.rate,
                "interval_99": list(rate.interval),
                "holds": rate.holds,
            }
            for rate in rates
        ]
        for score, rates in found.items()
    }


def picture(comparison: Comparison, sets: Sequence[ScoredSet]) -> NDArray[np.uint8]:
    """The first score of all sets as a picture (3, H, W); raises as :func:`training.detection_plot.detection_plot`."""
    score = next(iter(comparison.normal.scores))
    return detection_plot(
        comparison.normal.scores[score],
        {of.name: of.scores[score] for of in sets},
        threshold=threshold(comparison.calibration.sorted_scores[score], comparison.alpha),
        alpha=comparison.alpha,
    )
