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


LESS_MEMORY = (
    "less is needed with a smaller --batch-size; to train, also with accumulation, recompute or, on several GPUs, shard"
)


@contextmanager
def clear_errors() -> Iterator[None]:
    """End the command with one red line and status 2 for what its user can mend, 1 for a diverged run or too little
    memory.

    Everything that data, checkpoints, presets and bundles are refused with is a ``ValueError``.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, ToldElsewhere):
            raise typer.Exit(2) from error
        _fail(str(error), 2)
    except (RuntimeError, MemoryError) as error:
        from model.device import is_out_of_memory
        from training.trainer import TrainingDiverged

        if is_out_of_memory(error):
            _fail(f"{str(error).splitlines()[0] if str(error) else 'the memory is used up'}; {LESS_MEMORY}", 1)
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
