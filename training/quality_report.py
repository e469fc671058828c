"""All that was measured of a bundle as one Markdown report with pictures, and one JSON document."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.images import encode_image, grid
from training.baselines.equal import Baseline
from training.evaluate import Estimate, Evaluation, estimate, finite
from training.frechet import Figure
from training.provenance import training_runs
from training.quality import Copying, Distances, Quality
from training.report import json_number
from training.report import lines as evaluation_lines
from training.report import to_json as evaluation_json
from training.sweep_report import describe

SAMPLES, NEAREST = "samples.png", "nearest.png"
COLUMNS = 16
SMALLEST = 56
"""Side that smaller images are enlarged to, by a whole factor, so that something can be seen."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was measured of one bundle."""

    evaluation: Evaluation
    quality: Quality
    baseline: Baseline | None
    """None where none was asked for."""
    statistics_name: str = ""
    """Name of the file of statistics that :attr:`Quality.published` is a distance from."""

    @property
    def baseline_difference(self) -> Estimate | None:
        """Baseline minus bundle in bits/dim, image by image with the same noise: positive where the bundle is
        better."""
        if self.baseline is None:
            return None
        ours, theirs = self.evaluation.bits, self.baseline.bits
        both = np.isfinite(ours) & np.isfinite(theirs)
        return estimate(theirs[both] - ours[both])


