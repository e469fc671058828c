"""What a TarFlow is, as plain frozen data: architecture, noise protocol, sampling defaults.

Nothing here imports torch, so the API side of the service can read and validate a bundle's
description without it. Every class validates itself on construction and raises ``ValueError``
with the field's name, the value got and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

NoiseKind = Literal["gaussian", "uniform"]
GuidanceRule = Literal["linear", "closed_form"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
GuidanceTarget = Literal["both", "scale", "shift"]
Solver = Literal["auto", "sequential", "jacobi"]
Precision = Literal["float32", "bf16"]
ScaleFunction = Literal["exp", "softplus"]
Space = Literal["pixels", "latents"]

RULES: tuple[str, ...] = get_args(GuidanceRule)
SCHEDULES: tuple[str, ...] = get_args(GuidanceSchedule)
TARGETS: tuple[str, ...] = get_args(GuidanceTarget)
EMBEDDING_STD = 1e-2
"""Standard deviation of a new block's position and class embeddings."""
MAX_SEED = 2**53 - 1
"""Largest seed: image i of a request uses seed + i, and JSON numbers are exact up to 2⁵³."""


def check(condition: bool, field: str, got: object, allowed: str) -> None:
    """Raise ``ValueError`` that shows the field, the value got and what is allowed."""
    if not condition:
        raise ValueError(f"{field}: got {got!r}, allowed is {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


class Record:
    """Base of the frozen dataclasses below: strict conversion from and to plain mappings."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from a mapping; raises ``ValueError`` for a missing, unknown or invalid field."""
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls.__name__}: got {type(data).__name__}, allowed is an object")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - known)
        check(not unknown, f"{cls.__name__} fields", unknown, ", ".join(sorted(known)))
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON-ready dictionary."""
        # Every sampling request asks for it; dataclasses.asdict, which copies deeply, takes ten times as long.
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Record):
    """Architecture of a TarFlow (arXiv 2412.06329, section 2): everything the weights' shapes depend on."""

    image_size: int
    """Side of the square image in pixels, or of the latents that a codec makes of it."""
    channels: int
    """Channels C of what is modelled: 1 (grey) or 3 (RGB) for images, any number for latents of a codec."""
    patch_size: int
    """Side P of a square patch; must divide image_size."""
    width: int
    """Width of the transformers (the paper's "channels"); a multiple of head_dim."""
    num_blocks: int
    """Number of flow blocks (the paper's T); odd blocks read the patches in reverse order."""
    layers_per_block: int | tuple[int, ...]
    """Transformer layers in each block (the paper's K): one number, or one per block (deep-shallow)."""
    num_classes: int = 0
    """Number of classes; 0 for an unconditional model."""
    volume_preserving: bool = False
    """True for the variant without scales α, which learns the prior's variance instead."""
    head_dim: int = 64
    """Size of one attention head."""
    expansion: int = 4
    """Hidden width of the MLP as a multiple of width."""
    conditioned_blocks: tuple[int, ...] | None = None
    """Blocks that see the class, numbered as in layers_per_block, where the last is next to the noise; None for all.
    STARFlow (arXiv 2506.06276) conditions its deep block alone, and so only that one is guided."""
    scale_function: ScaleFunction = "exp"
    """How a block's network gives the scale e^α: its value is α (``exp``), or e^α = softplus(value + ln(e − 1))
    (``softplus``, STARFlow), which grows only linearly. Both are 1 where the value is 0."""
    soft_clip: float = 0.0
    """Bound c on what a block's network gives for scale and shift, c·tanh(value / c) (STARFlow has 4); 0 for none."""

    def __post_init__(self) -> None:
        if isinstance(self.layers_per_block, list):
            object.__setattr__(self, "layers_per_block", tuple(self.layers_per_block))
        for name in ("image_size", "channels", "patch_size", "width", "num_blocks", "head_dim", "expansion"):
            value = getattr(self, name)
            check(_is_int(value) and value >= 1, name, value, "an integer >= 1")
        check(
            self.image_size % self.patch_size == 0,
            "patch_size",
            self.patch_size,
            f"a divisor of image_size {self.image_size}",
        )
        check(self.num_patches >= 2, "patch_size", self.patch_size, "at least two patches an image")
        check(
            self.width % self.head_dim == 0,
            "width",
            self.width,
            f"a multiple of head_dim {self.head_dim}",
        )
        check(
            _is_int(self.num_classes) and self.num_classes >= 0,
            "num_classes",
            self.num_classes,
            "an integer >= 0",
        )
        check(isinstance(self.volume_preserving, bool), "volume_preserving", self.volume_preserving, "true or false")
        layers = self.layers_per_block
        counts = layers if isinstance(layers, tuple) else (layers,)
        check(all(_is_int(n) and n >= 1 for n in counts), "layers_per_block", layers, "integers >= 1")
        if isinstance(layers, tuple):
            check(
                len(layers) == self.num_blocks,
                "layers_per_block",
                layers,
                f"one number, or num_blocks = {self.num_blocks} of them",
            )
        self._check_parametrization()

    def _check_parametrization(self) -> None:
        if isinstance(self.conditioned_blocks, list):
            object.__setattr__(self, "conditioned_blocks", tuple(self.conditioned_blocks))
        blocks = self.conditioned_blocks
        check(
            blocks is None
            or (
                isinstance(blocks, tuple)
                and len(blocks) >= 1
                and all(_is_int(n) and 0 <= n < self.num_blocks for n in blocks)
                and list(blocks) == sorted(set(blocks))
            ),
            "conditioned_blocks",
            blocks,
            f"different numbers of blocks from 0 to {self.num_blocks - 1} in ascending order, or null for all",
        )
        functions = get_args(ScaleFunction)
        check(self.scale_function in functions, "scale_function", self.scale_function, " or ".join(functions))
        check(
            self.scale_function == "exp" or not self.volume_preserving,
            "scale_function",
            self.scale_function,
            "'exp' for a volume-preserving flow, which has no scale",
        )
        clip = self.soft_clip
        check(_is_finite(clip) and 0 <= clip <= 100, "soft_clip", clip, "a number in [0, 100], where 0 is no bound")

    def to_dict(self) -> dict[str, Any]:
        """The architecture as a JSON-ready dictionary."""
        content = super().to_dict()
        # Left out where nothing was chosen: configurations from before there was a choice keep their bytes, and bundles
        # so their ids.
        return {name: value for name, value in content.items() if name not in _LEFT_OUT or value != _LEFT_OUT[name]}

    @property
    def num_patches(self) -> int:
        """Sequence length T = (image_size / P)²."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values D = C·P² in one patch."""
        return self.channels * self.patch_size**2

    @property
    def num_dims(self) -> int:
        """Values in one image, T·D = C·H·W."""
        return self.num_patches * self.patch_dim

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of one parallel pass over one image: matrix products and attention."""
        T, W = self.num_patches, self.width
        layer = 2 * T * (4 + 2 * self.expansion) * W**2 + 4 * T**2 * W
        return sum(self.layer_counts) * layer

    @property
    def num_heads(self) -> int:
        """Attention heads of every layer."""
        return self.width // self.head_dim

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Transformer layers of each block, always one entry per block."""
        layers = self.layers_per_block
        return layers if isinstance(layers, tuple) else (layers,) * self.num_blocks

    def is_conditioned(self, block: int) -> bool:
        """Whether a block, numbered as in layers_per_block, sees the class."""
        return self.num_classes > 0 and (self.conditioned_blocks is None or block in self.conditioned_blocks)


