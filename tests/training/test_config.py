"""Presets: the ones in the package are valid, and every mistake in a file is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import FlowConfig, NoiseProtocol
from model.flow import Flow
from training.config import TrainConfig, load_preset, needs_start, preset_names, read_preset, with_settings
from training.listing import num_parameters


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_what_it_is_and_where_it_is_from(name: str) -> None:
    content = read_preset(name)
    assert "Data:" in content["about"]
    sources = ("arXiv 2001.06448", "Ours.") if needs_start(name) else ("arXiv 2412.06329", "arXiv 2506.06276")
    assert any(source in content["provenance"] for source in sources)


@pytest.mark.parametrize(
    ("name", "size", "shape", "noise", "batch_size", "epochs", "num_classes"),
    [
        ("imagenet64-likelihood", 64, (2, 768, 8, 8), None, 256, 100, 0),
        ("imagenet64-unconditional", 64, (2, 768, 8, 8), 0.05, 256, 200, 0),
        ("imagenet64-conditional", 64, (2, 768, 8, 8), 0.05, 256, 200, 1000),
        ("imagenet64-conditional-p4", 64, (4, 1024, 8, 8), 0.05, 256, 200, 1000),
        ("imagenet128", 128, (4, 1024, 8, 8), 0.15, 768, 320, 1000),
        ("afhq256", 256, (8, 768, 8, 8), 0.07, 256, 4000, 3),
    ],
)
def test_the_published_recipes(
    name: str, size: int, shape: tuple[int, ...], noise: float | None, batch_size: int, epochs: int, num_classes: int
) -> None:
    config = load_preset(name)
    flow, options = config.flow, config.optimization
    assert (flow.patch_size, flow.width, flow.num_blocks, flow.layers_per_block) == shape
    assert (flow.image_size, flow.num_classes, config.data.flip) == (size, num_classes, True)
    assert (options.batch_size, options.epochs, options.learning_rate) == (batch_size, epochs, 1e-4)
    assert (options.final_learning_rate, options.warmup_epochs, options.weight_decay) == (1e-6, 1, 1e-4)
    assert options.precision == ("float32" if noise is None else "bf16")
    assert config.noise == (NoiseProtocol(kind="gaussian", std=noise) if noise else NoiseProtocol(kind="uniform"))


@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize(("num_classes", "conditioned_blocks"), [(0, None), (3, None), (3, (0, 2))])
def test_weights_are_counted_without_making_them(
    num_classes: int, conditioned_blocks: tuple[int, ...] | None, volume_preserving: bool
) -> None:
    flow = FlowConfig(
        image_size=8,
        channels=3,
        patch_size=2,
        width=16,
        num_blocks=3,
        layers_per_block=(1, 2, 1),
        head_dim=8,
        expansion=3,
        num_classes=num_classes,
        volume_preserving=volume_preserving,
        conditioned_blocks=conditioned_blocks,
    )
    assert num_parameters(flow) == sum(p.numel() for p in Flow(flow).parameters())


@pytest.mark.parametrize("name", [name for name in preset_names() if not needs_start(name)])
def test_every_preset_reads_and_survives_a_round_trip(name: str) -> None:
    config = load_preset(name)
    assert config.name == name
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_presets_cover_the_published_toy_and_photographs() -> None:
    toy, photos = load_preset("toy-28"), load_preset("photos-64")
    assert (toy.flow.patch_size, toy.flow.width, toy.flow.layer_counts) == (4, 128, (4, 4, 4, 4))
    assert (toy.noise.std, toy.optimization.batch_size, toy.optimization.learning_rate) == (0.1, 256, 2e-3)
    assert (photos.flow.image_size, photos.flow.channels, photos.data.classes_from_data) == (64, 3, True)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("optimization", "batch_size", 0),
        ("optimization", "batch_size", 1.5),
        ("optimization", "epochs", 0),
        ("optimization", "learning_rate", "1e-3"),
        ("optimization", "learning_rate", float("inf")),
        ("optimization", "learning_rate", 10**400),
        ("optimization", "ema_decay", 1.0),
        ("optimization", "label_drop", -0.1),
        ("optimization", "embedding_std", 0),
        ("optimization", "discriminative_weight", -1.0),
        ("optimization", "wrong_classes", 0),
        ("optimization", "precision", "float16"),
        ("optimization", "optimizer", "sgd"),
        ("optimization", "muon_learning_rate", 0),
        ("optimization", "muon_momentum", 1.0),
        ("optimization", "momentum", 0.9),
        ("data", "holdout", -1),
        ("data", "flip", "yes"),
        ("noise", "std", 0),
        ("flow", "patch_size", 3),
    ],
)
def test_an_invalid_value_is_named(preset: dict[str, Any], section: str, field: str, value: object) -> None:
    preset[section][field] = value
    with pytest.raises(ValueError, match=field):
        TrainConfig.from_dict(preset)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", ["only one"]),
        ("class_names", [0, 1]),
        ("class_names", ["same", "same"]),
        # Two letters would be two classes.
        ("class_names", "ab"),
        ("class_names", {"a": 0, "b": 1}),
        ("class_names", None),
        ("name", 5),
        ("name", None),
        ("seed", -1),
        ("seed", True),
        ("colour", "red"),
        ("data", None),
    ],
)
def test_an_invalid_top_level_field_is_named(preset: dict[str, Any], field: str, value: object) -> None:
    preset[field] = value
    with pytest.raises(ValueError, match=field):
        TrainConfig.from_dict(preset)


def test_uniform_noise_cannot_recommend_denoising(preset: dict[str, Any]) -> None:
    preset["noise"] = {"kind": "uniform"}
    with pytest.raises(ValueError, match=r"sampling\.denoise"):
        TrainConfig.from_dict(preset)


def test_overrides_find_their_record(config: TrainConfig) -> None:
    changed = config.with_overrides(epochs=7, flip=True, seed=3, name="other")
    assert (changed.optimization.epochs, changed.data.flip, changed.seed, changed.name) == (7, True, 3, "other")
    assert changed.flow == config.flow


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="fashion-mnist"):
        load_preset("no-such-preset")


def test_a_preset_file_that_is_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(ValueError, match=r"broken\.yaml") as refused:
        load_preset(str(path))
    assert len(str(refused.value).splitlines()) == 1


def test_a_preset_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml: got invalid start byte at byte 8, allowed is text in UTF-8"):
        load_preset(str(path))


@pytest.mark.parametrize("section", ["flow", "noise", "optimization", "data", "execution", "sampling"])
@pytest.mark.parametrize("value", [3, None, "wide", ["width"]])
def test_a_section_that_is_none_is_named(preset: dict[str, Any], section: str, value: object) -> None:
    preset[section] = value
    with pytest.raises(ValueError, match=rf"^{section}: got .*, allowed is a mapping of its fields \(") as refused:
        TrainConfig.from_dict(preset)
    assert f"got {value!r}," in str(refused.value)


def test_a_preset_file_by_path(preset_file: Path, config: TrainConfig) -> None:
    assert load_preset(str(preset_file)) == config
    assert yaml.safe_load(preset_file.read_text())["name"] == "tiny"


def test_settings_of_an_optimizer_that_the_run_has_not_are_refused() -> None:
    toy, refusal = load_preset("toy-28"), r"optimization\.muon_momentum: got 0\.9, allowed is one beside optimizer=muon"
    with pytest.raises(ValueError, match=refusal):
        with_settings(toy, ["muon_momentum=0.9"])
    assert with_settings(toy, ["muon_momentum=0.9", "optimizer=muon"]).optimization.muon_momentum == 0.9
