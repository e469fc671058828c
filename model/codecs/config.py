"""What a codec is, as plain frozen data: the architecture of a diffusers AutoencoderKL, without torch.

Source of the layout: the AutoencoderKL of the diffusers package, whose ``config.json`` has these fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from model.config import Record, check

KIND = "autoencoder-kl"
DIFFUSERS_CLASS = "AutoencoderKL"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
IGNORED = frozenset(
    {"_class_name", "_diffusers_version", "_name_or_path", "sample_size", "force_upcast", "down_block_types"}
    | {"up_block_types", "act_fn", "latents_mean", "latents_std", "out_channels"}
)
"""Fields of diffusers that say nothing of the numbers here, or that may have one value alone."""
DIFFUSERS_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
}
"""What a field means that a ``config.json`` leaves out."""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Record):
    """An autoencoder with a Gaussian latent: an image on [-1, 1] to scaled latents of a side 2^(blocks − 1) smaller."""

    kind: str = KIND
    """What codec it is; there is one."""
    in_channels: int
    """Colour channels of the images: 1 (grey) or 3 (RGB)."""
    latent_channels: int
    """Channels of the latents."""
    block_out_channels: tuple[int, ...]
    """Width of each block from the image inwards; the side is halved between two of them."""
    layers_per_block: int = 1
    """Residual layers of each block of the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    """Groups of the normalizations."""
    scaling_factor: float
    """Factor that brings the latents to about unit variance."""
    shift_factor: float = 0.0
    """What is subtracted from the latents first."""
    use_quant_conv: bool = True
    """Whether a 1×1 convolution ends the encoder."""
    use_post_quant_conv: bool = True
    """Whether a 1×1 convolution begins the decoder."""
    mid_block_add_attention: bool = True
    """Whether the middle blocks attend."""
    sha256: str = ""
    """Hash of the weights' file, which makes them a part of what a bundle's id says; empty before they are written."""

    def __post_init__(self) -> None:
        check(self.kind == KIND, "codec.kind", self.kind, repr(KIND))
        check(self.in_channels in (1, 3), "codec.in_channels", self.in_channels, "1 or 3")
        for name in ("latent_channels", "layers_per_block", "norm_num_groups"):
            check(_is_count(getattr(self, name)), f"codec.{name}", getattr(self, name), "an integer >= 1")
        if isinstance(self.block_out_channels, list):
            object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        widths, groups = self.block_out_channels, self.norm_num_groups
        check(
            isinstance(widths, tuple) and len(widths) >= 1 and all(_is_count(w) and w % groups == 0 for w in widths),
            "codec.block_out_channels",
            widths,
            f"at least one multiple of norm_num_groups {groups}",
        )
        for name, positive in (("scaling_factor", True), ("shift_factor", False)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            allowed = "a number > 0" if positive else "a number"
            check(number and (value > 0 or not positive), f"codec.{name}", value, allowed)
        for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            value = getattr(self, name)
            check(isinstance(value, bool), f"codec.{name}", value, "true or false")
        is_hash = isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}|", self.sha256)
        check(bool(is_hash), "codec.sha256", self.sha256, "a sha256 in hexadecimal")

    @property
    def factor(self) -> int:
        """By how much the side of the latents is smaller than that of the image."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, data: Mapping[str, Any]) -> Self:
        """Read the ``config.json`` of diffusers; raises ``ValueError`` for what is not computed here."""
        if not isinstance(data, Mapping):
            raise ValueError(f"codec: got {type(data).__name__}, allowed is an object")
        name = data.get("_class_name", DIFFUSERS_CLASS)
        check(name == DIFFUSERS_CLASS, "codec._class_name", name, repr(DIFFUSERS_CLASS))
        check(data.get("act_fn", "silu") == "silu", "codec.act_fn", data.get("act_fn"), "'silu'")
        for field, block in (("down_block_types", DOWN), ("up_block_types", UP)):
            given = data.get(field, [block])
            check(isinstance(given, list) and set(given) == {block}, f"codec.{field}", given, f"{block} alone")
        for field in ("latents_mean", "latents_std"):
            check(data.get(field) is None, f"codec.{field}", data.get(field), "null: one scale and shift for all")
        inputs = data.get("in_channels", 3)
        outputs = data.get("out_channels", 3)
        check(inputs == outputs, "codec.out_channels", outputs, f"as many as in_channels, {inputs}")
        given = {field: value for field, value in data.items() if field not in IGNORED and value is not None}
        return cls.from_dict({**DIFFUSERS_DEFAULTS, **given})
