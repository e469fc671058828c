"""How good a model's samples are, and whether they are copies: all figures of one set of samples.

Beside the samples' figures stand those of real images, as many where there are enough and measured in the same way:
what a perfect model would get. The reference is of the test split, those real images are of the training split: of its
holdout where there is one, which the model has not seen.
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
from model.config import SamplingDefaults
from model.flow import NO_CLASS, Flow
from model.likelihood import encode
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from training.ablations.measure import draw_samples, sample_labels
from training.classes import match_labels
from training.data import DataError, Images, epoch_order, load_images
from training.feature_files import open_extractor, read_statistics
from training.features import Extractor
from training.frechet import COMPONENTS, Figure, Moments, Reference, frechet_distance
from training.kernel import kernel_distance
from training.neighbours import Nearest, PrecisionRecall, nearest_images, precision_recall
from training.noisy import noisy_batches
from training.provenance import training_split

SHOWN = 64
"""Samples on the report's picture."""
PAIRS = 12
"""Samples that are shown beside their nearest training image: those that are nearest to any."""
MAX_COMPARED = 10_000
"""Images in the kernel distance, precision and recall, at most: their cost grows with the square of it."""


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What is drawn and what it is compared with."""

    num_samples: int = 1000
    """Samples; 50,000 is the standard of published FIDs."""
    reference_images: int = 10_000
    """Real test images that samples are compared with, at most."""
    reconstructed: int = 64
    """Test images that are encoded and decoded."""
    extractor: str = "efficientnet-lite0"
    """Name of the features' extractor, or a TorchScript file."""
    statistics: Path | None = None
    """Moments of real images' features in a file, for a Fréchet distance from these."""
    components: int = COMPONENTS
    """Principal components of the corrected Fréchet distance."""
    sampling: SamplingDefaults | None = None
    """How to sample; as the bundle recommends if not given."""
    seed: int = 0
    """Sample i has the seed ``seed + i``."""


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
    """The samples nearest to a training image and these, (2, N, C, H, W)."""

    @property
    def share_nearer(self) -> float:
        """Share of the samples that are nearer to a training image than the nearest 1% of the held-out images are:
        about 0.01 for a model that generalizes, more for one that copies."""
        return float((self.samples.distance < np.quantile(self.held_out.distance, 0.01)).mean())


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Everything that was measured of a bundle's samples."""

    bundle: Bundle
    options: QualityOptions
    sampling: SamplingDefaults
    features: str
    num_reference: int
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
    copying: Copying | None
    reconstruction: NDArray[np.float64]
    """Root mean square error of each image that was encoded and decoded, in 8-bit steps."""
    shown: NDArray[np.uint8]


