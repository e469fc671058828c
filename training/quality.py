"""How good a model's samples are, and whether they are copies: all figures of one set of samples.

Beside the samples' figures stand those of real images, as many where there are enough and measured in the same way:
what a perfect model would get. The reference is of the test split, those real images are of the training split: of its
holdout, which the model has not seen, where that has half as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bundle import Bundle
from model.codecs.base import Codec, Identity
from model.codecs.weights import load_codec
from model.config import SamplingDefaults, check
from model.flow import NO_CLASS, Flow
from model.likelihood import encode, to_pixels
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from training.ablations.measure import draw_samples, sample_labels
from training.classes import match_labels
from training.data import DataError, Images, epoch_order, load_images
from training.features import Extractor
from training.frechet import COMPONENTS, GROUPS, Figure, Moments, Reference, frechet_distance
from training.hardware import describe_hardware
from training.kernel import kernel_distance
from training.latents import encode as encode_images
from training.latents import with_digests
from training.neighbours import Nearest, PrecisionRecall, nearest_images, precision_recall
from training.noisy import noisy_batches
from training.provenance import training_runs, training_split

SHOWN = 64
"""Samples on the report's picture."""
PAIRS = 12
"""Samples that are shown beside their nearest training image: those that are nearest to any."""
MAX_COMPARED = 10_000
"""Images in the kernel distance, precision and recall, at most: their cost grows with the square of it."""
MAX_COPIES = 1000
"""Samples, and test images, whose nearest training images are looked for, at most."""
FEWEST = 2 * GROUPS
"""Images of each kind that there must be: two in every group of the jackknife."""

Begin = Callable[[str, int], Callable[[int], None]]
"""Told what begins and of how many images; what it returns is told how many more are done."""


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What is drawn and what it is compared with."""

    num_samples: int = 1000
    """Samples; 50,000 is the standard of published FIDs."""
    reference_images: int = 10_000
    """Real test images that samples are compared with, at most."""
    reconstructed: int = 64
    """Test images that are encoded and decoded."""
    components: int = COMPONENTS
    """Principal components of the corrected Fréchet distance; fewer where there are too few images for so many."""
    seed: int = 0
    """Sample i has the seed ``seed + i``."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "reference_images"):
            check(getattr(self, name) >= FEWEST, name, getattr(self, name), f"an integer >= {FEWEST} for a report")


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Figures of one set of images against the reference."""

    num_images: int
    corrected: Figure
    """Fréchet distance on principal components, without its 1/n term."""
    frechet: float
    """Fréchet distance on all features, as it is usually given."""
    kernel: Figure
    neighbours: PrecisionRecall


@dataclass(frozen=True, kw_only=True)
class Copying:
    """Samples and their nearest training images, beside images that nobody trained on and theirs."""

    samples: Nearest
    held_out: Nearest
    num_training: int
    pairs: NDArray[np.uint8]
    """The samples nearest to a training image and these, mirrored where they are nearest so, (2, N, C, H, W)."""
    mirrored: bool
    """Whether they were looked for among the training images' mirror images, too."""

    @property
    def share_nearer(self) -> float:
        """Share of the samples that are as near to a training image as the nearest 1% of the held-out images are.

        More than about 0.01 is a sign of copying, or of samples simpler than real images are.
        """
        return float((self.samples.distance <= np.quantile(self.held_out.distance, 0.01)).mean())


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Everything that was measured of a bundle's samples."""

    bundle: Bundle
    options: QualityOptions
    components: int
    """Principal components that there were."""
    sampling: SamplingDefaults
    """How the samples were drawn: as the bundle recommends."""
    features: str
    reference: Moments
    """Of the features of the test images that all is compared with."""
    samples: Distances | None
    """None where too few samples are finite."""
    real: Distances
    """The same for real images: the floor."""
    real_from: str
    """Where these are from."""
    published: float | None
    """Fréchet distance from the statistics in a file."""
    not_finite: int
    seconds: float
    """Time to draw all samples, in batches."""
    hardware: str
    """What they were drawn on."""
    copying: Copying | None
    """None where no sample is finite."""
    is_own_data: bool
    """Whether the training split is known to be what the bundle was trained on."""
    reconstruction: NDArray[np.float64]
    """Root mean square error of each image that was encoded to noise and decoded: in 8-bit steps, or in the unit of the
    latents for a model of these."""
    autoencoding: NDArray[np.float64] | None
    """Of a model of latents that of each image that went through its autoencoder alone, in 8-bit steps."""
    shown: NDArray[np.uint8]


