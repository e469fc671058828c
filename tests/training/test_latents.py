"""A run of latents: the autoencoder's images are encoded once, and what comes of it says that it knows no pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model.bundle import CODEC, read_bundle
from model.codecs.autoencoder_kl import AutoencoderKL
from model.codecs.base import Latents
from model.codecs.config import CodecConfig
from model.codecs.weights import DIFFUSERS_WEIGHTS, load_codec, read_autoencoder
from model.flow import Flow
from tests.full_disk import full_disk
from training import checkpoint
from training.cli import app
from training.config import load_preset
from training.data import DataError, load_images
from training.latents import CACHE, encode, load_bundle_images, open_codec
from training.provenance import training_split

AUTOENCODER = Path(__file__).parents[1] / "reference" / "autoencoder-kl" / "grey"
PRESET: dict[str, Any] = {
    "name": "tiny-latents",
    "flow": {
        "image_size": 8,
        "channels": 2,
        "patch_size": 2,
        "width": 16,
        "num_blocks": 2,
        "layers_per_block": [1, 2],
        "head_dim": 8,
        "num_classes": 2,
        "conditioned_blocks": [1],
        "scale_function": "softplus",
        "soft_clip": 4.0,
    },
    "noise": {"kind": "gaussian", "std": 0.3, "space": "latents"},
    "optimization": {"batch_size": 4, "epochs": 2, "ema_decay": 0.9, "precision": "float32"},
    "sampling": {"guidance_scale": 1.0, "guidance_rule": "closed_form", "denoise": True},
}


def invoke(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """12 images of two classes, 16x16 grey."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("dark", "light"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 128, (16, 16), dtype=np.uint8) + (128 if name == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-latents.yaml"
    path.write_text(yaml.safe_dump(PRESET))
    return path


def test_a_run_of_latents_is_trained_continued_and_evaluated(
    preset: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train = ("train", preset, "--data", data, "--codec", AUTOENCODER, "--out", out, "--device", "cpu")
    invoke(*train)
    bundle = read_bundle(out / "bundle")
    assert CODEC in bundle.files
    assert (bundle.config.image_size, bundle.config.image_channels, bundle.config.flow.image_size) == (16, 1, 8)
    assert "of the latents of 16x16 grey images, 8x8 with 2 channels" in bundle.card
    assert "they are no likelihoods of pixels" in bundle.card
    assert "--codec grey" in bundle.card
    with Image.open(out / "bundle" / "samples.png") as picture:
        assert picture.size == (2 * 16 + 1, 2 * 16 + 1)
    # The codec in the bundle is the one that was given.
    pixels = torch.from_numpy(load_images(data, "train", 16, 1).pixels)
    assert torch.equal(load_codec(bundle).modelled(pixels), Latents(read_autoencoder(AUTOENCODER)).modelled(pixels))
    # Encoded once: a run that is continued takes what it finds.
    written = (out / CACHE).stat().st_mtime_ns
    assert "continuing at step 6 of 9" in invoke(*train, "--epochs", 3)
    assert (out / CACHE).stat().st_mtime_ns == written
    document = json.loads(invoke("evaluate", out / "bundle", "--data", data, "--json", "--device", "cpu"))
    [evaluation] = document["evaluations"]
    assert "no likelihood of pixels" in json.dumps(evaluation)
    assert evaluation["num_images"] == 4
    # Samples are looked at as images: latents have no range, and about a quarter of normal values is beyond a pixel's.
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, latents: torch.zeros(len(latents), 1, 16, 16))
    asked = ("evaluate", out / "bundle", "--data", data, "--json", "--device", "cpu", "--samples", 6)
    assert json.loads(invoke(*asked))["evaluations"][0]["samples"]["outside"] == 0


