"""Checkpoints of a run: everything needed to continue exactly, written atomically."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.data import Images

FILE_NAME = "checkpoint.pt"
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
)
"""What PyTorch's restricted unpickler has been seen to raise on files that are not checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued; the message says why."""


@dataclass
class TrainState:
    """A run's state after ``step`` steps. Noise and data order are functions of (seed, step)."""

    config: TrainConfig
    precision: str
    step: int
    images_seen: int
    seconds: float
    skipped_steps: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor]
    average_updates: int
    data_sha256: str = ""
    """Hash of the training images and labels; empty in checkpoints that were written without it."""
    started_from: str = ""
    """Id of the model whose weights the run began with; empty where it began with new ones."""
    skipped_in_a_row: int = 0
    """Steps up to this one, without a break, that were skipped; 0 in checkpoints that were written without it."""


class _File(io.BufferedWriter):
    """A file that remembers what it was refused with: PyTorch's archives then end with a ``RuntimeError`` of their own,
    about a position in the file."""

    refusal: OSError | None = None

    def write(self, buffer: Any, /) -> int:
        try:
            return super().write(buffer)
        except OSError as error:
            self.refusal = error
            raise


def save_checkpoint(directory: Path, state: TrainState) -> None:
    """Write the checkpoint so that a crash leaves either the old or the new one, never half of one.

    Raises :class:`CheckpointError` where the disk cannot take it; the last one stays.
    """
    path, part = directory / FILE_NAME, directory / f"{FILE_NAME}.part"
    content = {**vars(state), "config": state.config.to_dict()}
    refusal: OSError | None = None
    try:
        with _File(io.FileIO(part, "wb")) as file:
            try:
                torch.save(content, file)
            finally:
                refusal = file.refusal
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        why = error if isinstance(error, OSError) else refusal
        if why is None:
            raise
        last = "; the last one is kept" if path.is_file() else ""
        raise CheckpointError(f"{path}: step {state.step} cannot be written: {why}{last}") from error
    finally:
        # A full disk would stay full by it.
        part.unlink(missing_ok=True)


def load_checkpoint(directory: Path) -> TrainState | None:
    """The run's checkpoint, or ``None`` when it has none; :class:`CheckpointError` when damaged."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        with warnings.catch_warnings():
            # torch warns about other pickle protocols before it fails on them.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        # PyTorch's own text is many lines of advice about trusting pickles.
        raise CheckpointError(f"{path}: cannot be continued: damaged, or not a checkpoint of this program") from error
    try:
        return TrainState(**{**content, "config": TrainConfig.from_dict(content["config"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be continued: {error}") from error


def check_space(directory: Path, module: nn.Module, codec: nn.Module | None = None) -> None:
    """Refuse a run whose files its disk cannot hold; raises ``ValueError`` that says how much they take.

    A checkpoint has four copies of the weights (their average, and two of AdamW's; Muon has one of its own), and is
    written beside the last one; the bundle has one, and one of the codec's, and is written beside the last one too.
    What a run that is continued has of them takes its room already.
    """
    weights, codec_weights = _size(module), 0 if codec is None else _size(codec)
    last, part = (directory / name for name in (FILE_NAME, f"{FILE_NAME}.part"))
    there = 4 * weights * last.is_file() + (part.stat().st_size if part.is_file() else 0)
    check_room(directory, 2 * 4 * weights + 2 * (weights + codec_weights) - there, "checkpoints and the bundle")


def check_room(directory: Path, need: int, what: str) -> None:
    """Refuse a directory on a disk without so many bytes; raises ``ValueError`` that names what they are for."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise ValueError(
            f"out: {directory} has {free / 2**20:,.1f} MiB free, allowed is at least {need / 2**20:,.1f} MiB for {what}"
        )


def _size(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def data_fingerprint(images: Images) -> str:
    """SHA-256 of images and labels: the position in the data means something only in the same data.

    Of latents it is that of what they were made of: their own last digits are others on another device.
    """
    content = images.pixels if images.digests is None else images.digests
    digest = hashlib.sha256(repr(content.shape).encode())
    digest.update(np.ascontiguousarray(content).data)
    digest.update(np.ascontiguousarray(images.labels).data)
    return digest.hexdigest()


def check_continues(
    directory: Path, state: TrainState, config: TrainConfig, data_sha256: str, started_from: str = ""
) -> None:
    """Refuse to continue a checkpoint as another run; raises :class:`CheckpointError` that says what differs.

    What the weights' training does not depend on may change (name, sampling recommendation, execution), and a
    run may be made longer or shorter.
    """
    free = ("name", "about", "provenance", "sampling.", "execution.", "optimization.epochs")
    ours, theirs = _flatten(config.to_dict()), _flatten(state.config.to_dict())
    changes = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not key.startswith(free)
    ]
    advice = "continue it with its own configuration and data, or choose another --out"
    if changes:
        raise CheckpointError(f"{directory}: holds a run with another {', '.join(changes)}; {advice}")
    if state.data_sha256 not in ("", data_sha256):
        raise CheckpointError(f"{directory}: holds a run on other training images; {advice}")
    if state.started_from != started_from:
        there, here = (
            f"from {model_id}" if model_id else "from new weights" for model_id in (state.started_from, started_from)
        )
        raise CheckpointError(f"{directory}: holds a run {there}, and not {here}; {advice}")


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
