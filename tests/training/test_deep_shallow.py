"""The presets of STARFlow's design train, and what they make is a bundle that samples with guidance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from model.bundle import read_bundle
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from model.weights import load_flow
from training.cli import app
from training.config import PRESETS


def test_the_preset_trains_to_a_bundle_that_samples(tmp_path: Path) -> None:
    """In all that makes the design it is the preset; it is narrower, and has fewer patches."""
    content = yaml.safe_load((PRESETS / "deep-shallow-28.yaml").read_text())
    content["flow"] |= {"width": 16, "head_dim": 8, "patch_size": 14}
    preset = tmp_path / "narrow.yaml"
    preset.write_text(yaml.safe_dump(content))
    generator = np.random.default_rng(0)
    for name in ("left", "right"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    command = ["train", preset, "--data", tmp_path / "data", "--out", tmp_path / "run", "--epochs", 1]
    result = CliRunner().invoke(app, [str(word) for word in [*command, "--batch-size", 4, "--device", "cpu"]])
    assert result.exit_code == 0, result.output
    bundle = read_bundle(tmp_path / "run" / "bundle")
    assert "the class enters block 3 of 0 to 3 alone" in bundle.card
    flow = load_flow(bundle)
    config = flow.config
    assert [block.conditioned for block in flow.blocks] == [False, False, False, True]
    rows = make_rows(latents([0, 1], config.num_patches, config.patch_dim), [0, 1], [bundle.sampling] * 2)
    guided = [len(rows.guided(number, block)) for number, block in enumerate(reversed(flow.blocks))]
    assert guided == [2, 0, 0, 0]
    assert bool(torch.isfinite(finish(Sampler(flow).decode(rows)).x_BTD).all())
