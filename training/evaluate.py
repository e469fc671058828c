"""Bits per dimension of bundles on a data set: test figures, train–test gap, paired differences, Bayes accuracy.

Image i of a split is scored with the noise of ``seed + i``, exactly as the service scores it with
that seed: draws are independent across images, the same for every model, and do not depend on the
batch size. The images compared with for the gap get the noise of the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.anomaly.codec import code_lengths
from model.bundle import Bundle
from model.codecs.weights import load_codec
from model.config import NoiseProtocol
from model.flow import NO_CLASS, Flow
from model.likelihood import bits_per_dim, combine_draws, log_likelihood
from model.weights import load_flow
from training.accuracy import Z_95, Accuracy, recognize_images
from training.classes import match_labels
from training.data import DataError, Images, data_name, epoch_order
from training.latents import load_known_images, modelled
from training.noisy import noisy_batches
from training.provenance import training_split
from training.soundness import Soundness, sample_soundness

RAW_BITS = 8.0
"""Bits of a pixel value as it is."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error, in the unit of its values: bits/dim, or a share."""

    mean: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval (normal approximation)."""
        return self.mean - Z_95 * self.standard_error, self.mean + Z_95 * self.standard_error


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is scored and how; the same for all bundles that are compared."""

    split: str = "test"
    """``test`` or ``train``."""
    draws: int = 1
    """Noise draws per image."""
    limit: int | None = None
    """Number of images, from the first; all if not given."""
    train_limit: int | None = None
    """Number of training images to compare with; as many as are evaluated if not given, 0 for none."""
    ignore_classes: bool = False
    """Score without the images' classes."""
    accuracy: bool = False
    """Also classify the images; models without classes have no accuracy."""
    samples: int = 0
    """Samples to draw and look at; 0 for none."""
    seed: int = 0
    """Image i has the noise of seed + i."""
    batch_size: int = 128
    """Images per forward pass."""

    def __post_init__(self) -> None:
        if self.split not in ("test", "train"):
            raise ValueError(f"split: got {self.split!r}, allowed is test or train")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One bundle's figures on one split."""

    bundle: Bundle
    """The bundle that was evaluated."""
    data_name: str
    """Name of the data directory."""
    options: EvaluationOptions
    """What was scored and how."""
    conditional: bool
    """Whether each image was scored given its class."""
    bits: NDArray[np.float64]
    """Bits/dim of each image, (N,)."""
    train_bits: NDArray[np.float64] | None
    """Bits/dim of images that were trained on, to compare with."""
    no_gap_because: str = ""
    """Why there are no ``train_bits``."""
    accuracy: Accuracy | None = None
    """Which images the model recognizes; None where that was not asked for, or it has no classes."""
    soundness: Soundness | None = None
    """What became of samples; None where none were asked for."""
    codes: NDArray[np.float64] | None = None
    """Bits/dim (N, 3) of each image in every lossless codec of :data:`model.anomaly.codec.CODECS`; only where the
    model's bits/dim are a bound on a lossless code too, under uniform dequantization."""

    @property
    def escaping_bits(self) -> Estimate | None:
        """Of a lossless code that stores an image raw where the model is no better, and spends a bit an image to say
        which; only where bits/dim are a bound on such a code."""
        if self.codes is None:
            return None
        raw = np.where(np.isfinite(self.bits), np.minimum(self.bits, RAW_BITS), RAW_BITS)
        return estimate(raw + 1 / self.bundle.config.flow.num_dims)

    @property
    def gap(self) -> Estimate | None:
        """Split minus training images: how much worse the model is on images it has not seen."""
        if self.train_bits is None:
            return None
        ours, theirs = estimate(finite(self.bits)), estimate(finite(self.train_bits))
        return Estimate(ours.mean - theirs.mean, math.hypot(ours.standard_error, theirs.standard_error))


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values that are; an image far from all that a model has seen may have a density too small for a number."""
    return values[np.isfinite(values)]


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Mean and standard error of (N,) values; the error of a single value is infinite, the mean of none is nan."""
    count = len(values)
    if not count:
        return Estimate(math.nan, math.inf)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(float(values.mean()), error)


def paired_difference(first: Evaluation, second: Evaluation) -> Estimate:
    """Second minus first, image by image with the same noise, where both are finite.

    Raises ``ValueError`` when the two figures do not measure the same thing.
    """
    ours, theirs = first.bundle.config, second.bundle.config
    if ours.noise != theirs.noise:
        raise ValueError(
            f"{ours.name} and {theirs.name} have different noise protocols "
            f"({_short(ours.noise)}; {_short(theirs.noise)}): their bits/dim are not comparable"
        )
    if (ours.flow.image_size, ours.flow.channels) != (theirs.flow.image_size, theirs.flow.channels):
        raise ValueError(f"{ours.name} and {theirs.name} score images of different size or colours: not comparable")
    if ours.codec != theirs.codec:
        raise ValueError(f"{ours.name} and {theirs.name} score latents of different codecs: not comparable")
    both = np.isfinite(first.bits) & np.isfinite(second.bits)
    return estimate(second.bits[both] - first.bits[both])


