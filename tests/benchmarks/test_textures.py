"""The small data set in the layout of MVTec AD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.textures import BAND, SIZE, TEXTURES, cut_out, make, stained, texture


def images(directory: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(directory.glob("*.png"))])


@pytest.mark.parametrize("name", TEXTURES)
def test_the_layout_is_that_of_mvtec(tmp_path: Path, name: str) -> None:
    make(tmp_path, name, train=7, test=5)
    found = {str(d.relative_to(tmp_path)): len(list(d.glob("*.png"))) for d in tmp_path.glob("*/*")}
    assert found == {
        "train/good": 7,
        "test/good": 5,
        "test/scratch": 5,
        "test/stain": 5,
        "ground_truth/scratch": 5,
        "ground_truth/stain": 5,
    }
    assert images(tmp_path / "train" / "good").shape == (7, SIZE, SIZE)
    for defect in ("scratch", "stain"):
        names = {path.name for path in (tmp_path / "ground_truth" / defect).iterdir()}
        assert names == {f"{i:03d}_mask.png" for i in range(5)}
        masks = images(tmp_path / "ground_truth" / defect)
        assert set(np.unique(masks)) == {0, 255}
        assert (masks.reshape(5, -1).any(axis=1)).all()


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    for where, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / where, "brick", train=3, test=2, seed=seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png"))
    same = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files]
    other = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "c" / f).read_bytes() for f in files]
    assert all(same)
    assert not any(other)


def test_no_pixel_is_trained_and_tested_on(tmp_path: Path) -> None:
    """Test squares are found in the middle band of the photograph, mirrored or not, and training squares are not."""
    make(tmp_path, "brick", train=20, test=10)
    photograph = texture("brick")
    top, bottom = (round(share * len(photograph)) for share in BAND)

    def rows(square: np.ndarray) -> list[int]:
        either = (square, square[:, ::-1])
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (SIZE, SIZE))
        first = [np.argwhere((windows[:, :, 0, 0] == s[0, 0]) & (windows[:, :, -1, -1] == s[-1, -1])) for s in either]
        return [r for s, places in zip(either, first, strict=True) for r, c in places if (windows[r, c] == s).all()]

    for square in images(tmp_path / "test" / "good"):
        assert any(top <= row <= bottom - SIZE for row in rows(square))
    for square in images(tmp_path / "train" / "good"):
        assert all(row + SIZE <= top or row >= bottom for row in rows(square))
        assert rows(square)


def test_stains_are_darker_where_the_mask_says_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    normal = cut_out([texture("gravel")], 6, rng)
    changed, masks = stained(normal, rng)
    darker = normal[:, 0].astype(int) - changed[:, 0]
    assert (darker[masks] > 5).mean() > 0.99
    assert (np.abs(darker[~masks]) <= 11).all()


def test_without_scikit_image_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.textures.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        texture("brick")
