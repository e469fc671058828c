"""Sets of images from folders: names that differ, masks that fit their pictures, and the layout of MVTec AD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training.data import DataError, Images
from training.image_sets import load_mvtec, load_set, unique_names

SIZE = 8
Grey = NDArray[np.uint8]


def write(path: Path, pixels: Grey) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def flat(level: int, width: int = SIZE, height: int = SIZE) -> Grey:
    return np.full((height, width), level, np.uint8)


def test_names_are_those_of_folders_made_unique() -> None:
    assert unique_names([Path("/a/noise"), Path("/b/blur")]) == ["noise", "blur"]
    assert unique_names([Path("/a/bad"), Path("/b/bad"), Path("/b/blur")]) == ["a/bad", "b/bad", "blur"]
    assert unique_names([Path("/a/bad"), Path("/a/bad")]) == ["bad", "bad (2)"]


def test_a_folder_is_read_in_order_with_its_subfolders(tmp_path: Path) -> None:
    for level, name in enumerate(("a.png", "b/c.png", "b/d.png", "z.png")):
        write(tmp_path / "set" / name, flat(level))
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    found = load_set(tmp_path / "set", SIZE, 1)
    assert found.name == "set"
    assert found.masks is None
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    some = load_set(tmp_path / "set", SIZE, 1, limit=2)
    assert len(some) == 2
    np.testing.assert_array_equal(some.pixels, load_set(tmp_path / "set", SIZE, 1, limit=2).pixels)


def test_a_test_split_is_preferred(
    tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]
) -> None:
    write(tmp_path / "both" / "train" / "x" / "0.png", flat(1))
    write(tmp_path / "both" / "test" / "x" / "0.png", flat(2))
    assert load_set(tmp_path / "both", SIZE, 1).pixels.max() == 2
    (tmp_path / "both" / "test").rename(tmp_path / "both" / "val")
    assert load_set(tmp_path / "both", SIZE, 1).pixels.max() == 2
    directory = write_idx(tmp_path / "idx", make_images(20))
    assert len(load_set(directory, SIZE, 1)) == 20
    write_idx(directory, make_images(12), "t10k")
    assert len(load_set(directory, SIZE, 1)) == 12
    assert len(load_set(directory, SIZE, 1, limit=5)) == 5


@pytest.mark.parametrize("suffix", ["_mask", ""])
def test_masks_are_scaled_and_cropped_like_their_pictures(tmp_path: Path, suffix: str) -> None:
    picture = flat(50, 24, 16)
    picture[4:10, 8:16] = 200
    mask = np.where(picture > 100, 255, 0).astype(np.uint8)
    write(tmp_path / "dents" / "one.png", picture)
    write(tmp_path / "masks" / f"one{suffix}.png", mask)
    found = load_set(tmp_path / "dents", SIZE, 1, masks=tmp_path / "masks")
    assert found.masks is not None
    expected = np.zeros((SIZE, SIZE), np.bool_)
    # 24x16 is halved, and 2 pixels of either side are cut off.
    expected[2:5, 2:6] = True
    np.testing.assert_array_equal(found.masks[0], expected)
    assert found.pixels[0, 0][expected].min() > 100


def test_a_tiny_defect_keeps_the_pixel_it_covers_most(tmp_path: Path) -> None:
    mask = flat(0, 80, 80)
    mask[33:36, 18:21] = 255
    write(tmp_path / "dots" / "one.png", flat(9, 80, 80))
    write(tmp_path / "dots" / "two.png", flat(9, 80, 80))
    write(tmp_path / "masks" / "one_mask.png", mask)
    write(tmp_path / "masks" / "two_mask.png", flat(0, 80, 80))
    found = load_set(tmp_path / "dots", SIZE, 1, masks=tmp_path / "masks").masks
    assert found is not None
    assert np.argwhere(found).tolist() == [[0, 3, 1]]


def test_a_set_has_masks_for_all_or_none(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / "dents" / f"{name}.png", flat(9))
    (tmp_path / "masks" / "dents").mkdir(parents=True)
    assert load_set(tmp_path / "dents", SIZE, 1, masks=tmp_path / "masks").masks is None
    write(tmp_path / "masks" / "dents" / "two_mask.png", flat(255))
    with pytest.raises(DataError, match=r"one\.png: has no mask; looked for one_mask\.png and one\.png in .*dents"):
        load_set(tmp_path / "dents", SIZE, 1, masks=tmp_path / "masks")
    write(tmp_path / "masks" / "dents" / "one_mask.png", flat(255, 9, 8))
    with pytest.raises(DataError, match=r"one_mask\.png: is 9x8, but its picture one\.png is 8x8"):
        load_set(tmp_path / "dents", SIZE, 1, masks=tmp_path / "masks")


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in it"):
        load_set(tmp_path / "empty", SIZE, 1)
    with pytest.raises(DataError, match="nowhere: no such directory"):
        load_set(tmp_path / "nowhere", SIZE, 1)
    (tmp_path / "empty" / "a.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a\.png: the file is not a readable image"):
        load_set(tmp_path / "empty", SIZE, 1)
    write(tmp_path / "fine" / "a.png", flat(0))
    with pytest.raises(DataError, match="nowhere: no such directory"):
        load_set(tmp_path / "fine", SIZE, 1, masks=tmp_path / "nowhere")


def test_the_layout_of_mvtec(tmp_path: Path) -> None:
    root = tmp_path / "bottle"
    for number in range(3):
        write(root / "test" / "good" / f"{number:03}.png", flat(10))
        write(root / "test" / "broken" / f"{number:03}.png", flat(20))
        mask = flat(0)
        mask[number] = 255
        write(root / "ground_truth" / "broken" / f"{number:03}_mask.png", mask)
    write(root / "test" / "swapped" / "000.png", flat(30))
    good, sets = load_mvtec(root, SIZE, 1, limit=2)
    assert good is not None
    assert len(good) == 2
    assert [(of.name, len(of)) for of in sets] == [("broken", 2), ("swapped", 1)]
    assert sets[0].masks is not None
    assert sets[0].masks.sum() == 2 * SIZE
    assert sets[1].masks is None
    with pytest.raises(DataError, match=r"layout of MVTec AD, .* use --mvtec"):
        load_set(root, SIZE, 1)
    with pytest.raises(DataError, match="no test/DEFECT folders"):
        load_mvtec(root / "test", SIZE, 1)
    write(tmp_path / "fine" / "test" / "good" / "0.png", flat(10))
    with pytest.raises(DataError, match="no folder of anomalous images"):
        load_mvtec(tmp_path / "fine", SIZE, 1)
    write(tmp_path / "odd" / "test" / "bad" / "0.png", flat(10))
    assert load_mvtec(tmp_path / "odd", SIZE, 1)[0] is None