def test_likelihoods_of_other_latents_are_not_compared(preset: Path, data: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(AUTOENCODER, tmp_path / "codec") / DIFFUSERS_WEIGHTS
    save_file({name: 1.5 * value for name, value in load_file(weights).items()}, weights)
    bundles = []
    for codec, name in ((AUTOENCODER, "one"), (tmp_path / "codec", "two")):
        out = tmp_path / name
        invoke("train", preset, "--data", data, "--codec", codec, "--out", out, "--device", "cpu", "--epochs", 1)
        bundles.append(out / "bundle")
    compared = invoke("evaluate", *bundles, "--data", data, "--device", "cpu")
    assert "score latents of different codecs: not comparable" in compared
    assert "not comparable" not in invoke("evaluate", bundles[0], bundles[0], "--data", data, "--device", "cpu")


def test_a_cache_of_other_images_is_made_anew(preset: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ("train", preset, "--data", data, "--codec", AUTOENCODER, "--device", "cpu")
    invoke(*train, "--out", out, "--epochs", 1)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / CACHE, other / CACHE)
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(data / "train" / "dark" / "0.png")
    before = (other / CACHE).read_bytes()
    invoke(*train, "--out", other, "--epochs", 1)
    assert (other / CACHE).read_bytes() != before


def test_the_training_images_are_known_again_where_latents_have_other_last_digits(
    preset: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train", preset, "--data", data, "--codec", AUTOENCODER, "--device", "cpu", "--epochs", 1)
    invoke(*train, "--out", tmp_path / "run")
    bundle = read_bundle(tmp_path / "run" / "bundle")
    images = load_bundle_images(bundle, data, "train", torch.device("cpu"))
    encode_here = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, image: encode_here(self, image) * (1 + 1e-6))
    elsewhere = load_bundle_images(bundle, data, "train", torch.device("cpu"))
    assert not np.array_equal(elsewhere.pixels, images.pixels)
    assert len(training_split(bundle, elsewhere).trained_on) == 12
    # Other images are still told apart, and so is another codec.
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(data / "train" / "dark" / "0.png")
    with pytest.raises(DataError, match="have another hash"):
        training_split(bundle, load_bundle_images(bundle, data, "train", torch.device("cpu")))
    invoke(*train, "--out", tmp_path / "new")
    weights = shutil.copytree(AUTOENCODER, tmp_path / "codec") / DIFFUSERS_WEIGHTS
    save_file({name: 1.5 * value for name, value in load_file(weights).items()}, weights)
    other = ("train", preset, "--data", data, "--codec", tmp_path / "codec", "--device", "cpu", "--epochs", 2)
    assert "holds a run on other training images" in invoke(*other, "--out", tmp_path / "new", status=2)


def test_a_disk_without_room_is_told_before_the_first_image_or_step(
    preset: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, usage = tmp_path / "run", shutil.disk_usage(tmp_path)
    train = ("train", preset, "--data", data, "--codec", AUTOENCODER, "--out", out, "--device", "cpu", "--epochs", 1)
    # Twelve images of 2x8x8 values.
    size = 12 * 2 * 8 * 8 * 4
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, image: pytest.fail("an image was encoded"))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    assert "MiB for the latents" in invoke(*train, status=2)
    monkeypatch.undo()
    # A disk that is full later: one line, and nothing that keeps it full.
    with full_disk(size // 2):
        assert f"{CACHE}: cannot be written" in invoke(*train, status=2)
    assert not out.exists()
    # The bundle has the codec's weights too, and is written beside the last one.
    config, network = load_preset(str(preset)), read_autoencoder(AUTOENCODER)
    weights, codec = (
        sum(value.numel() * value.element_size() for value in module.state_dict().values())
        for module in (Flow(config.flow), network)
    )
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10 * weights + 2 * codec - 1))
    assert "MiB for checkpoints and the bundle" in invoke(*train, status=2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10 * weights + 2 * codec))
    assert "finished 3 steps" in invoke(*train)


def test_only_the_images_that_are_scored_are_encoded(
    preset: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    invoke("train", preset, "--data", data, "--codec", AUTOENCODER, "--out", out, "--device", "cpu", "--epochs", 1)
    encode_here, counts = AutoencoderKL.encode, list[int]()

    def counting(self: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
        counts.append(len(image))
        return encode_here(self, image)

    monkeypatch.setattr(AutoencoderKL, "encode", counting)
    evaluate = ("evaluate", out / "bundle", "--data", data, "--json", "--device", "cpu", "--limit", 2)
    [evaluation] = json.loads(invoke(*evaluate, "--train-limit", 3))["evaluations"]
    assert counts == [2, 3]
    assert evaluation["train_test_gap"] is not None
    counts.clear()
    invoke("tune", out / "bundle", "--data", data, "--num-images", 4, "--device", "cpu", "--dry-run")
    assert counts == [4]


def test_latents_of_a_batch_are_those_of_each_image(data: Path) -> None:
    images, codec = load_images(data, "train", 16, 1), Latents(read_autoencoder(AUTOENCODER))
    encoded = encode(images, codec)
    assert encoded.pixels.dtype == np.float32
    assert encoded.pixels.shape == (12, 2, 8, 8)
    alone = encode(images.part(5, 6), codec)
    np.testing.assert_allclose(alone.pixels[0], encoded.pixels[5], atol=1e-5)


def test_what_does_not_go_together_is_named(preset: Path, data: Path, tmp_path: Path) -> None:
    train = ("train", preset, "--data", data, "--out", tmp_path / "run")
    assert "--codec" in invoke(*train, status=2)
    assert "tensors" not in invoke(*train, "--codec", tmp_path, status=2)
    latents = {**PRESET, "data": {"flip": True}}
    preset.write_text(yaml.safe_dump(latents))
    assert "data.flip" in invoke(*train, "--codec", AUTOENCODER, status=2)
    preset.write_text(yaml.safe_dump({**PRESET, "flow": {**PRESET["flow"], "channels": 4}}))
    assert "channels: got 4, allowed is 2" in invoke(*train, "--codec", AUTOENCODER, status=2)
    pixels = {**PRESET, "noise": {"kind": "gaussian", "std": 0.1}}
    preset.write_text(yaml.safe_dump(pixels))
    assert "noise.space: got 'pixels'" in invoke(*train, "--codec", AUTOENCODER, status=2)
    assert "channels: got 2, allowed is 1 or 3" in invoke(*train, status=2)
    assert not (tmp_path / "run").exists()


def test_the_preset_fits_the_published_autoencoders(tmp_path: Path) -> None:
    """Side and channels of Stable Diffusion's first autoencoder, with narrow layers."""
    published = {"latent_channels": 4, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 2}
    config = load_preset("latents-256")
    directory = tmp_path / "vae"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **published}))
    network = AutoencoderKL(CodecConfig.from_diffusers(published))
    save_file(network.state_dict(), directory / "diffusion_pytorch_model.safetensors")
    autoencoder = open_codec(config, directory)
    assert autoencoder is not None
    assert config.flow.image_size * autoencoder.config.factor == 256
