"""Sample grids: laid out by class, the same for the same weights, and interruptible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.flow import Flow
from training.config import TrainConfig
from training.samples import Interrupted, sample_grid, write_sample_grid


@pytest.fixture
def flow(config: TrainConfig) -> Flow:
    torch.manual_seed(0)
    return Flow(config.flow).eval()


def test_a_column_for_each_class(config: TrainConfig, flow: Flow, tmp_path: Path) -> None:
    path = tmp_path / "samples" / "step_000001.png"
    write_sample_grid(path, flow, config.noise, config.sampling, lambda: False)
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((2 * 9 - 1, 2 * 9 - 1), "L")


def test_without_classes(config: TrainConfig) -> None:
    flow = Flow(replace(config.flow, num_classes=0)).eval()
    assert sample_grid(flow, config.noise, config.sampling, lambda: False).shape == (1, 17, 71)


def test_the_same_weights_draw_the_same_grid(config: TrainConfig, flow: Flow) -> None:
    grids = [sample_grid(flow, config.noise, config.sampling, lambda: False) for _ in range(2)]
    np.testing.assert_array_equal(*grids)


@pytest.mark.parametrize("calls", [0, 3, 9])
def test_it_stops_between_slices(config: TrainConfig, flow: Flow, tmp_path: Path, calls: int) -> None:
    answers = iter([False] * calls + [True])
    with pytest.raises(Interrupted):
        write_sample_grid(tmp_path / "x.png", flow, config.noise, config.sampling, lambda: next(answers))
    assert list(tmp_path.iterdir()) == []
