"""The benchmark of training: both loops compute the same, and one document holds what is promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import training
from benchmarks.published.training import PublishedTraining
from model.config import FlowConfig
from model.flow import Flow, patchify
from tests.benchmarks.programs import document, run
from training.config import TrainConfig

CONTENT = {
    "name": "tiny",
    "flow": {
        "image_size": 8,
        "channels": 1,
        "patch_size": 2,
        "width": 16,
        "num_blocks": 2,
        "layers_per_block": 1,
        "head_dim": 8,
        "num_classes": 2,
    },
    "noise": {"kind": "gaussian", "std": 0.1},
    "optimization": {"precision": "float32"},
}


def test_the_published_loop_computes_what_ours_does() -> None:
    config = TrainConfig.from_dict(CONTENT)
    step = PublishedTraining(config, torch.device("cpu"), bf16=False)
    flow = Flow(FlowConfig.from_dict(CONTENT["flow"]))  # type: ignore[arg-type]
    for parameter in step.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flow.load_state_dict(step.flow.state_dict())
    x_BTD, y_B = patchify(torch.randn(3, 1, 8, 8), 2), torch.tensor([0, 1, -1])
    for ours, theirs in zip(flow(x_BTD, y_B), step.flow(x_BTD, y_B), strict=True):
        torch.testing.assert_close(ours, theirs)
    pixels = torch.from_numpy(np.full((4, 1, 8, 8), 100, np.uint8))
    losses = [step(pixels, torch.zeros(4, dtype=torch.int64)) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.long
def test_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(CONTENT))
    small = ("--preset", str(preset), "--batch-size", "4", "--steps", "2", "--warmup", "1", "--rounds", "1")
    content = document(monkeypatch, capsys, training, *small, "--device", "cpu")
    assert set(content["figures"]) == {training.PUBLISHED, training.OURS, training.HALF, training.TWO}
    for figures in content["figures"].values():
        assert figures["images_per_second"] > 0
        assert figures["peak_bytes"] >= 0
    ours, published = content["figures"]["ours"], content["figures"]["published"]
    assert content["ratio"] == pytest.approx(ours["images_per_second"] / published["images_per_second"])
    one, two = content["figures"][training.HALF], content["figures"][training.TWO]
    assert content["scaling"] == pytest.approx(two["images_per_second"] / one["images_per_second"])


def test_a_wrong_setting_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, training, "--set", "flow.widht=3")
    assert "allowed is flow.width" in capsys.readouterr().err
