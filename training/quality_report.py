"""All that was measured of a bundle as one Markdown report with pictures, and one JSON document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.images import encode_image, grid
from training.baselines.equal import Baseline
from training.evaluate import Estimate, Evaluation, estimate
from training.frechet import Figure
from training.quality import Copying, Distances, Quality
from training.report import markdown as evaluation_markdown
from training.report import to_json as evaluation_json
from training.sweep_report import describe

SAMPLES, NEAREST = "samples.png", "nearest.png"
COLUMNS = 16


def write_report(out: Path, evaluation: Evaluation, quality: Quality, baseline: Baseline | None) -> dict[str, Any]:
    """Write ``report.md``, ``samples.png`` and ``nearest.png`` into ``out``, and return the JSON document."""
    out.mkdir(parents=True, exist_ok=True)
    if len(quality.shown):
        (out / SAMPLES).write_bytes(encode_image(grid(list(quality.shown), COLUMNS), "png"))
    if quality.copying is not None:
        (out / NEAREST).write_bytes(encode_image(_pairs(quality.copying.pairs), "png"))
    (out / "report.md").write_text(markdown(evaluation, quality, baseline))
    return to_json(evaluation, quality, baseline)


def _pairs(pairs_KNCHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Samples above, and the training image nearest to each below it."""
    samples, nearest = pairs_KNCHW
    return grid([*samples, *nearest], len(samples))


def baseline_difference(evaluation: Evaluation, baseline: Baseline) -> Estimate:
    """Baseline minus bundle in bits/dim, image by image with the same noise: positive where the bundle is better."""
    both = np.isfinite(evaluation.bits) & np.isfinite(baseline.bits)
    return estimate(baseline.bits[both] - evaluation.bits[both])


