"""The watchdog ends a process whose inference loop is stuck, and only such a one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from service.jobs import EXIT_STUCK
from tests.service.processes import PATIENCE, environment

LIMIT = 1.0

STUCK = f"""
import time
from service.worker.watchdog import Watchdog

def never_returns():
    time.sleep(1000)

watchdog = Watchdog({LIMIT})
watchdog.start()
watchdog.alive()
never_returns()
"""

BUSY = f"""
import time
from service.worker.watchdog import Watchdog

time.sleep({2 * LIMIT})  # loading
watchdog = Watchdog({LIMIT})
watchdog.start()
print("started", flush=True)
end = time.monotonic() + {4 * LIMIT}
while time.monotonic() < end:
    watchdog.alive()
    time.sleep({LIMIT / 20})
watchdog.stop()
time.sleep({3 * LIMIT})  # what is to be done after the loop
"""

HOLDING = f"""
import ctypes
from service.worker.watchdog import Watchdog

watchdog = Watchdog({LIMIT})
watchdog.start()
ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock
"""


def start(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def test_a_stuck_loop_ends_the_process_and_shows_where_it_is() -> None:
    process = start(STUCK)
    _, shown = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_STUCK, shown
    assert "was not heard for 1 s" in shown
    assert "in never_returns" in shown


def test_even_one_that_keeps_the_interpreter_s_lock() -> None:
    process = start(HOLDING)
    _, shown = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, shown
    assert "Timeout" in shown


def test_a_loop_that_runs_or_has_ended_or_was_stopped_is_left_alone() -> None:
    process = start(BUSY)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    # For longer than the limit, but not so long that the timer without the lock would take it for stuck.
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * LIMIT)
    os.kill(process.pid, signal.SIGCONT)
    _, shown = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, shown
