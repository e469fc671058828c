"""What a bundle was trained on, and by which runs, by the record that training left in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.bundle import Bundle
from training.checkpoint import data_fingerprint
from training.classes import match_labels
from training.data import DataError, Images


@dataclass(frozen=True)
class TrainingSplit:
    """The training split of a bundle's own data set in its two parts."""

    trained_on: Images
    """What the weights were made from."""
    kept_out: Images
    """The holdout: what training never saw, and so as good as new; may be empty."""


def training_split(bundle: Bundle, images: Images) -> TrainingSplit:
    """Divide the images of a training split into those the bundle was trained on and the others.

    Raises :class:`~training.data.DataError` that says why when they are not the bundle's own training set.
    """
    config, provenance = bundle.config, bundle.config.training.get("data", {})
    if not {"num_images", "sha256"} <= provenance.keys():
        raise DataError("the bundle does not say which images it was trained on")
    if config.flow.num_classes:
        images = match_labels(images, config.class_names, config.name)
    count = provenance["num_images"]
    if len(images) < count:
        raise DataError(
            f"the training images here are not the ones it was trained on: {len(images):,} here, and it saw {count:,}"
        )
    if data_fingerprint(images.part(None, count)) != provenance["sha256"]:
        # One hash of all of them: it cannot tell other images from the same ones that came otherwise.
        raise DataError(
            "the training images here are not the ones it was trained on, or not with the same classes, in the same "
            "order and decoded to the same pixels: they have another hash"
        )
    return TrainingSplit(images.part(None, count), images.part(count, None))


def training_runs(bundle: Bundle) -> tuple[Mapping[str, Any], ...]:
    """The records of the runs that made a bundle's weights, the first one first.

    More than one for a model that was fine-tuned. Where the first of them has a ``from``, it began with weights whose
    own training is not known; empty for a bundle that says nothing.
    """
    runs: list[Mapping[str, Any]] = []
    record: Any = bundle.config.training
    while isinstance(record, Mapping) and record:
        runs.insert(0, record)
        start = record.get("from")
        record = start.get("training") if isinstance(start, Mapping) else None
    return tuple(runs)
