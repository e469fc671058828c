"""Ends a worker whose inference loop is stuck: in a driver, in a kernel that never returns, in a deadlock.

Such a process cannot be asked to leave, and while it lives it keeps its device. Its leases run out by themselves,
since heartbeats come from the inference loop too; the supervisor starts another worker.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time

from service.jobs import EXIT_STUCK

log = logging.getLogger(__name__)

LOOKS = 20
"""How often the thread looks within the limit."""


class Watchdog:
    """A thread that listens for :meth:`alive`, and ends the process when it was not called for too long."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._heard = 0
        self._heard_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to listen; what is done before, such as loading, may take its time."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more: what is left to do is not the loop's."""
        self._ended.set()
        self._thread.join()

    def alive(self) -> None:
        """The inference loop runs."""
        self._heard += 1
        self._heard_at = time.monotonic()

    def heard_within(self, seconds: float) -> bool:
        """Whether it listens, and was told so lately that the inference loop runs."""
        return self._thread.is_alive() and time.monotonic() - self._heard_at <= seconds

    def _watch(self) -> None:
        period = self._limit / LOOKS
        heard, quiet, before = self._heard, 0.0, time.monotonic()
        while quiet < self._limit:
            # Where not even this thread gets to run, because somebody keeps the interpreter's lock, a timer without
            # need of it ends the process, too, if later.
            faulthandler.dump_traceback_later(2 * self._limit, exit=True)
            if self._ended.wait(period):
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, is not to blame: nobody could be heard meanwhile.
            quiet += min(now - before, 2 * period)
            before = now
            if heard != self._heard:
                heard, quiet = self._heard, 0.0
        log.critical("the inference loop was not heard for %g s; this is where it is stuck", self._limit)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(EXIT_STUCK)
