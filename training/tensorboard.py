"""The run's curves and pictures for TensorBoard, beside ``log.jsonl``, which every run has."""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from training.log import STEPS_PER_LINE
from training.trainer import StepReport

DIRECTORY = "tensorboard"
PARTS = {
    "loss": "training/loss",
    "bits_per_dim": "training/bits_per_dim",
    "label_nats": "training/label_nats",
    "grad_norm": "optimization/grad_norm",
    "learning_rate": "optimization/learning_rate",
    "skipped_steps": "optimization/skipped_steps",
    "epoch": "progress/epoch",
    "images_per_second": "progress/images_per_second",
}
"""Where a figure of a step stands; those that are not here are TensorBoard's own axes."""


class TensorBoardMissing(ValueError):
    """The package that writes the files is not installed."""

    def __init__(self) -> None:
        super().__init__("--tensorboard needs the package tensorboard: pip install 'tarflow[tensorboard]'")


class TensorBoard:
    """Writes every tenth step, as the log does, and each grid of samples.

    What a resumed run repeats is shown once: its first event says from which step on earlier ones no longer count.
    """

    def __init__(self, directory: Path, resumed_step: int, configuration: str) -> None:
        """``configuration`` is shown as text; raises :class:`TensorBoardMissing`."""
        self._writer = _writer(directory, resumed_step + 1)
        self._writer.add_text("configuration", f"```yaml\n{configuration}\n```", resumed_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def record(self, report: StepReport) -> None:
        """Write the figures of a step that is due; those that are not finite have no point on a curve."""
        if report.step % STEPS_PER_LINE and report.step != report.total_steps:
            return
        for name, value in asdict(report).items():
            if name in PARTS and value is not None and math.isfinite(value):
                self._writer.add_scalar(PARTS[name], value, report.step)

    def show(self, png: bytes, step: int) -> None:
        """Write a grid of samples."""
        with Image.open(io.BytesIO(png)) as image:
            pixels = np.asarray(image)
        self._writer.add_image("samples", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")


def check_installed() -> None:
    """Raise :class:`TensorBoardMissing` now rather than when the first step is due."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise TensorBoardMissing from error


def _writer(directory: Path, purge_step: int) -> Any:
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=purge_step)
