"""The sweep: its grid, paired figures, a verdict on fresh seeds, and what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.bundle import Bundle, BundleConfig
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults
from model.flow import Flow
from model.weights import write_bundle
from training.data import DataError, Images
from training.features import EXTRACTORS, Extractor, ExtractorError
from training.frechet import GROUPS, Figure
from training.sweep import SHOWN, Confirmation, Sweep, SweepOptions, run_sweep
from training.sweep_grid import DEFAULT_GRIDS, MODES, Grid, make_grids, mode_settings
from training.sweep_report import contact_sheet, describe, markdown, table, to_json, verdicts

GRID = Grid(scales=(1.0, 3.0), schedules=("constant",), rules=("linear",), temperatures=(1.0, 2.0))
OPTIONS = SweepOptions(
    grids={"conditional": GRID, "unconditional": GRID}, num_samples=40, confirm_samples=60, components=8
)


@pytest.fixture(autouse=True)
def _means_as_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real extractor has tests of its own; here the features of 8x8 images are means of 2x2 pixels."""

    def extract(pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float(), 2).flatten(1)

    means = Extractor(name="means", num_features=16, extract=extract)
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: means)


def make_bundle(path: Path, *, num_classes: int = 2, size: float = 0.1, **sampling: object) -> Bundle:
    """A model with random weights of this size in the last layer of each block, where training starts from zeros."""
    config = FlowConfig(
        image_size=8, channels=1, patch_size=4, width=16, num_blocks=2, layers_per_block=1, head_dim=8,
        num_classes=num_classes,
    )  # fmt: skip
    torch.manual_seed(0)
    flow = Flow(config)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=size)
    described = BundleConfig(
        name="tiny",
        flow=config,
        noise=NoiseProtocol(kind="gaussian", std=0.1),
        class_names=tuple(str(i) for i in range(num_classes)),
    )
    return write_bundle(path, described, flow, SamplingDefaults(**sampling), card="")  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]) -> Path:
    return write_idx(tmp_path / "squares", make_images(90, seed=1), "t10k")


def sweep(bundle: Bundle, data: Path, **changes: object) -> Sweep:
    return run_sweep(bundle, data, replace(OPTIONS, **changes), torch.device("cpu"))  # type: ignore[arg-type]


def figure(value: float, error: float = 1.0) -> Figure:
    """A figure with this value and standard error."""
    spread = torch.linspace(-1, 1, GROUPS, dtype=torch.float64)
    return Figure(value + spread * (error * math.sqrt(GROUPS) / spread.std()), value)


def test_a_grid_holds_no_guidance_the_bundle_and_nothing_twice() -> None:
    base = SamplingDefaults(guidance_scale=1.0, denoise=True)
    found = mode_settings(base, GRID, "conditional")
    assert found[0] == SamplingDefaults(denoise=True)
    assert [(s.guidance_scale, s.attention_temperature) for s in found[1:]] == [(1, 1), (3, 1), (1, 2), (3, 2)]
    # Without a class, τ = 1 compares a pass with itself, in the grid as in the bundle.
    found = mode_settings(base, GRID, "unconditional")
    assert [(s.guidance_scale, s.attention_temperature) for s in found] == [(0, 1), (1, 2), (3, 2)]
    assert all(s.denoise for s in found)
    own = replace(base, guidance_scale=7.0, attention_temperature=0.3)
    assert own in mode_settings(own, GRID, "unconditional")


def test_the_closed_form_has_no_target() -> None:
    grid = replace(GRID, rules=("linear", "closed_form"), temperatures=(1.0,), scales=(1.0,))
    found = mode_settings(SamplingDefaults(guidance_target="shift"), grid, "conditional")
    assert [(s.guidance_rule, s.guidance_target) for s in found[1:]] == [("linear", "shift"), ("closed_form", "both")]


def test_axes_are_read_from_text() -> None:
    grids = make_grids(MODES, scales="0.5, 2", rules="linear, closed_form")
    assert grids["conditional"].scales == grids["unconditional"].scales == (0.5, 2.0)
    assert grids["conditional"].rules == ("linear", "closed_form")
    assert grids["unconditional"].temperatures == DEFAULT_GRIDS["unconditional"].temperatures
    for text in ("", "1,,2", "1;2", "strong"):
        with pytest.raises(ValueError, match=r"scales: got .* numbers with commas"):
            make_grids(MODES, scales=text)


def test_every_default_setting_is_allowed() -> None:
    for mode, grid in DEFAULT_GRIDS.items():
        assert len(mode_settings(SamplingDefaults(), grid, mode)) > 12