def paired_accuracy(first: Evaluation, second: Evaluation) -> Estimate:
    """Share of images that the second model recognizes minus that of the first, image by image.

    Raises ``ValueError`` when a model was not asked to recognize them, or the two know other classes.
    """
    ours, theirs = first.accuracy, second.accuracy
    names = [e.bundle.config.name for e in (first, second)]
    if ours is None or theirs is None:
        raise ValueError(f"{names[ours is not None]} has no Bayes accuracy to compare")
    if set(first.bundle.config.class_names) != set(second.bundle.config.class_names):
        raise ValueError(f"{names[0]} and {names[1]} have different classes: their accuracies are not comparable")
    return estimate(theirs.correct.astype(np.float64) - ours.correct)


def _short(noise: NoiseProtocol) -> str:
    return f"{noise.kind} {noise.std:g}" if noise.kind == "gaussian" else noise.kind


def evaluate_bundle(
    bundle: Bundle,
    data: Path,
    options: EvaluationOptions,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    cache: Path | None = None,
) -> Evaluation:
    """Score a bundle on the data's split and, if they are at hand, on images it was trained on.

    ``on_progress`` is told the images scored so far and their whole number; an image that is classified counts once
    for every class, and a sample counts as one. ``cache`` is that of :func:`training.data.load_images`. Raises
    :class:`~training.data.DataError` or :class:`~model.bundle.BundleError`.
    """
    config = bundle.config
    conditional = bool(config.flow.num_classes) and not options.ignore_classes
    images = modelled(bundle, load_known_images(bundle, data, options.split, cache).part(None, options.limit), device)
    recognizes = bool(config.flow.num_classes) and options.accuracy
    if conditional or recognizes:
        images = match_labels(images, config.class_names, config.name)
    try:
        count = len(images) if options.train_limit is None else options.train_limit
        known = sample_images(_training_images(bundle, data, options, count, cache), count, options.seed)
        # Known by their digests: only those that are scored need an encoder.
        trained_on, no_gap_because = modelled(bundle, known, device), ""
    except DataError as error:
        trained_on, no_gap_because = None, str(error)
    flow = load_flow(bundle, device)
    total, done = len(images) + (len(trained_on) if trained_on else 0), 0
    total += len(images) * config.flow.num_classes if recognizes else 0
    total += options.samples

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    def score(scored: Images) -> NDArray[np.float64]:
        return score_images(
            flow,
            scored,
            config.noise,
            conditional=conditional,
            draws=options.draws,
            seed=options.seed,
            batch_size=options.batch_size,
            advance=advance,
        )

    def recognize(recognized: Images) -> Accuracy:
        return recognize_images(
            flow,
            recognized,
            config.noise,
            config.prior,
            draws=options.draws,
            seed=options.seed,
            batch_size=options.batch_size,
            advance=advance,
        )

    return Evaluation(
        bundle=bundle,
        data_name=data_name(data),
        options=options,
        conditional=conditional,
        bits=score(images),
        train_bits=score(trained_on) if trained_on else None,
        no_gap_because=no_gap_because,
        codes=code_lengths(images.pixels) if config.noise.kind == "uniform" else None,
        accuracy=recognize(images) if recognizes else None,
        soundness=sample_soundness(
            flow,
            config.noise,
            bundle.sampling,
            options.samples,
            codec=load_codec(bundle, device),
            advance=advance,
        )
        if options.samples
        else None,
    )


def _training_images(bundle: Bundle, data: Path, options: EvaluationOptions, count: int, cache: Path | None) -> Images:
    """The 8-bit images the bundle was trained on; :class:`DataError` when ``data`` does not hold just these."""
    if options.split == "train" or count == 0:
        raise DataError("not asked for")
    return training_split(bundle, load_known_images(bundle, data, "train", cache)).trained_on


def sample_images(images: Images, count: int, seed: int) -> Images:
    """``count`` images (all, if there are fewer) chosen at random by ``seed``, without repeats."""
    chosen = np.sort(epoch_order(len(images), seed, epoch=0)[:count])
    return Images(images.pixels[chosen], images.labels[chosen], images.class_names)


@torch.inference_mode()
def score_images(
    flow: Flow,
    images: Images,
    noise: NoiseProtocol,
    *,
    conditional: bool,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float64]:
    """Bits/dim of every image, (N,), computed in the flow's precision on its device.

    ``conditional`` gives each image its label as class, else none. ``advance`` is told the number
    of images after each batch. Raises ``ValueError`` when seed + N is not a seed.
    """
    device, results = flow.prior_variance.device, []
    for copies, labels in noisy_batches(images, noise, draws=draws, seed=seed, batch_size=batch_size, device=device):
        y_B = labels if conditional else torch.full_like(labels, NO_CLASS)
        nats_KB = torch.stack([log_likelihood(flow, flow.patchify(copy_BCHW), y_B).double() for copy_BCHW in copies])
        bits_B = bits_per_dim(combine_draws(nats_KB, noise), flow.config.num_dims, noise)
        results.append(torch.as_tensor(bits_B).cpu().numpy())
        advance(len(labels))
    return np.concatenate(results)
