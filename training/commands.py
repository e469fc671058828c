"""What all commands share: how they fail, where they run, and the bar that shows how far they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Directory for decoded images of folders: later runs, and all processes, map them from there."),
]

STOPPED = 1
"""Status of a command that a signal ended before it was complete, though it keeps everything and the same command
continues: what follows it in a script (``train … && evaluate …``) needs the whole, and a scheduler that counts 0 as
done would never start it again."""
SECONDS_PER_LINE = 30.0


class ToldElsewhere(ValueError):
    """Another process of the run says why it ends: this one does so without a word."""


LESS_MEMORY = (
    "less is needed with a smaller --batch-size; to train, also with accumulation, recompute or, on several GPUs, shard"
)


@contextmanager
def clear_errors() -> Iterator[None]:
    """End the command with one red line and status 2 for what its user can mend, 1 for a diverged run or too little
    memory. (Without such a line it is 1, too, for one that a signal stopped: :data:`STOPPED`.)

    Everything that data, checkpoints, presets and bundles are refused with is a ``ValueError``.
    """
    try:
        yield
    except FileExistsError as error:
        # The system's own words do not say that a directory was wanted.
        _fail(f"{error.filename}: is a file, allowed is a directory, or the path of a new one", 2)
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


class PlainProgress(Progress):
    """The same where there is no terminal: a line on stderr every :data:`SECONDS_PER_LINE`, for whoever reads a log."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._last_line = time.monotonic()

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        """As that of ``Progress``; prints a line where one is due."""
        super().update(task_id, *args, **kwargs)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As that of ``Progress``; prints a line where one is due."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if time.monotonic() - self._last_line < SECONDS_PER_LINE:
            return
        self._last_line = time.monotonic()
        task = self._tasks[task_id]
        # A task of unknown length is told by its description alone.
        count = "" if task.total is None else f": {task.completed:,.0f} of {task.total:,.0f}"
        self.console.print(f"{task.description}{count}", markup=False, highlight=False, soft_wrap=True)


def progress_bar() -> Progress:
    """A bar on a terminal's stderr, lines elsewhere; stdout holds the results alone."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True) if console.is_terminal else PlainProgress(console)


def show_progress(progress: Progress, task: TaskID, done: int, total: int) -> None:
    """Tell a bar's task how much is done."""
    progress.update(task, completed=done, total=total)
