"""Ending tasks for certain.

Before Python 3.12 ``asyncio.wait_for``, in which redis-py sends, loses a cancellation that comes just as it ends
(https://github.com/python/cpython/issues/86296): the task goes on as if nobody had asked it to stop.
"""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_SECONDS = 0.5
"""After so long a cancellation is taken for lost; long enough for what a task does on its way out."""


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and return when nothing does; what it has come to is not told.

    To be canceled itself does not make it leave earlier, only cancel the tasks once more.
    """
    canceled: asyncio.CancelledError | None = None
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=AGAIN_SECONDS)
        except asyncio.CancelledError as error:
            canceled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it as forgotten
    if canceled is not None:
        raise canceled
