"""What outlives a process: where it is kept, and for files, that they belong to one service at a time.

Two services would work on, and delete, the same unfinished work:

    STATE/service.lock   locked while a service runs; holds its process id
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.calibrations import CalibrationFiles
from service.pending import PendingStore

log = logging.getLogger(__name__)
LOCK = "service.lock"
"""It stays when the service ends: removing it would let two processes lock two files of this name."""


@dataclass(frozen=True)
class State:
    """Where an app keeps what its users gave it: :mod:`service.stores` has the kinds."""

    calibrations: CalibrationFiles
    pending: PendingStore
    spool: Path
    """Directory of uploads while they are read; nothing in it outlives a request."""


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Have a state directory for oneself; raises ``ValueError`` naming the flag when another service has it.

    The kernel frees it with the process, however that ends. In a directory that cannot be written there is nothing to
    guard: the service runs, and refuses where it would have to keep something.
    """
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Appending: what another process wrote is to be read when the lock is not to be had.
            file = stack.enter_context((directory / LOCK).open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise ValueError(
                f"state: {directory} is used by another service (process {holder}); give this one a directory of its "
                "own with --state (TARFLOW_STATE), or stop the other"
            ) from None
        except OSError as error:
            log.warning(
                "state: %s cannot be locked (%s); if it can be written, see that no other service uses it",
                directory,
                error.strerror,
            )
        yield
