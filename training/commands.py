"""What all commands share: how they fail, where they run, and the bar that shows how far they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]


class ToldElsewhere(ValueError):
    """Another process of the run says why it ends: this one does so without a word."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """End the command with one red line and status 2 for what its user can mend, 1 for a diverged run.

    Everything that data, checkpoints, presets and bundles are refused with is a ``ValueError``.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, ToldElsewhere):
            raise typer.Exit(2) from error
        _fail(str(error), 2)
    except RuntimeError as error:
        from training.trainer import TrainingDiverged

        if not isinstance(error, TrainingDiverged):
            raise
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    Console(stderr=True).print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)


def progress_bar() -> Progress:
    """A bar on a terminal's stderr, so that stdout holds the results alone."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def show_progress(progress: Progress, task: TaskID, done: int, total: int) -> None:
    """Tell a bar's task how much is done."""
    progress.update(task, completed=done, total=total)