def write_report(out: Path, report: Report) -> None:
    """Write ``report.md``, ``report.json``, ``samples.png`` and ``nearest.png`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    quality = report.quality
    if len(quality.shown):
        (out / SAMPLES).write_bytes(encode_image(_picture(quality.shown, COLUMNS), "png"))
    if quality.copying is not None:
        samples, nearest = quality.copying.pairs
        (out / NEAREST).write_bytes(encode_image(_picture(np.concatenate([samples, nearest]), len(samples)), "png"))
    (out / "report.md").write_text(markdown(report))
    (out / "report.json").write_text(json.dumps(to_json(report), indent=2, allow_nan=False) + "\n")


def _picture(pixels_NCHW: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    factor = max(1, -(-SMALLEST // pixels_NCHW.shape[2]))
    return grid(list(pixels_NCHW.repeat(factor, axis=2).repeat(factor, axis=3)), columns, gap=2)


def markdown(report: Report) -> str:
    """The whole report."""
    evaluation, quality = report.evaluation, report.quality
    parts = [
        f"# {quality.bundle.name}",
        f"`{quality.bundle.model_id}`",
        "## Likelihood",
        _bullets([*evaluation_lines(evaluation), *_baseline_lines(report)]),
        "## Samples",
        f"{_drawn(quality)[0].upper()}{_drawn(quality)[1:]}.",
        f"![Samples]({SAMPLES})" if len(quality.shown) else "",
        _distances(quality),
        *[f"{line[0].upper()}{line[1:]}." for line in _published_lines(report)],
        "## Copies?",
        _copies(quality),
        f"![The samples nearest to any training image, and below each that image]({NEAREST})"
        if quality.copying is not None
        else "",
        "## Reconstruction",
        f"{_reconstruction(quality)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_section(report: Report) -> str:
    """The report without its pictures, as a list for the card."""
    quality = report.quality
    text = [*evaluation_lines(report.evaluation), *_baseline_lines(report), _drawn(quality)]
    if quality.samples is not None:
        for name, found in (("samples", quality.samples), (f"real images ({quality.real_from})", quality.real)):
            text.append(
                f"{found.num_images:,} {name} against {quality.reference.count:,} test images on {quality.features}: "
                f"Fréchet distance {_figure(found.corrected)} ({quality.components} components, without its 1/n term; "
                f"not comparable with FID), kernel distance × 1000 {_figure(found.kernel, 1000)}, "
                f"precision {found.neighbours.precision:.3f}, recall {found.neighbours.recall:.3f}"
            )
    text += _published_lines(report)
    if quality.copying is not None:
        text.append(f"copies: {_nearer(quality, quality.copying)}")
    return _bullets([*text, _reconstruction(quality)])


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def _baseline_lines(report: Report) -> list[str]:
    baseline, difference = report.baseline, report.baseline_difference
    if baseline is None or difference is None:
        return []
    flow, theirs = report.evaluation.bundle.config.flow, estimate(finite(baseline.bits))
    low, high = difference.interval
    ours, others = baseline.model_images * flow.flops_per_image, baseline.images_seen * baseline.flops_per_image
    if baseline.images_seen >= baseline.model_images and baseline.flops_per_image <= flow.flops_per_image:
        equal = "of equal budget"
    else:
        # It was asked to have fewer images, or the narrowest coupling flow takes more operations than the model.
        equal = "of a smaller budget" if others < ours else "of a larger budget"
    extra = baseline.model_passes - baseline.model_images
    wrong = f" (and {extra:,.0f} again, with wrong classes, for its discriminative loss)" if extra else ""
    earlier = " since it was begun from another" if "from" in training_runs(report.evaluation.bundle)[0] else ""
    verdict = f"{abs(difference.mean):.4f} {'more' if difference.mean > 0 else 'less'}"
    return [
        f"baseline {equal}: {theirs.mean:.4f} ± {theirs.standard_error:.4f} bits/dim, {verdict} than the model on the "
        f"same images under the same noise (95% interval of the difference {low:+.4f} to {high:+.4f}); "
        f"{baseline.name}, trained on {baseline.images_seen:,} images where the model saw "
        f"{baseline.model_images:,}{wrong}{earlier}, {_mflop(baseline.flops_per_image)} an image where the model takes "
        f"{_mflop(flow.flops_per_image)}, {baseline.num_parameters:,} parameters, AdamW with learning rate "
        f"{baseline.learning_rate:g}, {baseline.seconds:.0f} s"
    ]


def _mflop(flops: int) -> str:
    return f"{flops / 1e6:,.3g} Mflop" if flops < 1e9 else f"{flops / 1e9:,.4g} Gflop"


def _drawn(quality: Quality) -> str:
    options, setting = quality.options, describe(quality.sampling)
    setting = setting if setting.startswith("no ") else f"guidance {setting}"
    classes = " and classes in the reference's shares" if quality.bundle.config.flow.num_classes else ""
    return (
        f"{options.num_samples:,} samples with seeds from {options.seed}{classes}, "
        f"{setting}, denoising {'on' if quality.sampling.denoise else 'off'}: "
        f"{quality.seconds / options.num_samples:.3g} s each on {quality.hardware}, decoded patch by patch in batches; "
        f"{quality.not_finite:,} not finite"
    )


def _distances(quality: Quality) -> str:
    samples, real = quality.samples, quality.real
    fewer = ""
    # A sample or two that are not finite change nothing.
    if samples is not None and abs(samples.num_images - real.num_images) > 0.05 * samples.num_images:
        fewer = (
            f" There are {real.num_images:,} of them for {samples.num_images:,} samples: the Fréchet distance on all "
            "features and recall depend on the number of images and do not compare; that without its 1/n term does."
        )
    lines = [
        f"On the features of {quality.features}, against {quality.reference.count:,} test images. Figures on other "
        "features than Inception's are not comparable with published FID and KID. Real images are what a perfect "
        f"model would get; they are of {quality.real_from}.{fewer} Standard errors are of the choice of the images in "
        "a row, not of that of the test images, which both rows share.",
        "",
        f"| | images | Fréchet, all features | Fréchet, {quality.components} components, without its 1/n term "
        "| kernel × 1000 | precision | recall |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in (("samples", samples), ("real images", real)):
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


def _published_lines(report: Report) -> list[str]:
    quality = report.quality
    if quality.published is None:
        return []
    count = quality.options.num_samples - quality.not_finite
    return [
        f"Fréchet distance of {count:,} samples from the statistics in `{report.statistics_name}`, on all features of "
        f"{quality.features}: **{quality.published:.3f}**"
    ]


def _copies(quality: Quality) -> str:
    copying = quality.copying
    if copying is None:
        return "No sample is finite."
    ours, theirs = copying.samples.distance, copying.held_out.distance
    return (
        f"Root mean square distance in 8-bit steps to the nearest of {copying.num_training:,} training images"
        f"{' and their mirror images' if copying.mirrored else ''}: "
        f"{len(ours):,} samples {np.median(ours):.2f} (median, least {ours.min():.2f}), {len(theirs):,} test images "
        f"{np.median(theirs):.2f} (least {theirs.min():.2f}). {_nearer(quality, copying)}. A model that does not copy "
        "has about 1% of these, or more where its samples are simpler than real images are: look at the pairs."
    )


def _nearer(quality: Quality, copying: Copying) -> str:
    unknown = "; that the model was trained on these images is not known, and copies of others are not found"
    return (
        f"{copying.share_nearer:.1%} of the samples are as near to a training image as the nearest 1% of the test "
        f"images are{'' if quality.is_own_data else unknown}"
    )


def _reconstruction(quality: Quality) -> str:
    errors, of_pixels = quality.reconstruction, quality.autoencoding is None
    text = (
        f"{len(errors):,} test images under noise encoded by the flow and decoded again in float32: root mean square "
        f"error {np.median(errors):.2g} (median), {errors.max():.2g} at most, "
        f"{'in steps of 255' if of_pixels else 'in the unit of the latents'}"
    )
    if quality.autoencoding is None:
        return text
    return f"{text}; through the autoencoder alone {np.median(quality.autoencoding):.2g} in steps of 255 (median)"


def to_json(report: Report) -> dict[str, Any]:
    """Everything that the Markdown says."""
    quality = report.quality
    [likelihood] = evaluation_json([report.evaluation])["evaluations"]
    copying, options = quality.copying, quality.options
    return {
        "name": quality.bundle.name,
        "model_id": quality.bundle.model_id,
        "likelihood": likelihood,
        "baseline": _baseline_json(report),
        "samples": {
            "count": options.num_samples,
            "seed": options.seed,
            "sampling": quality.sampling.to_dict(),
            "not_finite": quality.not_finite,
            "seconds_each": quality.seconds / options.num_samples,
            "hardware": quality.hardware,
        },
        "distances": {
            "features": quality.features,
            "reference_images": quality.reference.count,
            "components": quality.components,
            "samples": None if quality.samples is None else _distances_json(quality.samples),
            "real_images": {**_distances_json(quality.real), "from": quality.real_from},
            "from_statistics": quality.published,
            "statistics": report.statistics_name or None,
        },
        "copying": None
        if copying is None
        else {
            "training_images": copying.num_training,
            "mirrored_too": copying.mirrored,
            "known_to_be_the_models": quality.is_own_data,
            "unit": "root mean square difference in 8-bit steps",
            "samples": _quantiles(copying.samples.distance),
            "test_images": _quantiles(copying.held_out.distance),
            "share_nearer_than_1_percent_of_test_images": copying.share_nearer,
        },
        "reconstruction": {
            "unit": "8-bit steps" if quality.autoencoding is None else "latents",
            **_quantiles(quality.reconstruction),
        },
        "autoencoding": None if quality.autoencoding is None else _quantiles(quality.autoencoding),
    }


def _baseline_json(report: Report) -> dict[str, Any] | None:
    baseline, difference = report.baseline, report.baseline_difference
    if baseline is None or difference is None:
        return None
    return {
        "name": baseline.name,
        "parameters": baseline.num_parameters,
        "flops_per_image": baseline.flops_per_image,
        "model_flops_per_image": report.evaluation.bundle.config.flow.flops_per_image,
        "learning_rate": baseline.learning_rate,
        "images_seen": baseline.images_seen,
        "model_images_seen": baseline.model_images,
        "model_passes": baseline.model_passes,
        "seconds": baseline.seconds,
        "conditional": baseline.conditional,
        "not_finite": len(baseline.bits) - len(finite(baseline.bits)),
        "bits_per_dim": json_number(estimate(finite(baseline.bits)).mean),
        "minus_model": {"mean": json_number(difference.mean), "standard_error": json_number(difference.standard_error)},
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
    return {name: json_number(float(value)) for name, value in named.items()}
