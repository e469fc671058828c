"""Loading IDX files and class folders; every file that cannot be used is named."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training.data import DataError, Images, epoch_order, load_images


def test_idx_files_come_back_in_their_order(idx_data: Path, images: Images) -> None:
    loaded = load_images(idx_data, "train", 8, 1)
    np.testing.assert_array_equal(loaded.pixels, images.pixels)
    np.testing.assert_array_equal(loaded.labels, images.labels)
    assert len(load_images(idx_data, "test", 8, 1)) == 20


def test_gzipped_idx_files(idx_data: Path, images: Images) -> None:
    for path in list(idx_data.glob("train-*")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(load_images(idx_data, "train", 8, 1).pixels, images.pixels)


def test_a_damaged_gzip_file_is_named(idx_data: Path) -> None:
    path = idx_data / "train-images-idx3-ubyte"
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[20:40] = b"\xff" * 20
    path.with_name(path.name + ".gz").write_bytes(packed)
    path.unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        load_images(idx_data, "train", 8, 1)


def test_wrong_size_says_both_sizes(idx_data: Path) -> None:
    with pytest.raises(DataError, match=r"8x8 .* expects 28x28"):
        load_images(idx_data, "train", 28, 1)


@pytest.mark.parametrize("content", [b"", b"not an idx file", bytes((0, 0, 8, 3)) + b"\0\0\0\x09" * 3 + b"short"])
def test_a_damaged_idx_file_is_named(idx_data: Path, content: bytes) -> None:
    (idx_data / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        load_images(idx_data, "train", 8, 1)


def test_missing_labels_and_unequal_counts(idx_data: Path, write_idx: Callable[..., Path], images: Images) -> None:
    labels = (idx_data / "train-labels-idx1-ubyte").read_bytes()
    write_idx(idx_data, images.part(0, 10))
    (idx_data / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match="10 images but 44 labels"):
        load_images(idx_data, "train", 8, 1)
    (idx_data / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="incomplete"):
        load_images(idx_data, "train", 8, 1)


def test_idx_files_without_images(idx_data: Path, write_idx: Callable[..., Path], images: Images) -> None:
    write_idx(idx_data, images.part(0, 0))
    with pytest.raises(DataError, match="no images"):
        load_images(idx_data, "train", 8, 1)


def test_class_folders_are_scaled_named_and_shuffled(folder_data: Path) -> None:
    (folder_data / ".hidden").mkdir()
    loaded = load_images(folder_data, "train", 16, 3)
    assert loaded.pixels.shape == (12, 3, 16, 16)
    assert loaded.class_names == ("cat", "dog")
    # Labels stay with their images, and a part from the end has both classes.
    assert all((image.mean() > 125) == bool(label) for image, label in zip(loaded.pixels, loaded.labels, strict=True))
    assert set(loaded.labels[-6:]) == {0, 1}
    np.testing.assert_array_equal(loaded.pixels, load_images(folder_data, "train", 16, 3).pixels)


def test_split_folders_and_a_single_folder(folder_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no test split"):
        load_images(folder_data, "test", 8, 3)
    root = tmp_path / "split"
    root.mkdir()
    folder_data.rename(root / "train")
    (root / "train" / "cat").rename(root / "test")
    assert load_images(root, "train", 8, 3).class_names == ("dog",)
    assert load_images(root, "test", 8, 3).class_names == ("test",)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_without_a_test_folder_that_of_validation_is_it(folder_data: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder_data, tmp_path / "split" / "train")
    shutil.copytree(folder_data / "dog", tmp_path / "split" / name / "dog")
    # Beside class folders as well, of which it is none.
    shutil.copytree(folder_data / "dog", folder_data / name / "dog")
    for root in (tmp_path / "split", folder_data):
        assert load_images(root, "train", 8, 3).class_names == ("cat", "dog")
        found = load_images(root, "test", 8, 3)
        assert (found.class_names, len(found)) == (("dog",), 6)
    (tmp_path / "split" / "test" / "cat").mkdir(parents=True)
    shutil.copy(folder_data / "cat" / "0.png", tmp_path / "split" / "test" / "cat")
    assert load_images(tmp_path / "split", "test", 8, 3).class_names == ("cat",)


def test_images_of_the_test_split_are_no_training_images(folder_data: Path, tmp_path: Path) -> None:
    """Where there are no class folders either."""
    root = tmp_path / "flat"
    shutil.copytree(folder_data / "dog", root)
    shutil.copytree(folder_data, root / "val")
    assert len(load_images(root, "train", 8, 3)) == 6
    assert load_images(root, "test", 8, 3).class_names == ("cat", "dog")
    for path in root.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="flat: no images in it"):
        load_images(root, "train", 8, 3)


def test_an_empty_folder_and_a_missing_one(folder_data: Path, tmp_path: Path) -> None:
    (folder_data / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        load_images(folder_data, "train", 8, 3)
    with pytest.raises(DataError, match="nowhere: no such directory"):
        load_images(tmp_path / "nowhere", "train", 8, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(folder_data: Path, content: bytes | None) -> None:
    path = folder_data / "dog" / "broken.png"
    if content is None:
        Image.new("RGB", (20, 20)).save(path)
        content = path.read_bytes()[:50]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png"):
        load_images(folder_data, "train", 8, 3)


@given(count=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10_000))
def test_an_epoch_has_every_image_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(count, seed, epoch)) == list(range(count))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    np.testing.assert_array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
