"""Hugging Face data sets: what ``datasets`` has saved is read as the same images in folders are."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import run_command
from training.data import DataError, data_name, load_images

CLASSES = ["cat", "dog"]


def png(number: int) -> bytes:
    """A photograph of its own size and grey."""
    out = io.BytesIO()
    Image.new("RGB", (9 + number, 12), (number * 10,) * 3).save(out, "PNG")
    return out.getvalue()


def data_set(images: list[bytes | None], labels: list[int | None]) -> datasets.Dataset:
    """A split with a column before the images, and one of classes."""
    columns = {
        "id": datasets.Value("int64"),
        "picture": datasets.Image(),
        "label": datasets.ClassLabel(names=CLASSES),
    }
    content = {
        "id": list(range(len(images))),
        "picture": [i and {"bytes": i, "path": None} for i in images],
        "label": labels,
    }
    return datasets.Dataset.from_dict(content, features=datasets.Features(columns))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two splits as ``save_to_disk`` writes them: twelve images to train on, and four in 'validation'."""
    splits = {"train": data_set([png(i) for i in range(12)], [0] * 6 + [1] * 6)}
    splits["validation"] = data_set([png(20 + i) for i in range(4)], [0, 1, 0, 1])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_it_is_read_as_folders_are(saved: Path, tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "folders" / CLASSES[number // 6] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    folders = load_images(tmp_path / "folders", "train", 8, 3)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        images = load_images(saved, "train", 8, 3, cache)
        np.testing.assert_array_equal(images.pixels, folders.pixels)
        np.testing.assert_array_equal(images.labels, folders.labels)
        assert images.class_names == ("cat", "dog")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert len(load_images(saved, "test", 8, 3)) == 4


def test_one_split_alone_is_trained_on(tmp_path: Path) -> None:
    plain = data_set([png(i) for i in range(3)], [0, 1, 0]).remove_columns("label")
    plain.save_to_disk(tmp_path / "plain")
    images = load_images(tmp_path / "plain", "train", 8, 1)
    assert images.pixels.shape == (3, 1, 8, 8)
    assert images.class_names == ()
    with pytest.raises(DataError, match=r"no test split \(it has train\)"):
        load_images(tmp_path / "plain", "test", 8, 1)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    data_set([png(0), b"no image"], [0, 1]).save_to_disk(tmp_path / "broken")
    with pytest.raises(DataError, match="broken, row 1: "):
        load_images(tmp_path / "broken", "train", 8, 3)
    data_set([png(0), None], [0, 1]).save_to_disk(tmp_path / "missing")
    with pytest.raises(DataError, match="missing: row 1 has no image"):
        load_images(tmp_path / "missing", "train", 8, 3)
    data_set([png(0), png(1)], [0, None]).save_to_disk(tmp_path / "hidden")
    with pytest.raises(DataError, match="row 1 of the train split has no class"):
        load_images(tmp_path / "hidden", "train", 8, 3)
    data_set([png(0)], [0]).remove_columns("picture").save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="has no column of images, but id, label"):
        load_images(tmp_path / "text", "train", 8, 3)
    data_set([], []).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="empty: cannot be opened as a data set"):
        load_images(tmp_path / "empty", "train", 8, 3)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="damaged: cannot be opened as a data set"):
        load_images(tmp_path / "damaged", "train", 8, 3)


def test_a_run_trains_on_it(saved: Path, preset_file: Path, tmp_path: Path) -> None:
    sizes = ("--batch-size", 4, "--epochs", 1)
    text = run_command("train", preset_file, "--data", saved, "--out", tmp_path / "run", "--device", "cpu", *sizes)
    assert "8 images, 2 steps an epoch" in text


def test_without_the_library_it_says_what_to_install(saved: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from pathlib import Path\nfrom training.data import load_images\n"
        f"load_images(Path({str(saved)!r}), 'train', 8, 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "pip install 'tarflow[huggingface]'" in done.stderr


def test_a_data_set_on_the_hub_keeps_its_whole_name(tmp_path: Path) -> None:
    """In cards and in the command that repeats a run; a directory is called by its last name only."""
    assert data_name(Path("hf:owner/clothes")) == "hf:owner/clothes"
    assert data_name(tmp_path / "clothes" / ".") == "clothes"
