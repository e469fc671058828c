"""The run's log: one JSON object a line in ``log.jsonl``, consistent with the steps that count."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from training.trainer import StepReport

FILE_NAME = "log.jsonl"
STEPS_PER_LINE = 10


class RunLog:
    """Appends every tenth step; lines that a resumed run repeats are cut off first.

    A line depends on its step alone (no averages over steps), so the log of a resumed run equals
    that of an uninterrupted one in everything but the timings.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        path = directory / FILE_NAME
        _cut(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def record(self, report: StepReport) -> None:
        """Write the report if its step is due; numbers that are not finite become null."""
        if report.step % STEPS_PER_LINE and report.step != report.total_steps:
            return
        figures = {key: value for key, value in asdict(report).items() if value is not None}
        content = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The log's lines up to the first one that a crash left incomplete; empty when there is no log."""
    path = directory / FILE_NAME
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def last_epoch_bits_per_dim(directory: Path) -> float | None:
    """Mean training bits/dim over the log's last epoch; ``None`` when nothing is logged."""
    lines = [line for line in read_log(directory) if line["bits_per_dim"] is not None]
    values = [line["bits_per_dim"] for line in lines if line["epoch"] > lines[-1]["epoch"] - 1]
    return sum(values) / len(values) if values else None


def _cut(path: Path, step: int) -> None:
    """Drop the lines beyond ``step``, and whatever follows an incomplete line."""
    if not path.is_file():
        return
    kept = [line for line in read_log(path.parent) if line["step"] <= step]
    part = path.with_name(f"{FILE_NAME}.part")
    part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    part.replace(path)