def measure_quality(
    bundle: Bundle,
    flow: Flow,
    data: Path,
    options: QualityOptions,
    advance: Callable[[str, int], None] = lambda text, count: None,
) -> Quality:
    """Draw samples of a bundle and measure them; ``advance`` is told what was done, and of how many images.

    Raises ``ValueError`` for options that do not fit, :class:`~training.data.DataError` or
    :class:`~training.features.ExtractorError`.
    """
    config, device = bundle.config, flow.prior_variance.device
    shape = (config.flow.image_size, config.flow.channels)
    test, train = (_matched(load_images(data, split, *shape), bundle) for split in ("test", "train"))
    trained_on, unseen, real_from = _splits(bundle, train)
    extractor = open_extractor(options.extractor, device)
    statistics = None if options.statistics is None else read_statistics(options.statistics)
    if statistics is not None and len(statistics.mean_F) != extractor.num_features:
        raise ValueError(
            f"reference: got {len(statistics.mean_F)} features in {options.statistics}, allowed is the "
            f"{extractor.num_features} of {extractor.name}"
        )
    reference = _chosen(test, options.reference_images)
    real = _chosen(unseen, options.num_samples)
    sampling = options.sampling or bundle.sampling
    seeds = range(options.seed, options.seed + options.num_samples)
    drawn = draw_samples(flow, config.noise, sampling, seeds, sample_labels(flow, reference.labels, len(seeds)))
    advance("samples", len(seeds))
    reference_MF = _features(extractor, reference.pixels, device, lambda count: advance("reference", count))
    yardstick = _Yardstick.of(extractor.name, reference_MF, options.components)
    found = [
        yardstick.measure(_features(extractor, pixels, device, lambda count: advance("features", count)))
        if len(pixels) >= yardstick.fitted.min_samples
        else None
        for pixels in (drawn.pixels, real.pixels)
    ]
    if found[1] is None:
        raise ValueError(f"data: got {len(real)} real images to compare, allowed is >= {yardstick.fitted.min_samples}")
    published = None
    if statistics is not None and len(drawn.pixels) > 1:
        features_NF = _features(extractor, drawn.pixels, device, lambda count: None)
        published = frechet_distance(Moments.of(features_NF), statistics)
    return Quality(
        bundle=bundle,
        options=options,
        sampling=sampling,
        features=extractor.name,
        num_reference=len(reference),
        samples=found[0],
        real=found[1],
        real_from=real_from,
        published=published,
        not_finite=drawn.not_finite,
        seconds=drawn.seconds,
        copying=find_copies(drawn.pixels, test.pixels, trained_on.pixels, device) if len(drawn.pixels) else None,
        reconstruction=reconstruction_errors(flow, bundle, _chosen(test, options.reconstructed)),
        shown=drawn.pixels[:SHOWN],
    )


def _matched(images: Images, bundle: Bundle) -> Images:
    config = bundle.config
    return match_labels(images, config.class_names, config.name) if config.flow.num_classes else images


def _splits(bundle: Bundle, train: Images) -> tuple[Images, Images, str]:
    """What the bundle was trained on, real images that it was not trained on, and what these are."""
    try:
        split = training_split(bundle, train)
    except DataError:
        return train, train, "the training split, which the model may have seen"
    if len(split.kept_out):
        return split.trained_on, split.kept_out, "the training split's holdout"
    return split.trained_on, split.trained_on, "the training split, which the model has seen"


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
    return torch.cat(parts)


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
    samples: NDArray[np.uint8], held_out: NDArray[np.uint8], trained_on: NDArray[np.uint8], device: torch.device
) -> Copying:
    """Samples and held-out images with the training images nearest to them, all (N, C, H, W)."""
    nearest = nearest_images(samples, trained_on, device=device)
    closest = np.argsort(nearest.distance, kind="stable")[:PAIRS]
    return Copying(
        samples=nearest,
        held_out=nearest_images(held_out, trained_on, device=device),
        num_training=len(trained_on),
        pairs=np.stack([samples[closest], trained_on[nearest.index[closest]]]),
    )


@torch.no_grad()
def reconstruction_errors(flow: Flow, bundle: Bundle, images: Images, batch_size: int = 32) -> NDArray[np.float64]:
    """Images with noise encoded to latents and decoded again: the error of each, root mean square in 8-bit steps."""
    config, sampler, errors = bundle.config, Sampler(flow), []
    device = flow.prior_variance.device
    for copies, labels in noisy_batches(images, config.noise, draws=1, seed=0, batch_size=batch_size, device=device):
        (noisy_BCHW,) = copies
        x_BTD = flow.patchify(noisy_BCHW)
        y_B = labels if config.flow.num_classes else torch.full_like(labels, NO_CLASS)
        u_BTD, _ = encode(flow, x_BTD, y_B)
        given = [int(y) if config.flow.num_classes else None for y in labels]
        decoded = finish(sampler.decode(make_rows(u_BTD, given, [SamplingDefaults()] * len(given))))
        difference = (decoded.x_BTD - x_BTD).double().flatten(1)
        errors.append((127.5 * difference.square().mean(dim=1).sqrt()).cpu().numpy())
    return np.concatenate(errors)
