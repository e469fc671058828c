"""Data sets of Hugging Face's ``datasets`` (the extra ``huggingface``): saved in a directory, or on the hub.

The images are the first column of images, the classes those of the column ``label``, or of the first column of
classes; without one all images are one class. For testing there is the split ``test``, or else
``validation`` or ``val``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.image_cache import DataError
from training.source import TEST_NAMES, Source

HUB = "hf:"
"""What stands before the name of a data set on the hub."""
SAVED = ("dataset_dict.json", "state.json")
"""Files by which a directory is known that ``save_to_disk`` wrote, of several splits or of one."""
SPLITS = {"train": ("train",), "test": TEST_NAMES}


def is_on_hub(directory: Path) -> bool:
    """Whether ``--data`` names a data set on the hub, and no directory."""
    return str(directory).startswith(HUB)


def is_dataset(directory: Path) -> bool:
    """Whether ``--data`` names a data set that is read by ``datasets``."""
    return is_on_hub(directory) or any((directory / name).is_file() for name in SAVED)


def open_source(directory: Path, split: str) -> Source:
    """The encoded images of a split; raises :class:`DataError` for what cannot be used."""
    chosen = _split(directory, split).with_format(None)
    datasets = _library(directory)
    kinds = {name: type(feature) for name, feature in chosen.features.items()}
    images = [name for name, kind in kinds.items() if kind is datasets.Image]
    classes = [name for name, kind in kinds.items() if kind is datasets.ClassLabel]
    if not images:
        raise DataError(f"{directory}: has no column of images, but {', '.join(kinds)}")
    if not len(chosen):
        raise DataError(f"{directory}: there are no images in the {split} split")
    column = images[0]
    labels = np.zeros(len(chosen), np.int64)
    names: tuple[str, ...] = ()
    if classes:
        label = "label" if "label" in classes else classes[0]
        names = tuple(chosen.features[label].names)
        labels = np.array([-1 if value is None else value for value in chosen[label][:]], np.int64)
        if labels.min() < 0:
            raise DataError(f"{directory}: row {labels.argmin()} of the {split} split has no class")
    rows = chosen.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def items() -> Iterator[tuple[str, bytes | Path]]:
        for number, row in enumerate(rows):
            content = row[column]
            if content is None or not (content["bytes"] or content["path"]):
                raise DataError(f"{directory}: row {number} has no image")
            yield f"{directory}, row {number}", content["bytes"] or Path(content["path"])

    files = [Path(file["filename"]).resolve() for file in chosen.cache_files]
    root = Path(os.path.commonpath([file.parent for file in files]))
    return Source(files=files, root=root, items=items, labels=labels, class_names=names)


def _split(directory: Path, split: str) -> Any:
    datasets = _library(directory)
    name = str(directory)
    try:
        # In files, not in memory: the cache of decoded images knows a data set by its files.
        if is_on_hub(directory):
            found = datasets.load_dataset(name.removeprefix(HUB), keep_in_memory=False)
        else:
            found = datasets.load_from_disk(name, keep_in_memory=False)
    except (OSError, ValueError, KeyError, IndexError) as error:
        # The last is what ``datasets`` raises for an empty one that it has saved itself.
        reason = str(error).partition("\n")[0]
        raise DataError(f"{directory}: cannot be opened as a data set: {reason}") from error
    splits = found if isinstance(found, dict) else {"train": found}
    for wanted in SPLITS[split]:
        if wanted in splits:
            return splits[wanted]
    raise DataError(f"{directory}: no {split} split (it has {', '.join(splits)})")


def _library(directory: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{directory}: is a data set of Hugging Face's datasets, which is not installed "
            "(pip install 'tarflow[huggingface]')"
        ) from error
    return datasets
