"""Import of official-layout checkpoints (apple/ml-tarflow): bare state dicts with fixed names.

Everything but the noise and the class names follows from the tensors' shapes (see :func:`infer_config`).
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.config import FlowConfig
from model.flow import Flow

_EXPECTED = "a state dict of TarFlow in the official layout (tensors named 'blocks.0.proj_in.weight', …)"
_RENAMED = {
    "pos_embed": "position",
    "class_embed": "class_embedding",
    "attention.proj.": "attention.out.",
    "mlp.main.0.": "mlp.up.",
    "mlp.main.2.": "mlp.down.",
    "attn_blocks.": "layers.",
}
_UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
"""What torch's restricted unpickler has been seen to raise on damaged files and files of other kinds."""
_DROPPED = re.compile(r"blocks\.\d+\.attn_mask")


class CheckpointFormatError(ValueError):
    """A file that is not an official-layout TarFlow checkpoint; says what was expected and found."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Load a state dict without executing anything in it; raises :class:`CheckpointFormatError`."""
    if not path.is_file():
        raise CheckpointFormatError(f"{path}: expected {_EXPECTED}, found no such file")
    try:
        with warnings.catch_warnings():
            # torch warns about other pickle protocols before it fails on them.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointFormatError(f"{path}: expected {_EXPECTED}, found an unreadable file ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointFormatError(f"{path}: expected {_EXPECTED}, found a {type(content).__name__}")
    other = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if other or not content:
        found = f"entries that are not tensors: {', '.join(other[:5])}" if other else "an empty dict"
        raise CheckpointFormatError(f"{path}: expected {_EXPECTED}, found {found}")
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in content.items()}


def infer_config(tensors: Mapping[str, Tensor]) -> FlowConfig:
    """The architecture that a state dict's names and shapes imply; :class:`CheckpointFormatError` if none.

    D = columns of proj_in, T = rows of pos_embed, classes = rows of class_embed, volume preserving
    iff proj_out has D rows, C·P² = D with C in {1, 3}, image side = P·√T. A head has 64 values.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].dim() != axes:
            names = ", ".join(list(tensors)[:5])
            found = "no such tensor" if name not in tensors else f"{tensors[name].dim()} axes"
            raise CheckpointFormatError(
                f"expected {_EXPECTED}: {name} with {axes} axes, found {found} (has {names}, …)"
            )
        return tuple(tensors[name].shape)

    width, patch_dim = shape("blocks.0.proj_in.weight", 2)
    num_patches, _ = shape("blocks.0.pos_embed", 2)
    outputs, _ = shape("blocks.0.proj_out.weight", 2)
    hidden, _ = shape("blocks.0.attn_blocks.0.mlp.main.0.weight", 2)
    indices = [re.match(r"blocks\.(\d+)\.attn_blocks\.(\d+)\.", name) for name in tensors]
    layers: dict[int, set[int]] = {}
    for match in filter(None, indices):
        layers.setdefault(int(match[1]), set()).add(int(match[2]))
    for what, numbers in (("blocks", set(layers)), *((f"layers of block {i}", layers[i]) for i in sorted(layers))):
        if numbers != set(range(len(numbers))):
            raise CheckpointFormatError(f"expected {_EXPECTED}: {what} numbered from 0, found {sorted(numbers)}")
    counts = [len(layers[i]) for i in sorted(layers)]
    sides = {channels: math.isqrt(patch_dim // channels) for channels in (1, 3)}
    fitting = [c for c, side in sides.items() if c * side**2 == patch_dim]
    if len(fitting) != 1 or math.isqrt(num_patches) ** 2 != num_patches:
        raise CheckpointFormatError(
            f"expected square patches of 1 or 3 channels on a square grid, "
            f"found {patch_dim} values in a patch and {num_patches} patches"
        )
    channels = fitting[0]
    try:
        return FlowConfig(
            image_size=sides[channels] * math.isqrt(num_patches),
            channels=channels,
            patch_size=sides[channels],
            width=width,
            num_blocks=len(counts),
            layers_per_block=counts[0] if len(set(counts)) == 1 else tuple(counts),
            num_classes=shape("blocks.0.class_embed", 3)[0] if "blocks.0.class_embed" in tensors else 0,
            volume_preserving=outputs == patch_dim,
            expansion=hidden // max(width, 1),
        )
    except ValueError as error:
        raise CheckpointFormatError(f"expected {_EXPECTED}: {error}") from error


def to_flow(tensors: Mapping[str, Tensor]) -> Flow:
    """The flow of an official-layout state dict, in float32; raises :class:`CheckpointFormatError`."""
    config = infer_config(tensors)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if _DROPPED.fullmatch(name):
            continue
        new = "prior_variance" if name == "var" else name
        for old, ours in _RENAMED.items():
            new = new.replace(old, ours)
        renamed[new] = value.squeeze(1) if new.endswith("class_embedding") else value
    with torch.device("meta"):
        flow = Flow(config)
    # A checkpoint without `var` belongs to a flow that keeps the standard normal prior.
    renamed.setdefault("prior_variance", torch.ones(config.num_patches, config.patch_dim))
    expected = {name: tuple(value.shape) for name, value in flow.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in renamed.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise CheckpointFormatError(
            f"expected {_EXPECTED}: {wrong} with shape {expected.get(wrong, 'none')}, found {found.get(wrong, 'none')}"
        )
    for name, value in renamed.items():
        if not value.is_floating_point() or value.layout is not torch.strided:
            raise CheckpointFormatError(
                f"expected {_EXPECTED}: floating-point values in {name}, found {value.dtype}, {value.layout}"
            )
    flow.load_state_dict({name: value.float().contiguous() for name, value in renamed.items()}, assign=True)
    return flow.eval().requires_grad_(False)
