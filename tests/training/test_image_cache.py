"""Decoded images on disk: the same pixels, decoded once, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training import data, image_cache
from training.data import DataError, load_images


def undecodable(content: bytes) -> None:
    """Instead of the decoder: nothing is to be decoded."""
    raise AssertionError("an image was decoded")


def test_the_same_images_are_decoded_once(folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, told = tmp_path / "cache", list[str]()
    plain = load_images(folder_data, "train", 8, 3)
    first = load_images(folder_data, "train", 8, 3, cache, told.append)
    monkeypatch.setattr(data, "load_image", undecodable)
    second = load_images(folder_data, "train", 8, 3, cache, told.append)
    for cached in (first, second):
        np.testing.assert_array_equal(cached.pixels, plain.pixels)
        np.testing.assert_array_equal(cached.labels, plain.labels)
        assert cached.class_names == plain.class_names
        assert not cached.pixels.flags.writeable
        assert type(cached.pixels[[0, 3]]) is np.ndarray
    assert len(list(cache.iterdir())) == 1
    assert "12 images decoded to" in told[0]
    assert "12 decoded images from" in told[1]
    assert all(text.endswith("MiB)") for text in told)


def test_other_files_and_other_sizes_are_other_entries(folder_data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_images(folder_data, "train", 8, 3, cache)
    load_images(folder_data, "train", 8, 1, cache)
    load_images(folder_data, "train", 4, 3, cache)
    changed = folder_data / "cat" / "0.png"
    Image.new("RGB", (12, 12), (255, 0, 0)).save(changed)
    os.utime(changed, ns=(1, 1))
    again = load_images(folder_data, "train", 8, 3, cache)
    np.testing.assert_array_equal(again.pixels, load_images(folder_data, "train", 8, 3).pixels)
    assert len(list(cache.iterdir())) == 4


def test_other_content_of_the_same_name_size_and_time_is_another_entry(folder_data: Path, tmp_path: Path) -> None:
    # As unpacked from two archives whose files all have the same time, where nothing is compressed.
    for brightness in (10, 200):
        for folder in ("cat", "dog"):
            path = folder_data / folder / "0.bmp"
            Image.new("RGB", (8, 8), (brightness,) * 3).save(path)
            os.utime(path, ns=(1, 1))
        images = load_images(folder_data, "train", 8, 3, tmp_path / "cache")
        np.testing.assert_array_equal(images.pixels, load_images(folder_data, "train", 8, 3).pixels)


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, decode = tmp_path / "cache", data._decode
    cache.mkdir()
    (cache / "abandoned.part").write_bytes(b"half of it")

    def another_meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(data, "_decode", decode)
        assert len(list(cache.glob("*.part"))) == 1
        load_images(folder_data, "train", 8, 3, cache)
        assert len(list(cache.glob("*.part"))) == 1
        decode(*arguments)

    monkeypatch.setattr(data, "_decode", another_meanwhile)
    images = load_images(folder_data, "train", 8, 3, cache)
    np.testing.assert_array_equal(images.pixels, load_images(folder_data, "train", 8, 3).pixels)
    assert len(list(cache.iterdir())) == 1


def test_an_unreadable_image_leaves_nothing(folder_data: Path, tmp_path: Path) -> None:
    (folder_data / "dog" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png"):
        load_images(folder_data, "train", 8, 3, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room(folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"cache: .* has 0\.0 MiB free, allowed is at least 0\.0 MiB"):
        load_images(folder_data, "train", 8, 3, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_a_damaged_entry_is_named(folder_data: Path, tmp_path: Path, content: bytes | None) -> None:
    load_images(folder_data, "train", 8, 3, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:200] if content is None else content)
    with pytest.raises(DataError, match=r"\.npy: damaged; remove it"):
        load_images(folder_data, "train", 8, 3, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(folder_data: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache: .* cannot be written"):
        load_images(folder_data, "train", 8, 3, tmp_path / "cache")
