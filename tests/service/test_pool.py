"""The pool of workers: devices, threads, what it does with workers that die or never start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from service.jobs import EXIT_STUCK, EXIT_UNUSABLE
from service.pool import FIRST_DELAY, Pool, available_cores, find_devices, reason_of
from service.settings import ComputeSettings
from tests.service.processes import PATIENCE, runs

pytestmark = pytest.mark.anyio


class Scripted(Pool):
    """A pool whose workers are small programs of one line each, by device."""

    def __init__(self, programs: list[str], threads: int = 0, **options: object) -> None:
        device = ",".join(f"d{i}" for i in range(len(programs)))
        super().__init__(ComputeSettings(device=device, threads=threads), ("--socket", "s"), **options)  # type: ignore[arg-type]
        self.programs = programs
        self.commands: list[list[str]] = []

    def _command(self, index: int, worker_id: str, device: str) -> list[str]:
        self.commands.append(super()._command(index, worker_id, device))
        return [sys.executable, "-c", textwrap.dedent(self.programs[index])]

    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [process.pid for process in self._processes.values() if process.returncode is None]


async def until(condition: object) -> None:
    """Let the loop run until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


SLEEP = "import time; time.sleep(1000)"


@pytest.mark.parametrize(
    ("setting", "devices"), [("cpu", ["cpu"]), ("cuda:0, cuda:1", ["cuda:0", "cuda:1"]), ("cpu,cpu", ["cpu", "cpu"])]
)
async def test_devices_are_as_named(setting: str, devices: list[str]) -> None:
    assert await find_devices(setting) == devices


async def test_cores_are_divided_and_children_hear_of_it(tmp_path: Path) -> None:
    """In the environment too: torch makes its threads before anybody can tell it how many."""
    program = f"import os; open('{tmp_path}/' + str(os.getpid()), 'w').write(os.environ['OMP_NUM_THREADS']); {SLEEP}"
    pool = Scripted([program] * 3, metrics_port=9000)
    await pool.start()

    def told() -> list[str]:
        return [text for path in tmp_path.iterdir() if (text := path.read_text())]

    await until(lambda: len(told()) == 3)
    await pool.stop()
    share = str(max(1, available_cores() // 3))
    assert told() == [share] * 3
    for index, command in enumerate(pool.commands):
        assert command[command.index("--threads") + 1] == share
        assert command[command.index("--metrics-port") + 1] == str(9000 + index)
        assert command[command.index("--device") + 1] == f"d{index}"


async def test_a_dead_worker_is_buried_and_replaced_by_another_one() -> None:
    buried: list[str] = []
    pool = Scripted([SLEEP, SLEEP], name="host", buried=buried.append)
    await pool.start()
    await until(lambda: len(pool.pids()) == 2)
    before = pool.pids()
    os.kill(before[0], signal.SIGKILL)
    await until(lambda: pool.restarts == 1 and len(pool.pids()) == 2)
    assert len(set(pool.pids()) & set(before)) == 1
    ids = [command[command.index("--id") + 1] for command in pool.commands]
    assert ids == ["host-0", "host-1", "host-0"]
    assert buried == ["host-0"]
    assert not pool.unusable
    left = pool.pids()
    await pool.stop()
    assert not any(map(runs, left))


async def test_only_when_no_worker_can_start_there_is_no_hope() -> None:
    """One device that is broken does not keep the others from working, and is tried again, ever more seldom."""
    unusable = f"raise SystemExit({EXIT_UNUSABLE})"
    pool = Scripted([unusable, SLEEP])
    await pool.start()
    await until(lambda: pool.restarts == 2)
    assert not pool.unusable
    await pool.stop()
    pool = Scripted([unusable, unusable])
    await pool.start()
    async with asyncio.timeout(PATIENCE):
        await pool.wait_unusable()
    await pool.stop()
    assert pool.unusable


async def test_restarts_back_off() -> None:
    """A worker that dies at once is started after a delay that doubles."""
    pool, loop = Scripted(["raise SystemExit(1)"]), asyncio.get_running_loop()
    start = loop.time()
    await pool.start()
    await until(lambda: pool.restarts == 3)
    assert loop.time() - start >= FIRST_DELAY * (1 + 2 + 4)
    await pool.stop()


async def test_one_that_fails_after_a_long_load_backs_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what has served for long is known to be sound."""
    monkeypatch.setattr("service.pool.STABLE_SECONDS", 0.0)
    pool, loop = Scripted([f"raise SystemExit({EXIT_UNUSABLE})", SLEEP]), asyncio.get_running_loop()
    start = loop.time()
    await pool.start()
    await until(lambda: pool.restarts == 3)
    assert loop.time() - start >= FIRST_DELAY * (1 + 2 + 4)
    await pool.stop()


async def test_a_worker_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("service.pool.STOP_SECONDS", 0.1)
    ready = tmp_path / "ready"
    pool = Scripted(
        [f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('{ready}', 'w'); {SLEEP}"]
    )
    await pool.start()
    await until(ready.exists)
    [pid] = pool.pids()
    await pool.stop()
    assert not runs(pid)


async def test_workers_notice_the_end_of_their_pool(tmp_path: Path) -> None:
    """Their standard input is a pipe whose other end only the pool has."""
    target = tmp_path / "end"
    pool = Scripted([f"import sys; sys.stdin.read(); open('{target}', 'w')"])
    await pool.start()
    await until(lambda: len(pool.pids()) == 1)
    await asyncio.sleep(0.2)
    assert not target.exists()
    stdin = next(iter(pool._processes.values())).stdin
    assert stdin is not None
    stdin.close()
    await until(target.exists)
    await pool.stop()


def test_an_exit_status_is_explained() -> None:
    assert reason_of(-9) == "was killed by signal 9"
    assert "could not start" in reason_of(EXIT_UNUSABLE)
    assert "stuck" in reason_of(EXIT_STUCK)
    assert reason_of(17) == "ended with status 17"
