"""Tiny models and data sets: 8x8 grey images of two classes, a flow of some thousand weights."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from model.bundle import Bundle, BundleConfig
from model.config import SamplingDefaults
from model.flow import Flow
from model.weights import write_bundle
from training.checkpoint import data_fingerprint
from training.cli import app
from training.config import TrainConfig
from training.data import Images
from training.features import EXTRACTORS, Extractor

Preset = dict[str, object]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit-equality needs one thread: the order of a sum depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def preset() -> Preset:
    """A preset as its file holds it."""
    return {
        "name": "tiny",
        "flow": {
            "image_size": 8,
            "channels": 1,
            "patch_size": 4,
            "width": 16,
            "num_blocks": 2,
            "layers_per_block": 1,
            "head_dim": 8,
            "num_classes": 2,
        },
        "noise": {"kind": "gaussian", "std": 0.1},
        "optimization": {
            "batch_size": 8,
            "epochs": 3,
            "learning_rate": 1.0e-2,
            "warmup_epochs": 0.5,
            "ema_decay": 0.9,
            "precision": "float32",
        },
        "data": {"holdout": 4},
        "sampling": {"guidance_scale": 1.0, "denoise": True},
    }


@pytest.fixture
def preset_file(preset: Preset, tmp_path: Path) -> Path:
    """The same preset in a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(preset))
    return path


@pytest.fixture
def config(preset: Preset) -> TrainConfig:
    """The same preset, read."""
    return TrainConfig.from_dict(preset)


def _make_images(count: int = 44, seed: int = 0) -> Images:
    """Two classes that a model can tell apart: bright squares to the left or to the right."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 40, (count, 1, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        left = 4 * label
        image[0, 2:6, left : left + 4] += random.integers(150, 200, dtype=np.uint8)
    return Images(pixels, labels.astype(np.int64))


@pytest.fixture
def images() -> Images:
    """44 training images: 40 and a holdout of 4, five batches of 8 an epoch."""
    return _make_images()


@pytest.fixture
def make_images() -> Callable[..., Images]:
    """Other images of the same kind: ``make_images(count, seed)``."""
    return _make_images


@pytest.fixture
def write_idx() -> Callable[..., Path]:
    """Write images as the IDX files of a split."""

    def write(directory: Path, images: Images, prefix: str = "train") -> Path:
        directory.mkdir(exist_ok=True)
        pixels, labels = images.pixels[:, 0], images.labels.astype(np.uint8)
        header = bytes((0, 0, 8, 3)) + struct.pack(">3I", *pixels.shape)
        (directory / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = bytes((0, 0, 8, 1)) + struct.pack(">I", len(labels))
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        return directory

    return write


@pytest.fixture
def idx_data(tmp_path: Path, write_idx: Callable[..., Path]) -> Path:
    """A data directory with both splits."""
    write_idx(tmp_path / "squares", _make_images())
    return write_idx(tmp_path / "squares", _make_images(20, seed=1), "t10k")


@pytest.fixture
def folder_data(tmp_path: Path) -> Path:
    """Class folders of colour photographs of different sizes."""
    root, random = tmp_path / "pets", np.random.default_rng(0)
    for name, brightness in (("cat", 60), ("dog", 190)):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(6):
            size = (random.integers(9, 20), random.integers(9, 20), 3)
            pixels = random.integers(brightness - 50, brightness + 50, size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def make_bundle(config: TrainConfig, tmp_path: Path) -> Callable[..., Bundle]:
    """Write a bundle with random weights: ``make_bundle(trained_on, seed)``, as if it was trained on these images."""

    def make(trained_on: Images | None = None, seed: int = 0) -> Bundle:
        torch.manual_seed(seed)
        flow = Flow(config.flow)
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        data = {"num_images": len(trained_on), "sha256": data_fingerprint(trained_on)} if trained_on else {}
        described = BundleConfig(
            name="squares",
            flow=config.flow,
            noise=config.noise,
            class_names=("0", "1"),
            training={"data": data} if data else {},
        )
        return write_bundle(tmp_path / f"bundle-{seed}", described, flow, SamplingDefaults(), "# squares\n")

    return make


def run_command(command: str, *arguments: object, status: int = 0) -> str:
    """Run a ``tarflow`` command of training in this process; returns its output, or its one line of error."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    if status:
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
    return result.stderr if status else result.stdout


@pytest.fixture
def pixel_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real extractor has tests of its own; here the features are 8x8 grey pixels."""

    def extract(pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(dim=1), 8).flatten(1) / 64

    means = Extractor(name="pixels", num_features=64, extract=extract)
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: means)
