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
from model.anomaly.statistics import image_statistics
from model.bundle import NAMES, Bundle, is_name
from model.config import NoiseProtocol
from model.flow import Flow
from model.weights import load_flow
from training.data import DataError, Images, load_images
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


def calibrate_bundle(
    bundle: Bundle,
    data: Path,
    options: CalibrateOptions,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Calibrate a bundle with the normal images of a data directory.

    ``on_progress`` is told the images looked at so far and their whole number. Raises
    :class:`~training.data.DataError` for data that cannot be used or was trained on, and ``ValueError`` for too few
    images.
    """
    images, source = normal_images(bundle, data, options)
    # Too few are told before minutes are spent on them.
    split_sizes(len(images))
    done = 0

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
        "source": source,
    }
    return calibrate(statistics, images.pixels, record, order_seed=options.seed)


def normal_images(bundle: Bundle, data: Path, options: CalibrateOptions) -> tuple[Images, str]:
    """The images to calibrate with, and in words what they are; raises :class:`~training.data.DataError`."""
    flow, name = bundle.config.flow, data.resolve().name
    images, source = load_images(data, options.split, flow.image_size, flow.channels), f"{options.split} split"
    if options.split == "train":
        try:
            split = training_split(bundle, images)
        except DataError:
            # Other data than the bundle's own, so all of it is new to the weights.
            pass
        else:
            images, source = split.kept_out, "images kept out of training"
            if not len(images):
                raise DataError(
                    f"{data}: {bundle.name} was trained on all images of its training split, and calibrated with them "
                    "it would flag too many others; give other normal images (--data, or --split test), or train with "
                    "a holdout (data.holdout in the preset)"
                )
    images = images.part(None, options.limit)
    return images, f"{name}, {source}"


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