def measure_quality(
    bundle: Bundle,
    flow: Flow,
    data: Path,
    extractor: Extractor,
    options: QualityOptions,
    statistics: Moments | None = None,
    begin: Begin = lambda text, total: lambda count: None,
    cache: Path | None = None,
) -> Quality:
    """Draw samples of a bundle and measure them; with ``statistics`` also their Fréchet distance from these.

    ``cache`` is that of :func:`training.data.load_images`. Raises ``ValueError`` for options that do not fit, and
    :class:`~training.data.DataError`.
    """
    config, device, codec = bundle.config, flow.prior_variance.device, load_codec(bundle, flow.prior_variance.device)
    test, train = (_load(bundle, data, split, cache) for split in ("test", "train"))
    if min(len(test), len(train)) < FEWEST:
        raise DataError(
            f"{data}: a report compares with at least {FEWEST} test and as many training images; "
            f"there are {len(test):,} and {len(train):,}"
        )
    trained_on, real, real_from, is_own_data = _splits(bundle, train, options.num_samples)
    reference = _chosen(test, options.reference_images)
    seeds = range(options.seed, options.seed + options.num_samples)
    drawn = draw_samples(
        flow,
        config.noise,
        bundle.sampling,
        seeds,
        sample_labels(flow, reference.labels, len(seeds)),
        codec,
        begin("samples", len(seeds)),
    )
    advance = begin("features", len(reference) + len(drawn.pixels) + len(real))
    reference_MF, samples_NF, real_NF = (
        _features(extractor, pixels, device, advance) for pixels in (reference.pixels, drawn.pixels, real.pixels)
    )
    # Of the samples that are finite: one that is not must not take the figures of all others with it.
    fewest = min(len(reference), len(real), max(FEWEST, len(drawn.pixels)))
    components = min(options.components, extractor.num_features, fewest // 2)
    yardstick = _Yardstick.of(extractor.name, reference_MF, components)
    published = None
    if statistics is not None and len(drawn.pixels) > 1:
        published = frechet_distance(Moments.of(samples_NF), statistics)
    again = _chosen(test, options.reconstructed)
    return Quality(
        bundle=bundle,
        options=options,
        components=components,
        sampling=bundle.sampling,
        features=extractor.name,
        reference=yardstick.moments,
        samples=yardstick.measure(samples_NF) if len(samples_NF) >= yardstick.fitted.min_samples else None,
        real=yardstick.measure(real_NF),
        real_from=real_from,
        published=published,
        not_finite=drawn.not_finite,
        seconds=drawn.seconds,
        hardware=describe_hardware(device),
        copying=find_copies(
            *(drawn.pixels[:MAX_COPIES], _chosen(test, MAX_COPIES).pixels, trained_on.pixels, device, begin),
            mirrored=any(run.get("data", {}).get("flip", False) for run in training_runs(bundle)),
        )
        if len(drawn.pixels)
        else None,
        is_own_data=is_own_data,
        reconstruction=reconstruction_errors(flow, bundle, _modelled(again, codec)),
        autoencoding=None if isinstance(codec, Identity) else _autoencoding_errors(again, codec, device),
        shown=drawn.pixels[:SHOWN],
    )


def _load(bundle: Bundle, data: Path, split: str, cache: Path | None) -> Images:
    """8-bit images of a split, with the bundle's labels."""
    config = bundle.config
    images = load_images(data, split, config.image_size, config.image_channels, cache)
    return match_labels(images, config.class_names, config.name) if config.flow.num_classes else images


def _modelled(images: Images, codec: Codec) -> Images:
    """As the flow models them."""
    return images if isinstance(codec, Identity) else encode_images(images, codec)


def _splits(bundle: Bundle, train: Images, count: int) -> tuple[Images, Images, str, bool]:
    """What the bundle was trained on, real images to compare with the test images, and what these are; at last whether
    it is known to be what the bundle was trained on."""
    try:
        known = train if bundle.config.codec is None else with_digests(train, bundle.config.codec)
        num_trained = len(training_split(bundle, known).trained_on)
    except DataError:
        return train, _chosen(train, count), "the training split, which the model may have seen", False
    trained_on, kept_out = train.part(None, num_trained), train.part(num_trained, None)
    if len(kept_out) >= max(FEWEST, count // 2):
        return trained_on, _chosen(kept_out, count), "the training split's holdout", True
    return trained_on, _chosen(trained_on, count), "the training split, which the model has seen", True


def _chosen(images: Images, count: int) -> Images:
    kept = epoch_order(len(images), seed=0, epoch=0)[:count]
    return Images(images.pixels[kept], images.labels[kept], images.class_names)


def _features(
    extractor: Extractor, pixels: NDArray[np.uint8], device: torch.device, advance: Callable[[int], None]
) -> Tensor:
    parts = [
        extractor(torch.from_numpy(np.ascontiguousarray(pixels[start : start + 512])).to(device), advance).cpu()
        for start in range(0, len(pixels), 512)
    ]
    features_NF = torch.cat([torch.zeros(0, extractor.num_features), *parts])
    if not bool(features_NF.isfinite().all()):
        raise ValueError(f"extractor: {extractor.name} gives features that are not finite, allowed is finite ones")
    return features_NF


@dataclass(frozen=True)
class _Yardstick:
    """The reference images' features, as every figure needs them."""

    features_MF: Tensor
    moments: Moments
    fitted: Reference

    @classmethod
    def of(cls, name: str, features_MF: Tensor, components: int) -> _Yardstick:
        moments = Moments.of(features_MF)
        return cls(features_MF, moments, Reference.fit(name, moments, components))

    def measure(self, features_NF: Tensor) -> Distances:
        compared, others = features_NF[:MAX_COMPARED], self.features_MF[:MAX_COMPARED]
        return Distances(
            num_images=len(features_NF),
            corrected=self.fitted.measure(features_NF),
            frechet=frechet_distance(Moments.of(features_NF), self.moments),
            kernel=kernel_distance(compared, others),
            neighbours=precision_recall(compared, others),
        )


def find_copies(
    samples: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    trained_on: NDArray[np.uint8],
    device: torch.device,
    begin: Begin = lambda text, total: lambda count: None,
    *,
    mirrored: bool = False,
) -> Copying:
    """Samples and held-out images with the training images nearest to them, all (N, C, H, W).

    With ``mirrored`` each training image counts as its mirror image too, as it did for a model trained with flips.
    """
    advance = begin("nearest training images", (len(samples) + len(held_out)) * (1 + mirrored))

    def find(images: NDArray[np.uint8]) -> tuple[Nearest, NDArray[np.bool_]]:
        """The nearest of each, and whether it is nearest as its mirror image."""
        nearest = nearest_images(images, trained_on, device=device, advance=advance)
        if not mirrored:
            return nearest, np.zeros(len(images), np.bool_)
        # An image is as far from a mirror image as its own mirror image is from the original; these are fewer to turn.
        other = nearest_images(images[..., ::-1], trained_on, device=device, advance=advance)
        is_other = other.distance < nearest.distance
        index = np.where(is_other, other.index, nearest.index)
        return Nearest(index, np.minimum(nearest.distance, other.distance)), is_other

    nearest, is_mirrored = find(samples)
    closest = np.argsort(nearest.distance, kind="stable")[:PAIRS]
    originals = trained_on[nearest.index[closest]]
    shown = np.where(is_mirrored[closest, None, None, None], originals[..., ::-1], originals)
    return Copying(
        samples=nearest,
        held_out=find(held_out)[0],
        num_training=len(trained_on),
        pairs=np.stack([samples[closest], shown]),
        mirrored=mirrored,
    )


@torch.no_grad()
def reconstruction_errors(flow: Flow, bundle: Bundle, images: Images, batch_size: int = 32) -> NDArray[np.float64]:
    """Images with noise encoded and decoded again: the error of each, root mean square, in 8-bit steps.

    ``images`` are as the flow models them; for latents the errors are in the latents' own unit.
    """
    config, sampler, errors = bundle.config, Sampler(flow), []
    device, unit = flow.prior_variance.device, 127.5 if config.codec is None else 1.0
    for copies, labels in noisy_batches(images, config.noise, draws=1, seed=0, batch_size=batch_size, device=device):
        (noisy_BCHW,) = copies
        x_BTD = flow.patchify(noisy_BCHW)
        y_B = labels if config.flow.num_classes else torch.full_like(labels, NO_CLASS)
        u_BTD, _ = encode(flow, x_BTD, y_B)
        given = [int(y) if config.flow.num_classes else None for y in labels]
        decoded = finish(sampler.decode(make_rows(u_BTD, given, [SamplingDefaults()] * len(given))))
        errors.append(_root_mean_squares(unit * (decoded.x_BTD - x_BTD)))
    return np.concatenate(errors)


@torch.no_grad()
def _autoencoding_errors(images: Images, codec: Codec, device: torch.device) -> NDArray[np.float64]:
    pixels_BCHW = torch.from_numpy(images.pixels).to(device)
    again_BCHW = to_pixels(codec.images(codec.modelled(pixels_BCHW)))
    return _root_mean_squares(again_BCHW.double() - pixels_BCHW.double())


def _root_mean_squares(difference: Tensor) -> NDArray[np.float64]:
    """Of each of (B, …)."""
    return difference.double().flatten(1).square().mean(dim=1).sqrt().cpu().numpy()
