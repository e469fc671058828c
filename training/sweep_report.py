"""A sweep in words, numbers and pictures: a table, a JSON document, a contact sheet."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.config import SamplingDefaults
from model.images import grid
from training.frechet import Figure
from training.sweep import BEYOND_DOUBT, SHOWN, ModeResult, Sweep, Trial

CELL, LABEL_WIDTH, MARGIN = 48, 300, 6
"""Smallest side of a sample on the contact sheet, width of the text beside a row, and its distance from it."""
COLUMNS = ("mode", "w", "τ", "schedule", "rule", "target", "distance", "minus no guidance", "")


def describe(setting: SamplingDefaults) -> str:
    """A setting in a few words."""
    if not setting.guidance_scale:
        return "no guidance"
    words = [
        f"w {setting.guidance_scale:g}",
        f"τ {setting.attention_temperature:g}",
        setting.guidance_schedule,
        f"{setting.guidance_rule} rule".replace("_", " "),
    ]
    if setting.guidance_target != "both":
        words.append(f"{setting.guidance_target} only")
    if setting.guidance_window is not None:
        words.append(f"blocks {setting.guidance_window[0]}-{setting.guidance_window[1] - 1}")
    return ", ".join(words)


def ranked(result: ModeResult) -> list[Trial]:
    """The trials, nearest to the real images first; those that failed last."""
    return sorted(result.trials, key=lambda trial: trial.value)


def table(sweep: Sweep) -> str:
    """All settings as a Markdown table with aligned columns, the best first."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for result in sweep.modes:
        rows.extend((result.mode, *_cells(trial, result, sweep)) for trial in ranked(result))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cells(trial: Trial, result: ModeResult, sweep: Sweep) -> tuple[str, ...]:
    setting, guided = trial.setting, trial.setting.guidance_scale != 0
    marks = [
        *(["**best**"] if trial is result.best else []),
        *(["best for both modes"] if setting == sweep.shared_best else []),
        *(["in the bundle"] if setting == sweep.bundle.sampling else []),
    ]
    difference = ""
    if guided and trial.figure is not None and result.unguided.figure is not None:
        difference = _plus_minus(trial.figure - result.unguided.figure, signed=True)
    return (
        f"{setting.guidance_scale:g}",
        f"{setting.attention_temperature:g}" if guided else "",
        setting.guidance_schedule if guided else "",
        setting.guidance_rule if guided else "",
        setting.guidance_target if guided else "",
        _distance(trial),
        difference,
        ", ".join(marks),
    )


def verdicts(sweep: Sweep) -> list[str]:
    """A sentence on the best setting of each mode, and one on the best for both."""
    text = []
    for result in sweep.modes:
        if result.best is result.unguided:
            text.append(f"{result.mode}: no guidance is the best of these settings")
        else:
            found = _on_fresh_seeds(result, result.best.setting, sweep)
            text.append(f"{result.mode}: the best is {describe(result.best.setting)}; {found}")
    shared = sweep.shared_best
    if shared is not None:
        found = "; ".join(f"{result.mode}, {_on_fresh_seeds(result, shared, sweep)}" for result in sweep.modes)
        text.append(f"with and without a class: the best is {describe(shared)}; {found}")
    return text


def _on_fresh_seeds(result: ModeResult, setting: SamplingDefaults, sweep: Sweep) -> str:
    """What the confirmation found, as the rest of a sentence."""
    confirmation = result.confirmation(setting)
    if confirmation is None:
        return "not confirmed on fresh seeds"
    errors = confirmation.standard_errors
    beats = "beats no guidance" if confirmation.beats_no_guidance else "is not shown to beat no guidance"
    return (
        f"on {sweep.options.confirm_samples:,} fresh seeds it {beats}: {_plus_minus(confirmation.guided)} against "
        f"{_plus_minus(confirmation.unguided)}, difference {_plus_minus(confirmation.difference, signed=True)}, "
        f"{abs(errors):.1f} standard errors {'better' if errors > 0 else 'worse'} ({BEYOND_DOUBT:g} are needed)"
    )


def notes(sweep: Sweep) -> list[str]:
    """What the figures are, in sentences."""
    options = sweep.options
    return [
        sweep.reference.title(options.num_samples),
        f"{sweep.bundle.name} ({sweep.bundle.model_id}), real images: {options.split} split of {sweep.data_name}",
        f"± one standard error; seeds {options.seed} to {options.seed + options.num_samples - 1} for every setting, so "
        "differences are paired",
        "denoised as the bundle recommends" if sweep.bundle.sampling.denoise else "not denoised",
    ]


