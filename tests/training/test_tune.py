"""Tuning: a profile that fits the bundle, is stored in it, and changes nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from model.bundle import Bundle, BundleConfig, read_bundle
from model.config import NoiseProtocol, SamplingDefaults
from model.flow import Flow
from model.sampling.plan import segment_lengths
from model.weights import write_bundle
from training.cli import app
from training.config import TrainConfig
from training.data import DataError, Images
from training.tune import BATCHES, TuneOptions, tables, tune

CPU = torch.device("cpu")


@pytest.fixture
def bundle(config: TrainConfig, tmp_path: Path) -> Bundle:
    """Random weights that do something, 16 patches."""
    torch.manual_seed(0)
    flow_config = replace(config.flow, patch_size=2)
    flow = Flow(flow_config)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    noise = NoiseProtocol(kind="gaussian", std=0.1)
    described = BundleConfig(name="squares", flow=flow_config, noise=noise, class_names=("0", "1"))
    return write_bundle(tmp_path / "squares-bundle", described, flow, SamplingDefaults(guidance_scale=1.0), "# card\n")


def test_the_profile_fits_the_bundle(bundle: Bundle, idx_data: Path) -> None:
    heard: list[str] = []
    tuning = tune(bundle, idx_data, TuneOptions(num_images=6), CPU, heard.append)
    profile = tuning.profile
    profile.check_fits(bundle.config.flow)
    assert profile.num_images == 6
    assert profile.guidance["guidance_scale"] == 1.0
    assert sum(block.crm for block in profile.blocks) == pytest.approx(1)
    lengths = segment_lengths(16)
    for block in profile.blocks:
        assert sorted(block.passes, reverse=True) == lengths
        assert all(1 <= passes <= length for length, passes in block.passes.items())
    assert set(tuning.plans) == set(BATCHES)
    assert all(len(plan.blocks) == 2 for plan in tuning.plans.values())
    assert any("segments of 15" in text for text in heard)


def test_the_same_seed_measures_the_same(bundle: Bundle, idx_data: Path) -> None:
    options = TuneOptions(num_images=4, seed=5)
    first, again = (tune(bundle, idx_data, options, CPU, lambda _: None).profile for _ in range(2))
    other = tune(bundle, idx_data, replace(options, seed=6), CPU, lambda _: None).profile
    assert first == again
    assert first != other


def test_unconditional_models_need_no_classes(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    flow_config = replace(bundle.config.flow, num_classes=0)
    flow = Flow(flow_config)
    described = replace(bundle.config, flow=flow_config, class_names=())
    plain = write_bundle(tmp_path / "plain", described, flow, SamplingDefaults(), "# card\n")
    profile = tune(plain, idx_data, TuneOptions(num_images=3), CPU, lambda _: None).profile
    # A new flow is the identity: one pass to find it, and nothing left to do.
    assert all(block.passes[15] <= 2 for block in profile.blocks)


def test_data_is_spread_over_the_classes(
    bundle: Bundle, make_images: Callable[..., Images], write_idx: Callable[..., Path], tmp_path: Path
) -> None:
    """Data with a class that the model does not have is refused, wherever it stands."""
    images = make_images(12)
    images.labels[-1] = 7
    with pytest.raises(DataError, match="label 7"):
        tune(bundle, write_idx(tmp_path / "odd", images), TuneOptions(num_images=2), CPU, lambda _: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_images": 0}, "num_images: got 0"), ({"tolerance": 0.0}, "tolerance: got 0.0"), ({"tolerance": 2}, "toler")],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneOptions(**options)  # type: ignore[arg-type]


def test_a_model_without_finite_samples_is_refused(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    flow = Flow(bundle.config.flow)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for block in flow.blocks:
        torch.nn.init.constant_(block.proj_out.bias, 60.0)
    wild = write_bundle(tmp_path / "wild", bundle.config, flow, SamplingDefaults(), "# card\n")
    with pytest.raises(ValueError, match="not finite"):
        tune(wild, idx_data, TuneOptions(num_images=2), CPU, lambda _: None)


def test_the_command_stores_the_profile_and_keeps_the_id(bundle: Bundle, idx_data: Path) -> None:
    arguments = ["tune", str(bundle.path), "--data", str(idx_data), "--num-images", "4", "--device", "cpu"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "Plan on this device" in dry.stdout
    assert read_bundle(bundle.path).convergence is None
    stored = CliRunner().invoke(app, [*arguments, "--json"])
    assert stored.exit_code == 0, stored.output
    tuned = read_bundle(bundle.path)
    assert tuned.model_id == bundle.model_id
    assert tuned.sampling == bundle.sampling
    assert tuned.convergence is not None
    assert json.loads(stored.stdout) == tuned.convergence.to_dict()


def test_tables_show_every_block_and_batch(bundle: Bundle, idx_data: Path) -> None:
    tuning = tune(bundle, idx_data, TuneOptions(num_images=2), CPU, lambda _: None)
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables(tuning):
        console.print(table)
    text = console.export_text()
    assert "CRM share" in text
    assert all(f"passes/{length}" in text for length in segment_lengths(16))
    assert all(f"│ {batch:>5} │" in text for batch in BATCHES)
