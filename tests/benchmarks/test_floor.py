"""The floor is rounding and nothing else, and random models stand for the trained one as they say."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import floor
from benchmarks.floor import Case, make_image_rows, measure, safe_tolerance, spreads_on_samples
from benchmarks.lifelike import Spread, lifelike_flow, share_out
from model.bundle import Bundle
from model.config import FlowConfig, SamplingDefaults
from model.sampling.plan import FLOOR_DISTANCE
from tests.benchmarks.programs import document, run

CONFIG = FlowConfig(
    image_size=16, channels=1, patch_size=4, width=32, num_blocks=3, layers_per_block=2, num_classes=3, head_dim=16
)
SPREADS = [Spread(-0.8, 0.25, 0.6, 0.04), Spread(-0.4, 0.3, 0.5, 0.02), Spread(-0.3, 0.2, 0.3, 0.01)]


def test_a_lifelike_flow_has_the_figures_asked_for() -> None:
    flow = lifelike_flow(CONFIG, SPREADS)
    for found, wanted in zip(spreads_on_samples(flow, 32), SPREADS, strict=True):
        assert found.alpha_mean == pytest.approx(wanted.alpha_mean, abs=0.1)
        assert found.alpha_std == pytest.approx(wanted.alpha_std, rel=0.3)
        assert found.mu_std == pytest.approx(wanted.mu_std, rel=0.3)
        assert found.class_std == pytest.approx(wanted.class_std, rel=0.5)


def test_figures_are_shared_out_over_more_blocks() -> None:
    shared = share_out(SPREADS, 6)
    assert 2 * sum(s.alpha_mean for s in shared) == pytest.approx(sum(s.alpha_mean for s in SPREADS))
    assert 2 * sum(s.alpha_std**2 for s in shared) == pytest.approx(sum(s.alpha_std**2 for s in SPREADS))


def test_the_floor_is_rounding() -> None:
    flow = lifelike_flow(CONFIG, SPREADS)
    found, spreads = measure(Case("tiny", flow, 4), copy.deepcopy(flow).double(), SamplingDefaults(guidance_scale=1.0))
    assert found["not_finite"] == 0
    assert len(spreads) == CONFIG.num_blocks
    assert 1e-7 < found["median"] <= found["largest"] < 1e-4
    assert found["largest_judged_in_float64"] == pytest.approx(found["largest"], rel=1)
    # Rounding is 2²⁹ times finer.
    assert found["largest_of_float64"] < found["largest"] / 1e7


def test_images_without_end_are_counted_apart() -> None:
    flow = lifelike_flow(CONFIG, SPREADS)
    rows = make_image_rows(CONFIG, 2, SamplingDefaults(), torch.float32)
    assert rows.label_B.tolist() == [0, 1]
    flow.blocks[0].proj_out.bias.fill_(1e4)
    with pytest.raises(ValueError, match="tiny: no image is finite"):
        measure(Case("tiny", flow, 2), copy.deepcopy(flow).double(), SamplingDefaults())


@pytest.mark.parametrize(("rounding", "tolerance"), [(1e-9, 1e-6), (1e-4 / FLOOR_DISTANCE, 1e-4), (1e-3, 5e-3), (9, 5)])
def test_a_safe_tolerance_is_a_few_times_the_floor(rounding: float, tolerance: float) -> None:
    assert safe_tolerance(rounding) == pytest.approx(tolerance)


def test_floor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Bundle) -> None:
    arguments = ["--bundle", str(bundle.path), "--lengths", "4", "--blocks", "3,4", "--seeds", "2"]
    content = document(monkeypatch, capsys, floor, *arguments)
    found = [(result["model"], result["num_patches"], result["num_blocks"]) for result in content["results"]]
    assert found == [("tiny", 16, 3), ("random", 4, 3), ("random", 4, 4), ("random, shared", 4, 4)]
    assert [result["seeds"] for result in content["results"]] == [2, 8, 8, 8]
    for result in content["results"]:
        assert [row["guidance_scale"] for row in result["guidance"]] == [0, 2]
        assert result["safe_tolerance"] >= FLOOR_DISTANCE * result["floor"]
    run(monkeypatch, floor, "--bundle", str(bundle.path), "--lengths", "", "--seeds", "1")
    printed = capsys.readouterr().out
    assert "tiny, T = 16, 3 blocks, 1 seeds" in printed
    assert "the default 0.001 is wide enough" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "50"], "--lengths"),
        (["--blocks", "0"], "--blocks"),
        (["--seeds", "0"], "--seeds: at least 1"),
        (["--width", "100", "--seeds", "1"], "width: got 100"),
        (["--bundle", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_wrong_arguments_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, floor, *arguments)
    assert message in capsys.readouterr().err