def markdown(sweep: Sweep) -> str:
    """The whole report."""
    return (
        "\n".join(
            [*(f"- {note}" for note in notes(sweep)), "", table(sweep), "", *(f"- {line}" for line in verdicts(sweep))]
        )
        + "\n"
    )


def to_json(sweep: Sweep) -> dict[str, Any]:
    """Everything that the report says, for programs."""
    options = sweep.options
    return {
        "figure": sweep.reference.title(options.num_samples),
        "features": sweep.reference.features,
        "real_images": sweep.reference.moments.count,
        "name": sweep.bundle.name,
        "model_id": sweep.bundle.model_id,
        "data": sweep.data_name,
        "split": options.split,
        "num_samples": options.num_samples,
        "confirm_samples": options.confirm_samples,
        "seed": options.seed,
        "shared_best": None if sweep.shared_best is None else sweep.shared_best.to_dict(),
        "modes": {result.mode: _mode_json(result) for result in sweep.modes},
    }


def _mode_json(result: ModeResult) -> dict[str, Any]:
    trials = []
    for trial in ranked(result):
        figures = trial.figure, result.unguided.figure
        difference = None if figures[0] is None or figures[1] is None else _figure_json(figures[0] - figures[1])
        trials.append(
            {
                "sampling": trial.setting.to_dict(),
                "distance": None if trial.figure is None else _figure_json(trial.figure),
                "minus_no_guidance": difference,
                "seconds": round(trial.seconds, 3),
            }
        )
    return {
        "best": result.best.setting.to_dict(),
        "trials": trials,
        "confirmations": [
            {
                "sampling": confirmation.setting.to_dict(),
                "no_guidance": _figure_json(confirmation.unguided),
                "distance": _figure_json(confirmation.guided),
                "minus_no_guidance": _figure_json(confirmation.difference),
                "standard_errors": confirmation.standard_errors,
                "beats_no_guidance": confirmation.beats_no_guidance,
            }
            for confirmation in result.confirmations
        ],
    }


def _figure_json(figure: Figure) -> dict[str, float]:
    return {"value": figure.value, "standard_error": figure.standard_error, "uncorrected": figure.uncorrected}


def _distance(trial: Trial) -> str:
    return "not finite" if trial.figure is None else _plus_minus(trial.figure)


def _plus_minus(figure: Figure, *, signed: bool = False) -> str:
    """Value and standard error with as many decimals as the error has meaning for: two digits of it."""
    error = figure.standard_error
    decimals = 2 if error <= 0 else max(0, 1 - math.floor(math.log10(error)))
    return f"{figure.value:{'+' if signed else ''}.{decimals}f} ± {error:.{decimals}f}"


def contact_sheet(sweep: Sweep) -> NDArray[np.uint8]:
    """A row of samples for every setting with its figure beside it, the best first, (3, H, W); modes side by side."""
    columns = []
    for result in sweep.modes:
        strips = []
        for trial in ranked(result):
            mark = "> " if trial is result.best else ""
            lines = [f"{mark}{result.mode}: {_distance(trial)}", describe(trial.setting)]
            strips.append(_strip(trial.shown, lines, sweep))
        columns.append(np.concatenate(strips, axis=1))
    height = max(column.shape[1] for column in columns)
    padded = [np.pad(c, ((0, 0), (0, height - c.shape[1]), (0, 0)), constant_values=255) for c in columns]
    return np.concatenate(padded, axis=2)


def _strip(images: NDArray[np.uint8], lines: list[str], sweep: Sweep) -> NDArray[np.uint8]:
    """Text and samples side by side; the same size for every setting."""
    flow = sweep.bundle.config.flow
    factor = -(-CELL // flow.image_size)
    side = flow.image_size * factor
    # A setting without samples, or fewer of them, leaves its place empty.
    blank = np.full((SHOWN, flow.channels, side, side), 255, np.uint8)
    blank[: len(images)] = images.repeat(factor, axis=2).repeat(factor, axis=3)
    row = grid(list(blank), SHOWN)
    row = np.pad(np.broadcast_to(row, (3, *row.shape[1:])), ((0, 0), (1, 1), (0, 0)), constant_values=255)
    label = Image.new("RGB", (LABEL_WIDTH, row.shape[1]), (255, 255, 255))
    # The font inside Pillow has no Greek letters.
    text = "\n".join(lines).replace("τ", "t").replace("±", "+-")
    ImageDraw.Draw(label).text((MARGIN, MARGIN), text, fill=(0, 0, 0), font=ImageFont.load_default())
    return np.concatenate([np.asarray(label).transpose(2, 0, 1), row], axis=2)
