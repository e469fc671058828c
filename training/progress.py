"""What a person sees of a run: a progress bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from training.duration import duration
from training.trainer import StepReport

SECONDS_PER_LINE = 30.0
SMOOTHED_STEPS = 50


class ProgressDisplay:
    """Shows loss, bits/dim, images/s and time left, each a mean over the last steps.

    On a terminal as a bar that updates in place, otherwise as one line every ``seconds_per_line``.
    """

    def __init__(
        self,
        console: Console,
        *,
        resumed_step: int,
        total_steps: int,
        batch_size: int,
        seconds_per_line: float = SECONDS_PER_LINE,
    ) -> None:
        self._console, self._batch_size = console, batch_size
        self._recent: deque[StepReport] = deque(maxlen=SMOOTHED_STEPS)
        self._seconds_per_line = seconds_per_line
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total_steps, completed=resumed_step)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, report: StepReport) -> None:
        """Show one more step."""
        self._recent.append(report)
        if self._bar:
            self._bar.update(self._task, completed=report.step, description=self.figures())
            return
        is_first_or_last = len(self._recent) == 1 or report.step == report.total_steps
        if is_first_or_last or time.monotonic() - self._last_line >= self._seconds_per_line:
            self._last_line = time.monotonic()
            self.note(f"step {report.step}/{report.total_steps}  {self.figures()}")

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def figures(self) -> str:
        """The figures of the last steps in one line."""
        recent, last = self._recent, self._recent[-1]
        loss = sum(report.loss for report in recent) / len(recent)
        bits = sum(report.bits_per_dim for report in recent) / len(recent)
        # Seconds per image add up where images per second do not.
        rate = len(recent) / sum(1 / report.images_per_second for report in recent)
        left = (last.total_steps - last.step) * self._batch_size / rate
        label_nats = [report.label_nats for report in recent if report.label_nats is not None]
        label = f"{sum(label_nats) / len(label_nats):.3f} nats of label  " if label_nats else ""
        skipped = f"  {last.skipped_steps} steps skipped" if last.skipped_steps else ""
        return (
            f"epoch {last.epoch:.2f}  loss {loss:.4f}  {bits:.3f} bits/dim  {label}{rate:.0f} images/s  "
            f"{duration(left)} left{skipped}"
        )
