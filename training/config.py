"""What one training run is: architecture, noise, optimization, data; read from a preset file.

A preset is a YAML file in ``training/presets/`` (or anywhere: ``tarflow train path/to/file.yaml``).
Every invalid value raises ``ValueError`` naming the field, the value got and what is allowed.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from model.config import EMBEDDING_STD, FlowConfig, NoiseProtocol, Record, SamplingDefaults, check

PRESETS = Path(__file__).parent / "presets"
Precision = Literal["auto", "bf16", "float32"]
OptimizerName = Literal["adamw", "muon"]
LARGEST = sys.float_info.max
MOST_EPOCHS = 1e12
"""Less than what no run comes to the end of, and its steps are still counted exactly."""


def _check_number(record: Record, name: str, low: float, high: float = math.inf, *, or_low: bool = True) -> None:
    """Refuse a field that is not a finite number in [low, high), or in (low, high) unless ``or_low``."""
    value = getattr(record, name)
    # YAML 1.1 reads 1e-3 as text: a number needs its decimal point there (1.0e-3).
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    above = is_number and (value >= low if or_low else value > low)
    bounds = f"{'>=' if or_low else '>'} {low:g}" + (f" and < {high:g}" if math.isfinite(high) else "")
    check(above and value < high, name, value, f"a number {bounds} (in YAML with a decimal point, as in 1.0e-3)")


def _check_count(record: Record, name: str, low: int) -> None:
    value = getattr(record, name)
    check(isinstance(value, int) and not isinstance(value, bool) and value >= low, name, value, f"an integer >= {low}")


STARTED_FROM = "started_from"
"""Field of a run's ``config.yaml`` that names the bundle it began with, where it began with one."""
MODEL = ("flow", "noise")
"""What a preset says of its model; one that says neither is for fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Optimization(Record):
    """An optimizer with linear warm-up, cosine decay, gradient clipping and an average of the weights (EMA)."""

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
    optimizer: OptimizerName = "adamw"
    """``adamw``, as published, for all weights, or ``muon`` for the matrices of the layers and AdamW for the rest."""
    muon_learning_rate: float = 2.5e-3
    """Peak learning rate of what Muon trains; its steps are as large as AdamW's would be at the same rate."""
    muon_momentum: float = 0.95
    """Muon's decay of the gradient's average."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's average."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient's average."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema_decay: float = 0.9999
    """Decay of the exponential average of the weights (which is what is served); ramps up from 0."""
    embedding_std: float = EMBEDDING_STD
    """Standard deviation that position and class embeddings begin with. The published 0.01 is soon outgrown in a long
    training; in one of a few thousand steps, embeddings as large as what they are added to learn sooner."""
    label_drop: float = 0.1
    """Probability that a row's class is dropped, which trains the no-class pass that guidance needs."""
    discriminative_weight: float = 0.0
    """β of the loss −log p(x | y) − β·log p(y | x) (:mod:`training.discriminative`); 0 is the published loss."""
    wrong_classes: int = 2
    """Wrong classes an image, or all if there are fewer, whose likelihoods estimate p(y | x) where that is in the loss;
    each costs a pass."""
    precision: Precision = "auto"
    """``bf16`` autocast, ``float32``, or ``auto``: bf16 where a matrix product in it is measured faster."""

    def __post_init__(self) -> None:
        _check_count(self, "batch_size", 1)
        _check_number(self, "epochs", 0, MOST_EPOCHS, or_low=False)
        _check_number(self, "warmup_epochs", 0, MOST_EPOCHS)
        for name in ("learning_rate", "muon_learning_rate", "clip_norm", "embedding_std"):
            _check_number(self, name, 0, or_low=False)
        for name in ("final_learning_rate", "weight_decay", "discriminative_weight"):
            _check_number(self, name, 0)
        _check_count(self, "wrong_classes", 1)
        for name in ("muon_momentum", "beta1", "beta2", "ema_decay", "label_drop"):
            _check_number(self, name, 0, 1)
        for name, choices in (("optimizer", OptimizerName), ("precision", Precision)):
            allowed, value = get_args(choices), getattr(self, name)
            check(value in allowed, name, value, ", ".join(allowed))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON-ready dictionary."""
        content = super().to_dict()
        # Left out of the published recipe: what was trained before there was another keeps its bytes, and bundles their
        # ids.
        if not self.discriminative_weight:
            del content["discriminative_weight"], content["wrong_classes"]
        if self.embedding_std == EMBEDDING_STD:
            del content["embedding_std"]
        if self.optimizer == "adamw":
            del content["optimizer"], content["muon_learning_rate"], content["muon_momentum"]
        return content


@dataclass(frozen=True, kw_only=True)
class DataOptions(Record):
    """How the images of ``--data`` are used."""

    holdout: int = 0
    """Number of training images, counted from the end, that are kept out of training (for calibration)."""
    flip: bool = False
    """Mirror each training image with probability one half."""
    classes_from_data: bool = False
    """Take the number of classes and their names from the data, where they are not set
    (:func:`training.classes.resolve_classes`)."""

    def __post_init__(self) -> None:
        _check_count(self, "holdout", 0)
        for name in ("flip", "classes_from_data"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")


@dataclass(frozen=True, kw_only=True)
class Execution(Record):
    """How steps are computed: nothing here changes what they compute, but for rounding."""

    accumulation: int = 1
    """Parts in which each process takes its share of a batch, one after the other: less memory, the same gradient."""
    compile: bool = False
    """Compile the layers (torch.compile): faster after a minute of compiling; takes a C++ compiler."""
    recompute: bool = False
    """Activation checkpointing: layers are computed again in the backward pass, which saves memory for time."""
    shard: bool = False
    """Spread weights, their average, gradients and the optimizer over the processes (FSDP2): for flows of which one GPU
    holds the weights, but not five times as much. Each begins with them, and the first draws sample grids with them."""

    def __post_init__(self) -> None:
        _check_count(self, "accumulation", 1)
        for name in ("compile", "recompute", "shard"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Record):
    """A whole run; the resolved configuration is stored in its checkpoints and its bundle."""

    name: str
    """Name of the preset and of the bundle it makes."""
    about: str = ""
    """What the model is, and which data it is for."""
    provenance: str = ""
    """Where the values come from: published, or ours and why."""
    flow: FlowConfig
    """Architecture."""
    noise: NoiseProtocol
    """How images are made continuous."""
    optimization: Optimization = field(default_factory=Optimization)
    """Optimizer and schedule."""
    data: DataOptions = field(default_factory=DataOptions)
    """Use of the data."""
    execution: Execution = field(default_factory=Execution)
    """How steps are computed."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Sampling recommendation written into the bundle; also used for the sample grids."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in label order; empty means taken from the data."""
    seed: int = 0
    """Seed of initialization, data order, noise and label drop."""

    def __post_init__(self) -> None:
        # A text would be taken apart into its letters.
        are_listed = isinstance(self.class_names, list | tuple)
        check(are_listed, "class_names", self.class_names, "a list of names, as in [cat, dog]")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        for field_name in ("name", "about", "provenance"):
            text = getattr(self, field_name)
            check(isinstance(text, str), field_name, text, "a text (numbers in quotes)")
        names = self.class_names
        are_texts = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
        check(are_texts, "class_names", names, "different texts that are not empty (numbers in quotes)")
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**32
        check(is_seed, "seed", self.seed, "an integer in [0, 2^32)")
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
        if not isinstance(data, dict):
            raise ValueError(f"preset: got {type(data).__name__}, allowed is a mapping")
        converted = dict(data)
        for name, record in RECORDS.items():
            if name in converted:
                value = converted[name]
                check(isinstance(value, Mapping), name, value, f"a mapping of its fields ({_some_fields(record)})")
                try:
                    converted[name] = record.from_dict(converted[name])
                except ValueError as error:
                    # The noise's own messages already say where they are.
                    prefix = "" if str(error).startswith(f"{name}.") else f"{name}."
                    raise ValueError(f"{prefix}{error}") from error
        return super().from_dict(converted)

    def with_overrides(self, **changes: Any) -> TrainConfig:
        """A copy with changed fields; keys of nested records are found by name (``epochs=3``)."""
        config = self
        for key, value in changes.items():
            for part in ("optimization", "data", "execution", "sampling"):
                record = getattr(config, part)
                if hasattr(record, key):
                    config = replace(config, **{part: replace(record, **{key: value})})
                    break
            else:
                config = replace(config, **{key: value})
        return config


def _some_fields(record: type[Record]) -> str:
    return ", ".join([*(f.name for f in fields(record)[:3]), "…"])  # type: ignore[arg-type]


RECORDS: dict[str, type[Record]] = {
    "flow": FlowConfig,
    "noise": NoiseProtocol,
    "optimization": Optimization,
    "data": DataOptions,
    "execution": Execution,
    "sampling": SamplingDefaults,
}
"""The parts of a configuration, by the name of their field."""


def field_names() -> dict[str, str]:
    """Every field by its full name (``optimization.learning_rate``), for each name that is short for it alone."""
    full = [f.name for f in fields(TrainConfig) if f.name not in RECORDS]
    full += [f"{part}.{f.name}" for part, record in RECORDS.items() for f in fields(record)]  # type: ignore[arg-type]
    last = [name.rpartition(".")[2] for name in full]
    short = {name: other for name, other in zip(last, full, strict=True) if last.count(name) == 1}
    return {**short, **{name: name for name in full}}


def with_settings(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """A copy with fields as ``name=value`` sets them, the value in YAML; names as in :func:`field_names`.

    ``null`` is a value like any other. Raises ``ValueError`` that names the field, or that there is none of the name.
    """
    content, known = config.to_dict(), field_names()
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        check(bool(equals), "set", setting, "FIELD=VALUE, as in optimization.learning_rate=2e-4")
        if name not in known:
            near = get_close_matches(name, known, n=3) or sorted(set(known.values()))
            raise ValueError(f"set: got {name!r}, which is no field of a configuration; allowed is {', '.join(near)}")
        part, _, key = known[name].rpartition(".")
        (content[part] if part else content)[key] = _value(name, text)
    config = TrainConfig.from_dict(content)
    names = {known[setting.partition("=")[0].strip()] for setting in settings}
    for name in sorted(names):
        part, _, key = name.rpartition(".")
        idle = key.startswith("muon_") and config.optimization.optimizer != "muon"
        check(not idle, name, idle and content[part][key], "one beside optimizer=muon only")
    # 0 is how a preset leaves the number to the data: a person who sets it means a model without classes.
    check(
        not ("flow.num_classes" in names and config.data.classes_from_data and not config.flow.num_classes),
        "flow.num_classes",
        0,
        "the number in the data where data.classes_from_data is true; for a model without classes set that to false",
    )
    return config


def _value(name: str, text: str) -> Any:
    """A value as YAML reads it, but numbers as people write them: 1e-3 is one, 010 is ten, and 1:30 is none."""
    plain = text.strip()
    if re.fullmatch(r"[+-]?[0-9]+", plain):
        return int(plain)
    if re.fullmatch(r"[+-]?[0-9]+(:[0-9.]+)+", plain):
        return plain
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: got {text!r}, allowed is a value in YAML") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9.]+[eE][+-]?[0-9]+", value):
        with suppress(ValueError):
            return float(value)
    return value


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def needs_start(name: str) -> bool:
    """Whether a preset of the package leaves the model to the bundle that it fine-tunes."""
    return "flow" not in read_preset(name)


def read_preset(name_or_path: str) -> Any:
    """What the file of a preset holds, by its name or path; raises ``ValueError`` when there is none."""
    path = _preset_path(name_or_path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"preset {path}: got {error.reason} at byte {error.start}, allowed is text in UTF-8"
        ) from error
    except yaml.YAMLError as error:
        # PyYAML's own text has the place in lines of its own.
        raise ValueError(f"preset {path}: not valid YAML: {' '.join(str(error).split())}") from error


def _preset_path(name_or_path: str) -> Path:
    path = PRESETS / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"preset: got {name_or_path!r}, allowed is a file or one of {', '.join(preset_names())}")
    return path


def load_preset(name_or_path: str, defaults: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration in a preset; raises ``ValueError`` when there is none, or for what is wrong in it.

    ``defaults`` are the fields of what the run begins with: they stand for those that the preset leaves out.
    """
    content = read_preset(name_or_path)
    if isinstance(content, dict):
        preset = _preset_path(name_or_path).stem
        content = dict(content)
        start = content.pop(STARTED_FROM, None)
        check(
            start is None or defaults is not None,
            f"preset {preset}: {STARTED_FROM}",
            start,
            "none without --from BUNDLE: the run began with these weights",
        )
        check(
            defaults is not None or not content.keys().isdisjoint(MODEL),
            "from",
            None,
            f"--from BUNDLE: the preset {preset} leaves the model to the bundle that it fine-tunes",
        )
        content = _with_defaults(content, defaults or {})
        for name in ("name", *MODEL):
            check(name in content, f"preset {preset}: {name}", None, "one in its file, or that of --from BUNDLE")
    return TrainConfig.from_dict(content)


def _with_defaults(content: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **content}
    data = content.get("data")
    if isinstance(data, dict):
        merged["data"] = {**defaults.get("data", {}), **data}
        if data.get("classes_from_data") and "class_names" not in content:
            # The data's: the bundle's must be the same, which is checked when they are known.
            merged.pop("class_names", None)
    return merged
