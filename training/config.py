"""What one training run is: architecture, noise, optimization, data; read from a preset file.

A preset is a YAML file in ``training/presets/`` (or anywhere: ``tarflow train path/to/file.yaml``).
Every invalid value raises ``ValueError`` naming the field, the value got and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from model.config import FlowConfig, NoiseProtocol, Record, SamplingDefaults, check

PRESETS = Path(__file__).parent / "presets"
Precision = Literal["auto", "bf16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Optimization(Record):
    """AdamW with linear warm-up, cosine decay, gradient clipping and an average of the weights (EMA)."""

    batch_size: int = 256
    """Images per step."""
    epochs: float = 100
    """Passes over the training images."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    final_learning_rate: float = 1e-6
    """Learning rate at the last step."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's average."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient's average."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema_decay: float = 0.9999
    """Decay of the exponential average of the weights (which is what is served); ramps up from 0."""
    label_drop: float = 0.1
    """Probability that a row's class is dropped, which trains the no-class pass that guidance needs."""
    precision: Precision = "auto"
    """``bf16`` autocast, ``float32``, or ``auto``: bf16 where a matrix product in it is measured faster."""

    def __post_init__(self) -> None:
        check(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")
        check(self.epochs > 0, "epochs", self.epochs, "> 0")
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, ">= 0")
        check(self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "[0, 1)")
        check(0 <= self.label_drop < 1, "label_drop", self.label_drop, "[0, 1)")
        check(self.precision in get_args(Precision), "precision", self.precision, ", ".join(get_args(Precision)))


@dataclass(frozen=True, kw_only=True)
class DataOptions(Record):
    """How the images of ``--data`` are used."""

    holdout: int = 0
    """Number of training images, counted from the end, that are kept out of training (for calibration)."""
    flip: bool = False
    """Mirror each training image with probability one half."""

    def __post_init__(self) -> None:
        check(isinstance(self.holdout, int) and self.holdout >= 0, "holdout", self.holdout, ">= 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Record):
    """A whole run; the resolved configuration is stored in its checkpoints and its bundle."""

    name: str
    """Name of the preset and of the bundle it makes."""
    flow: FlowConfig
    """Architecture."""
    noise: NoiseProtocol
    """How images are made continuous."""
    optimization: Optimization = field(default_factory=Optimization)
    """Optimizer and schedule."""
    data: DataOptions = field(default_factory=DataOptions)
    """Use of the data."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Sampling recommendation written into the bundle; also used for the sample grids."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in label order; empty means taken from the data."""
    seed: int = 0
    """Seed of initialization, data order, noise and label drop."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.class_names:
            check(
                len(self.class_names) == self.flow.num_classes,
                "class_names",
                self.class_names,
                f"flow.num_classes = {self.flow.num_classes} names",
            )
        if self.noise.kind == "uniform":
            check(not self.sampling.denoise, "sampling.denoise", True, "false for a uniform-noise model")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Build from nested plain mappings, as a preset file or a checkpoint holds them."""
        nested: dict[str, type[Record]] = {
            "flow": FlowConfig,
            "noise": NoiseProtocol,
            "optimization": Optimization,
            "data": DataOptions,
            "sampling": SamplingDefaults,
        }
        if not isinstance(data, dict):
            raise ValueError(f"preset: got {type(data).__name__}, allowed is a mapping")
        converted = dict(data)
        for name, record in nested.items():
            if name in converted:
                try:
                    converted[name] = record.from_dict(converted[name])
                except ValueError as error:
                    raise ValueError(f"{name}.{error}") from error
        return super().from_dict(converted)

    def with_overrides(self, **changes: Any) -> TrainConfig:
        """A copy with changed fields; keys of nested records are found by name (``epochs=3``)."""
        config = self
        for key, value in changes.items():
            for part in ("optimization", "data", "sampling"):
                record = getattr(config, part)
                if hasattr(record, key):
                    config = replace(config, **{part: replace(record, **{key: value})})
                    break
            else:
                config = replace(config, **{key: value})
        return config


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name_or_path: str) -> TrainConfig:
    """Read a preset by name or a preset file by path; raises ``ValueError`` when there is none."""
    path = PRESETS / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"preset: got {name_or_path!r}, allowed is a file or one of {', '.join(preset_names())}")
    try:
        return TrainConfig.from_dict(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"preset {path}: not valid YAML: {error}") from error
