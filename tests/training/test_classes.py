"""Classes of the model against classes of the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.classes import class_frequencies, match_labels, resolve_classes
from training.config import TrainConfig
from training.data import DataError, Images


@pytest.fixture
def from_data(config: TrainConfig) -> TrainConfig:
    """A preset that takes its classes from the data."""
    return config.with_overrides(classes_from_data=True, flow=replace(config.flow, num_classes=0))


def named(images: Images, *names: str) -> Images:
    return replace(images, class_names=names)


def test_number_and_names_come_from_the_data(from_data: TrainConfig, images: Images) -> None:
    config, _ = resolve_classes(from_data, named(images, "left", "right"))
    assert (config.flow.num_classes, config.class_names) == (2, ("left", "right"))
    config, _ = resolve_classes(from_data, images)
    assert config.class_names == ("0", "1")


def test_one_folder_makes_an_unconditional_model(from_data: TrainConfig, images: Images) -> None:
    single = Images(images.pixels, np.zeros_like(images.labels), ("all",))
    config, _ = resolve_classes(from_data, single)
    assert (config.flow.num_classes, config.class_names) == (0, ())


def test_resolving_twice_changes_nothing(from_data: TrainConfig, images: Images) -> None:
    once = resolve_classes(from_data, images)
    assert resolve_classes(*once)[0] == once[0]


def test_what_is_set_beside_classes_from_the_data_must_be_theirs(from_data: TrainConfig, images: Images) -> None:
    def with_classes(number: int, *names: str) -> TrainConfig:
        return replace(from_data, flow=replace(from_data.flow, num_classes=number), class_names=names)

    with pytest.raises(DataError, match=r"tiny is a model of 7 classes, but the data has 2 \(0, 1\)"):
        resolve_classes(with_classes(7), images)
    with pytest.raises(DataError, match=r"\(left, right\).*\(up\)"):
        resolve_classes(with_classes(2, "left", "right"), named(images, "left", "up"))
    single = Images(images.pixels, np.zeros_like(images.labels), ("all",))
    with pytest.raises(DataError, match=r"2 classes, but the data has 1 \(all\)"):
        resolve_classes(with_classes(2), single)
    # Names for the numbers of IDX files, and another order of the data's names, are no contradiction.
    assert resolve_classes(with_classes(2, "left", "right"), images)[0].class_names == ("left", "right")
    _, matched = resolve_classes(with_classes(2, "right", "left"), named(images, "left", "right"))
    np.testing.assert_array_equal(matched.labels, 1 - images.labels)


def test_a_model_without_classes_ignores_the_data_s(config: TrainConfig, images: Images) -> None:
    unconditional = replace(config, flow=replace(config.flow, num_classes=0))
    assert resolve_classes(unconditional, images)[0] == unconditional


def test_labels_follow_the_preset_s_order_of_names(config: TrainConfig, images: Images) -> None:
    config = replace(config, class_names=("right", "left"))
    resolved, matched = resolve_classes(config, named(images, "left", "right"))
    assert resolved == config
    np.testing.assert_array_equal(matched.labels, 1 - images.labels)


def test_a_wrong_number_names_both(config: TrainConfig, images: Images) -> None:
    three = Images(images.pixels, np.arange(len(images)) % 3, ("cat", "dog", "bird"))
    with pytest.raises(DataError, match=r"tiny is a model of 2 classes, but the data has 3 \(cat, dog, bird\)"):
        resolve_classes(config, three)


def test_other_names_are_listed(config: TrainConfig, images: Images) -> None:
    config = replace(config, class_names=("left", "right"))
    with pytest.raises(DataError, match=r"\(left, right\).*\(up\)"):
        resolve_classes(config, named(images, "left", "up"))


def test_a_split_may_lack_classes_but_not_add_any(images: Images) -> None:
    only_right = Images(images.pixels, np.zeros_like(images.labels), ("right",))
    assert set(match_labels(only_right, ("left", "right"), "m").labels) == {1}
    with pytest.raises(DataError, match="label 1"):
        match_labels(images, ("left",), "m")


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    [
        ([0, 1, 1, 1], 2, (0.25, 0.75)),
        # A class without images: each counts one more.
        ([0, 2, 2], 3, (2 / 6, 1 / 6, 3 / 6)),
        ([0, 1], 0, ()),
    ],
)
def test_frequencies_of_the_classes(labels: list[int], num_classes: int, expected: tuple[float, ...]) -> None:
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), np.array(labels, np.int64))
    assert class_frequencies(images, num_classes) == pytest.approx(expected)
