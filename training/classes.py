"""Agreement between a model's classes and the classes of a data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from training.config import TrainConfig
from training.data import DataError, Images


def resolve_classes(config: TrainConfig, images: Images) -> tuple[TrainConfig, Images]:
    """The configuration with its classes settled, and the images with labels in that order.

    With ``data.classes_from_data`` number and names come from the data, and a single class means no
    classes. Otherwise, and where number or names are set all the same (as in a finished run's
    ``config.yaml``), the data must have exactly the configuration's classes; :class:`DataError`
    names both when it has not. IDX files have no names: their classes are called 0, 1, ….
    """
    found = class_names(images)
    if config.data.classes_from_data and not config.flow.num_classes:
        names = found if len(found) > 1 else ()
        return replace(config, flow=replace(config.flow, num_classes=len(names)), class_names=names), images
    if not config.flow.num_classes:
        return config, images
    if len(found) != config.flow.num_classes:
        raise DataError(
            f"{config.name} is a model of {config.flow.num_classes} classes{_listed(config.class_names)}, "
            f"but the data has {len(found)}{_listed(found)}"
        )
    if not config.class_names:
        return replace(config, class_names=found), images
    return config, match_labels(images, config.class_names, config.name)


def class_names(images: Images) -> tuple[str, ...]:
    """The names of the data's classes in label order."""
    return images.class_names or tuple(str(label) for label in range(int(images.labels.max()) + 1))


def match_labels(images: Images, names: tuple[str, ...], model: str) -> Images:
    """Images whose labels follow ``names``: matched by name where the data has names, else by number.

    The data may lack classes, as a small test split does. Raises :class:`DataError` for classes that
    ``model`` does not have.
    """
    if not images.class_names:
        highest = int(images.labels.max())
        if highest >= len(names):
            raise DataError(f"{model} has {len(names)} classes{_listed(names)}, but the data has a label {highest}")
        return replace(images, class_names=names)
    unknown = [name for name in images.class_names if name not in names]
    if unknown:
        raise DataError(f"{model} has the classes{_listed(names)}, but the data has{_listed(tuple(unknown))}")
    new_label = np.array([names.index(name) for name in images.class_names], np.int64)
    return replace(images, labels=new_label[images.labels], class_names=names)


def class_frequencies(images: Images, num_classes: int) -> tuple[float, ...]:
    """How often each class is among the images, in label order: p(y) for a bundle, with sum 1; empty without classes.

    A class without any image is not impossible: then every class counts one more image (Laplace's rule).
    """
    if not num_classes:
        return ()
    counts = np.bincount(images.labels, minlength=num_classes)
    if not counts.all():
        counts = counts + 1
    return tuple((counts / counts.sum()).tolist())


def _listed(names: tuple[str, ...], limit: int = 12) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:limit])}{', …' if len(names) > limit else ''})"
