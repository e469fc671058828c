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
    """What the weights were made from, by any run."""
    kept_out: Images
    """The holdout: what training never saw, and so as good as new; may be empty."""


def training_split(bundle: Bundle, images: Images) -> TrainingSplit:
    """Divide the images of a training split into those the bundle was trained on and the others.

    Of a fine-tuned bundle all runs count: what one of them kept out, another may have seen. Raises
    :class:`~training.data.DataError` that says why when they are the training set of none of its runs.
    """
    if bundle.config.flow.num_classes:
        images = match_labels(images, bundle.config.class_names, bundle.name)
    counts, other = [], None
    for record in training_runs(bundle) or ({},):
        try:
            counts.append(_images_of(record, images))
        except DataError as error:
            # Where none fits, the last run's reason is told.
            other = error
    if other is not None and not counts:
        raise other
    return TrainingSplit(images.part(None, max(counts)), images.part(max(counts), None))


def check_images_of_last_run(bundle: Bundle, images: Images) -> None:
    """Refuse other images than those that the bundle's last run had; raises :class:`~training.data.DataError`."""
    if bundle.config.flow.num_classes:
        images = match_labels(images, bundle.config.class_names, bundle.name)
    _images_of(bundle.config.training, images)


def _images_of(record: Mapping[str, Any], images: Images) -> int:
    """How many of these images, the first ones, a run was on; :class:`DataError` that says why it was not on them."""
    provenance = record.get("data", {})
    if not {"num_images", "sha256"} <= provenance.keys():
        raise DataError("the bundle does not say which images it was trained on")
    count = int(provenance["num_images"])
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
    return count


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