def markdown(evaluation: Evaluation, quality: Quality, baseline: Baseline | None) -> str:
    """The whole report."""
    bundle, options = quality.bundle, quality.options
    parts = [
        f"# {bundle.name}",
        f"`{bundle.model_id}`",
        "## Likelihood",
        evaluation_markdown(evaluation),
        _baseline(evaluation, baseline),
        "## Samples",
        f"{options.num_samples:,} samples with seeds from {options.seed} and classes in the reference's shares, "
        f"{describe(quality.sampling)}, denoising {'on' if quality.sampling.denoise else 'off'}: "
        f"{quality.seconds / options.num_samples:.3f} s each, {quality.not_finite:,} not finite.",
        f"![Samples]({SAMPLES})" if len(quality.shown) else "",
        _distances(quality),
        _published(quality),
        "## Copies?",
        _copies(quality.copying),
        "## Reconstruction",
        f"{len(quality.reconstruction):,} test images encoded to latents and decoded again in float32: root mean "
        f"square error {np.median(quality.reconstruction):.2g} of 255 (median), "
        f"{quality.reconstruction.max():.2g} at most.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _baseline(evaluation: Evaluation, baseline: Baseline | None) -> str:
    if baseline is None:
        return ""
    theirs, difference = estimate(baseline.bits[np.isfinite(baseline.bits)]), baseline_difference(evaluation, baseline)
    low, high = difference.interval
    return (
        f"- Baseline of equal budget ({baseline.name}; {baseline.num_parameters:,} parameters, "
        f"{baseline.flops_per_image / 1e6:,.0f} Mflop an image where the model has "
        f"{evaluation.bundle.config.flow.flops_per_image / 1e6:,.0f}, {baseline.images_seen:,} images, "
        f"{baseline.seconds:.0f} s): {theirs.mean:.4f} ± {theirs.standard_error:.4f} "
        f"bits/dim, by {difference.mean:+.4f} (95% interval {low:+.4f} to {high:+.4f}) more than the model on the same "
        "images under the same noise"
    )


def _distances(quality: Quality) -> str:
    lines = [
        f"On the features of {quality.features}, against {quality.num_reference:,} test images. Figures on other "
        "features than Inception's are not comparable with published FID and KID. Real images are what a perfect "
        f"model would get; they are of {quality.real_from}.",
        "",
        "| | images | Fréchet, all features | Fréchet, "
        f"{quality.options.components} components, without its 1/n term | kernel × 1000 | precision | recall |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in (("samples", quality.samples), ("real images", quality.real)):
        if found is None:
            lines.append(f"| {name} | too few are finite | | | | | |")
            continue
        lines.append(
            f"| {name} | {found.num_images:,} | {found.frechet:.2f} | {_figure(found.corrected)} | "
            f"{_figure(found.kernel, 1000)} | {found.neighbours.precision:.3f} | {found.neighbours.recall:.3f} |"
        )
    return "\n".join(lines)


def _figure(figure: Figure, factor: float = 1) -> str:
    return f"{factor * figure.value:.2f} ± {factor * figure.standard_error:.2f}"


def _published(quality: Quality) -> str:
    if quality.published is None or quality.options.statistics is None:
        return ""
    count = quality.options.num_samples - quality.not_finite
    return (
        f"Fréchet distance from the statistics in `{quality.options.statistics.name}` on all features of "
        f"{quality.features}: **{quality.published:.3f}** ({count:,} samples)."
    )


def _copies(copying: Copying | None) -> str:
    if copying is None:
        return "No sample is finite."
    ours, theirs = copying.samples.distance, copying.held_out.distance
    return (
        f"Root mean square distance in 8-bit steps to the nearest of {copying.num_training:,} training images: samples "
        f"{np.median(ours):.2f} (median, least {ours.min():.2f}), test images {np.median(theirs):.2f} (least "
        f"{theirs.min():.2f}). {copying.share_nearer:.1%} of the samples are nearer than the nearest 1% of the test "
        f"images: about 1% is what a model gets that does not copy.\n\n"
        f"![The samples nearest to any training image, and below each that image]({NEAREST})"
    )


def to_json(evaluation: Evaluation, quality: Quality, baseline: Baseline | None) -> dict[str, Any]:
    """Everything that the Markdown says."""
    [likelihood] = evaluation_json([evaluation])["evaluations"]
    copying, options = quality.copying, quality.options
    return {
        "name": quality.bundle.name,
        "model_id": quality.bundle.model_id,
        "likelihood": likelihood,
        "baseline": None if baseline is None else _baseline_json(evaluation, baseline),
        "samples": {
            "count": options.num_samples,
            "seed": options.seed,
            "sampling": quality.sampling.to_dict(),
            "not_finite": quality.not_finite,
            "seconds_each": quality.seconds / options.num_samples,
        },
        "distances": {
            "features": quality.features,
            "reference_images": quality.num_reference,
            "components": options.components,
            "samples": None if quality.samples is None else _distances_json(quality.samples),
            "real_images": {**_distances_json(quality.real), "from": quality.real_from},
            "from_statistics": quality.published,
        },
        "copying": None
        if copying is None
        else {
            "training_images": copying.num_training,
            "unit": "root mean square difference in 8-bit steps",
            "samples": _quantiles(copying.samples.distance),
            "test_images": _quantiles(copying.held_out.distance),
            "share_nearer_than_1_percent_of_test_images": copying.share_nearer,
        },
        "reconstruction": _quantiles(quality.reconstruction),
    }


def _baseline_json(evaluation: Evaluation, baseline: Baseline) -> dict[str, Any]:
    difference = baseline_difference(evaluation, baseline)
    return {
        "name": baseline.name,
        "parameters": baseline.num_parameters,
        "flops_per_image": baseline.flops_per_image,
        "model_flops_per_image": evaluation.bundle.config.flow.flops_per_image,
        "images_seen": baseline.images_seen,
        "seconds": baseline.seconds,
        "bits_per_dim": float(np.mean(baseline.bits[np.isfinite(baseline.bits)])),
        "minus_model": {"mean": difference.mean, "standard_error": difference.standard_error},
    }


def _distances_json(found: Distances) -> dict[str, Any]:
    near = found.neighbours
    return {
        "num_images": found.num_images,
        "frechet_all_features": found.frechet,
        "frechet": {"value": found.corrected.value, "standard_error": found.corrected.standard_error},
        "kernel": {"value": found.kernel.value, "standard_error": found.kernel.standard_error},
        "precision": {"value": near.precision, "interval_95": list(near.precision_interval)},
        "recall": {"value": near.recall, "interval_95": list(near.recall_interval)},
        "neighbours": near.neighbours,
    }


def _quantiles(values: NDArray[np.float64]) -> dict[str, float | None]:
    named = {"least": values.min(), "percent_1": np.quantile(values, 0.01), "median": np.median(values)}
    named["largest"] = values.max()
    return {name: float(value) if math.isfinite(value) else None for name, value in named.items()}
