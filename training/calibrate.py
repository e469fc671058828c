"""A bundle's own calibration: what is normal, measured on images that its weights were not made from.

A flow is surer of images that it was trained on, and p-values of a calibration on these would be too small for every
other normal image. So where the data is the bundle's own training set, only its holdout is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.anomaly.calibration import Calibration, calibrate, split_sizes
from model.anomaly.conformal import smallest_alpha
from model.anomaly.features import Statistics, concatenate
from model.anomaly.normals import distinct
from model.anomaly.statistics import image_statistics
from model.bundle import NAMES, Bundle, is_name
from model.config import NoiseProtocol
from model.flow import Flow
from model.weights import load_flow
from training.data import DataError, Images, data_name, load_images
from training.provenance import training_split

DEFAULT_NAME = "default"
"""What the service, too, calls the calibration of a bundle."""
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Which images are looked at, and how."""

    split: str = "train"
    """``train`` or ``test``; of a bundle's own training split only the holdout."""
    limit: int | None = None
    """Number of images, from the first; all if not given."""
    seed: int = 0
    """Seed of the noise, the same for every image, and of the division into fitting and calibrating."""
    name: str = DEFAULT_NAME
    """Name of the calibration."""
    batch_size: int = BATCH
    """Images per pass."""

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split: got {self.split!r}, allowed is train or test")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, allowed is an integer >= 0")
        if not is_name(self.name):
            raise ValueError(f"name: got {self.name!r}, allowed is {NAMES}")


@dataclass(frozen=True)
class NormalImages:
    """What a bundle is calibrated with."""

    images: Images
    """Each of them once."""
    source: str
    """What they are, in words."""
    notices: tuple[str, ...]
    """What is to be known about them: whether they are new to the model, and what was left out."""


def calibrate_bundle(
    bundle: Bundle,
    normals: NormalImages,
    options: CalibrateOptions,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Calibrate a bundle with normal images, those of :func:`normal_images`.

    ``on_progress`` is told the images looked at so far and their whole number. Raises ``ValueError`` for an image that
    the model has no finite statistics of.
    """
    images, done = normals.images, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, len(images))

    statistics = all_statistics(
        load_flow(bundle, device),
        bundle.config.noise,
        images.pixels,
        seed=options.seed,
        gradient=True,
        batch_size=options.batch_size,
        advance=advance,
    )
    record = {
        "name": options.name,
        "model": bundle.name,
        "model_id": bundle.model_id,
        "noise": bundle.config.noise.to_dict(),
        "seed": options.seed,
        "created": int(time.time()),
        "source": normals.source,
    }
    return calibrate(statistics, images.pixels, record, order_seed=options.seed)


def normal_images(bundle: Bundle, data: Path, options: CalibrateOptions, cache: Path | None = None) -> NormalImages:
    """The images of a data directory to calibrate with, without those that the bundle is known to be trained on.

    ``cache`` is that of :func:`training.data.load_images`. Raises :class:`~training.data.DataError` for data that
    cannot be used or was trained on, and ``ValueError`` for too few different images.
    """
    if bundle.config.codec is not None:
        raise DataError(f"{bundle.name} models latents of an autoencoder; calibrations are for models of pixels")
    flow, notices = bundle.config.flow, []
    images = load_images(data, options.split, flow.image_size, flow.channels, cache)
    source = f"{options.split} split"
    trained_on: Images | None = None
    try:
        if options.split != "train":
            raise DataError("its record is of a training split, and a test split cannot be compared with that")
        split = training_split(bundle, images)
    except DataError as error:
        # They may be other data than the bundle's own. Nobody can tell, but everybody can be told.
        notices.append(
            f"not checked whether {bundle.name} was trained on these images: {error}; if it was, it will flag too "
            "many others"
        )
    else:
        trained_on, images, source = split.trained_on, split.kept_out, "images kept out of training"
        if not len(images):
            raise DataError(
                f"{data}: {bundle.name} was trained on all images of its training split, and calibrated with them "
                "it would flag too many others; give other normal images (--data, or --split test), or train with "
                "a holdout (data.holdout in the preset)"
            )
        notices.append(
            f"checked that {bundle.name} was not trained on these images: they are the {len(images):,} that training "
            f"kept out, beside the {len(trained_on):,} in the bundle's record"
        )
    images = images.part(None, options.limit)
    kept = distinct(images.pixels, None if trained_on is None else trained_on.pixels)
    copies = len(images) - len(kept)
    if copies:
        of_what = "others" if trained_on is None else "others or of images that it was trained on"
        notices.append(f"left out {copies:,} of {len(images):,} images: exact copies of {of_what}")
        images = Images(images.pixels[kept], images.labels[kept], images.class_names)
    try:
        # Too few are told before minutes are spent on them.
        split_sizes(len(images))
    except ValueError as error:
        raise ValueError(f"{error} ({notices[-1]})" if copies else str(error)) from error
    return NormalImages(images, f"{data_name(data)}, {source}", tuple(notices))


def all_statistics(
    flow: Flow,
    noise: NoiseProtocol,
    pixels_NCHW: NDArray[np.uint8],
    *,
    seed: int,
    gradient: bool,
    batch_size: int = BATCH,
    advance: Callable[[int], None] = lambda count: None,
) -> Statistics:
    """The statistics of 8-bit images (N, C, H, W) without classes, in batches on the flow's device.

    ``advance`` is told the number of images after each batch. Raises ``ValueError`` for no images.
    """
    if not len(pixels_NCHW):
        raise ValueError("images: got none, allowed is at least 1")
    parts = []
    for start in range(0, len(pixels_NCHW), batch_size):
        batch = torch.from_numpy(pixels_NCHW[start : start + batch_size].copy())
        parts.append(image_statistics(flow, noise, batch, None, seed=seed, gradient=gradient))
        advance(len(batch))
    return concatenate(parts)


def open_calibration(bundle: Bundle, file: Path | None = None) -> Calibration:
    """The calibration in a file, or else the bundle's own.

    Raises ``ValueError`` that says how to make one where there is none, and
    :class:`~model.anomaly.calibration.CalibrationError` for a file that is damaged or of another model.
    """
    if file is not None:
        calibration = Calibration.from_bytes(file.read_bytes(), str(file))
    elif bundle.calibration is not None:
        calibration = Calibration.from_bytes(bundle.calibration, f"calibration of {bundle.name}")
    else:
        raise ValueError(
            f"{bundle.path}: has no calibration; make one of normal images that it was not trained on with "
            f"tarflow calibrate {bundle.path} --data DIR, or give one with --calibration FILE"
        )
    calibration.check_model(bundle.name, bundle.model_id)
    return calibration


def note(calibration: Calibration) -> str:
    """A calibration in one line, for the card."""
    record = calibration.record
    return (
        f"{record.name!r}, {record.num_fit:,} images fitted and {record.num_calibration:,} calibrated "
        f"({record.source}), smallest alpha {smallest_alpha(record.num_calibration):.4g}"
    )