_LEFT_OUT: dict[str, Any] = {"conditioned_blocks": None, "scale_function": "exp", "soft_clip": 0.0}


@dataclass(frozen=True, kw_only=True)
class NoiseProtocol(Record):
    """How the training images were made continuous; it fixes what a likelihood of the model means."""

    kind: NoiseKind
    """``gaussian``: N(0, std²) was added; ``uniform``: 8-bit values were dequantized with U[0, 1)."""
    std: float = 0.0
    """Standard deviation σ of the Gaussian noise on the [-1, 1] pixel scale, or that of latents; 0 for uniform."""
    space: Space = "pixels"
    """What is noised and modelled: the image's pixels, or the latents that a codec makes of it."""

    def __post_init__(self) -> None:
        check(self.kind in get_args(NoiseKind), "noise.kind", self.kind, "'gaussian' or 'uniform'")
        if self.kind == "gaussian":
            check(_is_finite(self.std) and 0 < self.std < 2, "noise.std", self.std, "a number in (0, 2)")
        else:
            check(_is_finite(self.std) and self.std == 0, "noise.std", self.std, "0 when noise.kind is 'uniform'")
        check(self.space in get_args(Space), "noise.space", self.space, "'pixels' or 'latents'")
        check(
            self.kind == "gaussian" or self.space == "pixels",
            "noise.space",
            self.space,
            "'pixels' when noise.kind is 'uniform', since latents have no 8-bit steps",
        )

    def to_dict(self) -> dict[str, Any]:
        """The protocol as a JSON-ready dictionary."""
        content = super().to_dict()
        # Left out for pixels: bundles from before there were latents keep their bytes, and so their ids.
        if self.space == "pixels":
            del content["space"]
        return content

    @property
    def meaning(self) -> str:
        """One sentence that says what bits/dim of such a model measures."""
        if self.space == "latents":
            return (
                "density, in bits per dimension of an autoencoder's latents, of the latents after adding Gaussian "
                f"noise of standard deviation {self.std:g} to them, averaged over draws; no likelihood of pixels, "
                "and comparable with nothing but models of the same latents"
            )
        if self.kind == "gaussian":
            return (
                f"density of the image after adding Gaussian noise of standard deviation {self.std:g} on the "
                "[-1, 1] pixel scale, averaged over draws; not comparable with lossless code lengths"
            )
        return (
            "upper bound on the code length of the 8-bit image (uniform dequantization, log-mean-exp over draws); "
            "comparable with lossless compressors and published bits/dim"
        )


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults(Record):
    """What a bundle recommends for sampling; a request may override every field."""

    guidance_scale: float = 0.0
    """Guidance weight w; 0 turns guidance off."""
    guidance_rule: GuidanceRule = "linear"
    """``linear`` (TarFlow: v + w(v − v_u) for α and μ) or ``closed_form`` (STARFlow: as for a product of Gaussians)."""
    guidance_schedule: GuidanceSchedule = "constant"
    """How the weight of patch k of 1…T−1 grows: ``constant`` (w), ``linear`` (w·k/(T−1), the paper's annealing)
    or ``cosine`` (w·(1 − cos(π·k/(T−1)))/2)."""
    guidance_target: GuidanceTarget = "both"
    """Which affine parameter the linear rule guides: ``both``, ``scale`` (α) or ``shift`` (μ)."""
    guidance_window: tuple[int, int] | None = None
    """Guided blocks, [start, stop) in the order of sampling, where block 0 is next to the noise; None for all."""
    attention_temperature: float = 1.0
    """τ that divides the attention logits of the unguided pass."""
    denoise: bool = False
    """Whether samples are denoised with Tweedie's formula (Gaussian-noise models only)."""

    def __post_init__(self) -> None:
        check(
            _is_finite(self.guidance_scale) and 0 <= self.guidance_scale <= 100,
            "guidance_scale",
            self.guidance_scale,
            "a number in [0, 100]",
        )
        check(self.guidance_rule in RULES, "guidance_rule", self.guidance_rule, " or ".join(RULES))
        check(self.guidance_schedule in SCHEDULES, "guidance_schedule", self.guidance_schedule, ", ".join(SCHEDULES))
        check(self.guidance_target in TARGETS, "guidance_target", self.guidance_target, ", ".join(TARGETS))
        check(
            self.guidance_rule == "linear" or self.guidance_target == "both",
            "guidance_target",
            self.guidance_target,
            "'both' when guidance_rule is 'closed_form'",
        )
        if isinstance(self.guidance_window, list):
            object.__setattr__(self, "guidance_window", tuple(self.guidance_window))
        window = self.guidance_window
        check(
            window is None
            or (
                isinstance(window, tuple)
                and len(window) == 2
                and all(map(_is_int, window))
                and 0 <= window[0] < window[1]
            ),
            "guidance_window",
            window,
            "two integers [start, stop] with 0 <= start < stop, or null for all blocks",
        )
        check(
            _is_finite(self.attention_temperature) and 0.01 <= self.attention_temperature <= 100,
            "attention_temperature",
            self.attention_temperature,
            "a number in [0.01, 100]",
        )
        check(isinstance(self.denoise, bool), "denoise", self.denoise, "true or false")

    def check_fits(self, flow: FlowConfig, noise: NoiseProtocol) -> None:
        """Raise ``ValueError`` where these parameters ask for what the model does not have."""
        check(
            self.guidance_window is None or self.guidance_window[1] <= flow.num_blocks,
            "guidance_window",
            self.guidance_window,
            f"at most [0, {flow.num_blocks}], since the model has {flow.num_blocks} blocks",
        )
        check(
            not self.denoise or noise.kind == "gaussian",
            "denoise",
            self.denoise,
            "false for a model trained with uniform noise",
        )