def test_a_sweep_is_repeatable_and_paired(tmp_path: Path, data: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", guidance_scale=1.0)
    told: list[tuple[int, int]] = []
    first = run_sweep(bundle, data, OPTIONS, torch.device("cpu"), lambda text, done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert first.reference.features == "means/pca8"
    assert [(mode.mode, len(mode.trials)) for mode in first.modes] == [("conditional", 5), ("unconditional", 3)]
    second = sweep(bundle, data, confirm_samples=0)
    for ours, theirs in zip(first.modes, second.modes, strict=True):
        for one, other in zip(ours.trials, theirs.trials, strict=True):
            assert one.figure is not None
            assert other.figure is not None
            assert torch.equal(one.figure.pseudo_values_G, other.figure.pseudo_values_G)
    other_seed = sweep(bundle, data, confirm_samples=0, seed=5)
    assert first.modes[0].unguided.value != other_seed.modes[0].unguided.value
    # All settings draw from the same seeds, and guidance changes what comes out.
    conditional = first.modes[0]
    shown = [trial.shown for trial in conditional.trials]
    assert all(images.shape == (SHOWN, 1, 8, 8) for images in shown)
    assert len({images.tobytes() for images in shown}) == 5


def test_where_guidance_does_nothing_no_guidance_is_the_best(tmp_path: Path, data: Path) -> None:
    # With zeros in the last layers both passes agree, whatever the weight.
    result = sweep(make_bundle(tmp_path / "bundle", size=0.0), data)
    for mode in result.modes:
        assert mode.best is mode.unguided
        assert mode.confirmations == ()
        for trial in mode.trials[1:]:
            assert trial.figure is not None
            assert mode.unguided.figure is not None
            difference = trial.figure - mode.unguided.figure
            assert (difference.value, difference.standard_error) == (0, 0)
    assert result.shared_best is None
    assert verdicts(result) == [f"{mode}: no guidance is the best of these settings" for mode in MODES]


def test_the_best_is_confirmed_on_seeds_it_was_not_chosen_on(
    tmp_path: Path, data: Path, make_images: Callable[..., Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, range, list[int | None]]] = []

    def draw(
        sampler: object, noise: object, setting: SamplingDefaults, seeds: range, labels: Sequence[int | None]
    ) -> Iterator[Tensor | None]:
        # Real images, the darker the further the weight is from 3; the first pixel tells the class.
        drawn.append((setting.guidance_scale, seeds, list(labels)))
        pixels = make_images(len(seeds), seed=seeds.start + 7).pixels.astype(np.int64)
        pixels = (pixels - 15 * abs(setting.guidance_scale - 3)).clip(0, 255)
        pixels[:, 0, 0, 0] = [99 if label is None else label for label in labels]
        yield torch.from_numpy(pixels.astype(np.uint8))

    monkeypatch.setattr("training.sweep.draw", draw)
    result = sweep(make_bundle(tmp_path / "bundle"), data)
    conditional, unconditional = result.modes
    # Without a class only τ = 2 guides, and so it does with one: the best for both. By itself the first in the grid is.
    assert [mode.best.setting.attention_temperature for mode in result.modes] == [1, 2]
    assert result.shared_best == unconditional.best.setting
    assert [len(mode.confirmations) for mode in result.modes] == [2, 1]
    for confirmation in (*conditional.confirmations, *unconditional.confirmations):
        assert confirmation.setting.guidance_scale == 3
        assert confirmation.beats_no_guidance
        assert confirmation.difference.value < -100
    *sentences, both = verdicts(result)
    assert all(f"{mode}: the best is w 3" in text for mode, text in zip(MODES, sentences, strict=True))
    assert both.startswith("with and without a class: the best is w 3, τ 2")
    assert both.count("on 60 fresh seeds it beats no guidance") == 2
    assert [(scale, seeds) for scale, seeds, _ in drawn] == [
        *((scale, range(40)) for scale in (0, 1, 3, 1, 3)),
        *((scale, range(40)) for scale in (0, 1, 3)),
        *((scale, range(40, 100)) for scale in (0, 3, 3)),
        *((scale, range(40, 100)) for scale in (0, 3)),
    ]
    # Both classes in about the shares that the data has them, or none at all.
    given = [labels for _, _, labels in drawn if set(labels) != {None}]
    assert len(given) == 5 + 3
    assert all(0.3 < np.mean(np.array(labels)) < 0.7 for labels in given)
    # The contact sheet's columns go through the classes.
    assert conditional.best.shown[:, 0, 0, 0].tolist() == [0, 1] * (SHOWN // 2)
    assert (unconditional.best.shown[:, 0, 0, 0] == 99).all()


def test_samples_that_are_not_finite_fail_their_setting_alone(tmp_path: Path, data: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    grid = replace(GRID, scales=(0.1, 100.0), temperatures=(0.01,))
    result = sweep(bundle, data, grids={"conditional": grid}, confirm_samples=0)
    (mode,) = result.modes
    assert [trial.figure is None for trial in mode.trials] == [False, False, True]
    last = table(result).splitlines()[-1]
    assert "| 100 " in last
    assert "not finite" in last
    assert to_json(result)["modes"]["conditional"]["trials"][-1]["distance"] is None
    assert (contact_sheet(result)[:, -40:, -40:] == 255).all()


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [(-2.1, 1.0, "beats no guidance"), (-1.9, 1.0, "is not shown to beat"), (3.0, 1.0, "3.0 standard errors worse")],
)
def test_the_verdict_counts_standard_errors_of_the_difference(
    difference: float, error: float, expected: str, tmp_path: Path, data: Path
) -> None:
    result = sweep(make_bundle(tmp_path / "bundle"), data, confirm_samples=0)
    mode = result.modes[0]
    best = replace(mode.trials[1], figure=figure(-1e6))
    # Each figure by itself is far less certain than their difference.
    unguided = figure(100.0, 50.0)
    guided = Figure(unguided.pseudo_values_G + figure(difference, error).pseudo_values_G, 0.0)
    confirmation = Confirmation(setting=best.setting, unguided=unguided, guided=guided)
    trials = (mode.unguided, best)
    for confirmations, text in (((confirmation,), expected), ((), "not confirmed on fresh seeds")):
        told = replace(result, modes=(replace(mode, trials=trials, confirmations=confirmations),))
        assert text in verdicts(told)[0]


def test_table_document_and_sheet_tell_the_same(tmp_path: Path, data: Path) -> None:
    result = sweep(make_bundle(tmp_path / "bundle", guidance_scale=3.0), data)
    lines = table(result).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + 5 + 3
    assert "means/pca8, 40 samples against 90 real images); not comparable with FID" in markdown(result)
    document = json.loads(json.dumps(to_json(result), allow_nan=False))
    for mode, header in zip(result.modes, (2, 7), strict=True):
        entry = document["modes"][mode.mode]
        values = [trial["distance"]["value"] for trial in entry["trials"]]
        assert values == sorted(values)
        assert SamplingDefaults.from_dict(entry["best"]) == mode.best.setting
        assert "**best**" in lines[header]
    assert sum("in the bundle" in line for line in lines) == 1
    sheet = contact_sheet(result)
    # Five settings to the left, three and white to the right.
    row, column = sheet.shape[1] // 5, 300 + SHOWN * 49 - 1
    assert sheet.shape == (3, 5 * row, 2 * column)
    assert (sheet[:, 3 * row :, column:] == 255).all()
    assert (sheet[:, :row, column:] != 255).any()
    # The best's first sample, each pixel six times as large.
    corner = sheet[:, 1:49, 300:348]
    expected = result.modes[0].best.shown[0].repeat(6, axis=1).repeat(6, axis=2)
    assert (corner == expected).all()


def test_a_setting_is_described_in_full() -> None:
    setting = SamplingDefaults(
        guidance_scale=0.5, attention_temperature=2, guidance_target="shift", guidance_window=(0, 2)
    )
    assert describe(setting) == "w 0.5, τ 2, constant, linear rule, shift only, blocks 0-1"
    closed = SamplingDefaults(guidance_scale=3, guidance_rule="closed_form", guidance_schedule="cosine")
    assert describe(closed) == "w 3, τ 1, cosine, closed form rule"
    assert describe(SamplingDefaults(attention_temperature=0.3)) == "no guidance"


def test_mistakes_are_refused_before_anything_is_drawn(tmp_path: Path, data: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    unlabelled = make_bundle(tmp_path / "unlabelled", num_classes=0)
    cases: list[tuple[Bundle, dict[str, object], type[ValueError], str]] = [
        (unlabelled, {}, ValueError, "modes: got 'conditional', allowed is unconditional for tiny"),
        (bundle, {"grids": {}}, ValueError, "modes: got 'none'"),
        (bundle, {"num_samples": 39}, ValueError, "num_samples: got 39, allowed is an integer >= 40"),
        (bundle, {"confirm_samples": 1}, ValueError, "confirm_samples: got 1"),
        (bundle, {"components": 17}, ValueError, "components: got 17, allowed is 1 to 16"),
        (bundle, {"reference_images": 8}, ValueError, "components: got 8, allowed is 1 to 7 for 8 real images"),
        (bundle, {"split": "train"}, DataError, "train split are incomplete"),
        (bundle, {"extractor": "inception"}, ExtractorError, "got 'inception'"),
        (bundle, {"grids": {"conditional": replace(GRID, schedules=("square",))}}, ValueError, "guidance_schedule"),
        (bundle, {"grids": {"conditional": replace(GRID, scales=(-1.0,))}}, ValueError, "guidance_scale"),
        (bundle, {"grids": {"conditional": replace(GRID, temperatures=(0.0,))}}, ValueError, "attention_temperature"),
    ]
    for model, changes, error, message in cases:
        with pytest.raises(error, match=message):
            sweep(model, data, **changes)


def test_a_model_without_classes_is_swept(tmp_path: Path, data: Path) -> None:
    result = sweep(make_bundle(tmp_path / "bundle", num_classes=0), data, grids={"unconditional": GRID})
    (mode,) = result.modes
    assert mode.mode == "unconditional"
    assert len(mode.trials) == 3
