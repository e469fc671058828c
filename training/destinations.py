"""Where commands write: refused before hours of work, and not after them; and by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.config import check

LOCK = ".lock"
"""File in a run's directory that the process which trains into it holds a lock on; the system lets go when it ends."""


def check_directory(field: str, path: Path) -> None:
    """Refuse what is no directory and cannot become one; raises ``ValueError`` that names the field and the path."""
    _check_place(field, path, path, "a directory, or the path of a new one")


def check_file(field: str, path: Path) -> None:
    """Refuse what is no file and cannot become one, as :func:`check_directory` does."""
    allowed = "a file, which is replaced, or the path of a new one"
    check(not path.is_dir(), field, str(path), allowed)
    if path.exists():
        check(os.access(path, os.W_OK), field, str(path), "one that can be written")
    else:
        _check_place(field, path, path.parent, allowed)


def _check_place(field: str, path: Path, directory: Path, allowed: str) -> None:
    # The directory, or the nearest one above it that there is: the others are made.
    there = next(above for above in (directory, *directory.absolute().parents) if above.exists())
    check(there.is_dir(), field, str(path), allowed if there == path else f"{allowed}; {there} is a file")
    check(os.access(there, os.W_OK | os.X_OK), field, str(path), f"one that can be written; {there} cannot")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Train into a directory alone; raises ``ValueError`` where another process does.

    A directory that nothing was written into is gone again at the end.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out: got {out}, which another process is training into, allowed is a directory of its own"
            ) from error
        except OSError:
            pass  # The disk has no locks.
        try:
            yield
        finally:
            # Whatever befell the directory meanwhile, it does not hide how the run ended.
            with suppress(OSError):
                if is_new and [path.name for path in out.iterdir()] == [LOCK]:
                    (out / LOCK).unlink()
                    out.rmdir()