@dataclass(frozen=True, kw_only=True)
class SolverOptions(Record):
    """How the inverse is computed, not what it is: every choice gives the same image within the tolerance."""

    solver: Solver = "auto"
    """``sequential`` (patch by patch), ``jacobi`` (fixed-point iterations), or ``auto``: what is fastest here."""
    tolerance: float = 1e-3
    """Largest backward error max|z' − z| (latents are standard normal) of a certified image."""
    precision: Precision = "float32"
    """``bf16`` drafts with bfloat16 weights; the draft is polished in float32 when it is certified."""
    certify: bool | None = None
    """True: every image gets a certificate; False: nothing above the tolerance is done again; None: a certificate for
    what a Jacobi iteration or low precision touched, since sequential float32 decoding is exact but for rounding."""

    def __post_init__(self) -> None:
        check(self.solver in get_args(Solver), "solver", self.solver, ", ".join(get_args(Solver)))
        check(
            _is_finite(self.tolerance) and 1e-6 <= self.tolerance <= 1,
            "tolerance",
            self.tolerance,
            "a number in [1e-6, 1]",
        )
        check(self.precision in get_args(Precision), "precision", self.precision, " or ".join(get_args(Precision)))
        check(self.certify is None or isinstance(self.certify, bool), "certify", self.certify, "true, false or null")
