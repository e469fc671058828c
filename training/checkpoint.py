"""Checkpoints of a run: everything needed to continue exactly, written atomically."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import TrainConfig

FILE_NAME = "checkpoint.pt"


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


def save_checkpoint(directory: Path, state: TrainState) -> None:
    """Write the checkpoint so that a crash leaves either the old or the new one, never half of one."""
    path, part = directory / FILE_NAME, directory / f"{FILE_NAME}.part"
    content = {**vars(state), "config": state.config.to_dict()}
    with part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_checkpoint(directory: Path) -> TrainState | None:
    """The run's checkpoint, or ``None`` when it has none; :class:`CheckpointError` when damaged."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return TrainState(**{**content, "config": TrainConfig.from_dict(content["config"])})
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be continued: {error}") from error
