"""The worker processes of this host: started, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from service.jobs import EXIT_UNUSABLE
from service.settings import Settings

log = logging.getLogger(__name__)

FIRST_DELAY = 0.2
LONGEST_DELAY = 5.0
STABLE_SECONDS = 60.0
"""A worker that lived this long starts its successor without the delay that failures have built up."""
STOP_SECONDS = 10.0
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
GPU_NODES = ("nvidia[0-9]*", "dxg", "kfd")
"""Device nodes of NVIDIA, WSL and AMD GPUs."""


def available_cores() -> int:
    """Cores this process may use: its affinity, and in a container its share of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def _has_gpu_node() -> bool:
    return any(True for pattern in GPU_NODES for _ in Path("/dev").glob(pattern))


async def find_devices(setting: str) -> list[str]:
    """The devices that the setting names, one worker each; ``auto`` and ``cuda`` mean every GPU there is."""
    if setting not in ("auto", "cuda"):
        return [name.strip() for name in setting.split(",")]
    if not _has_gpu_node():
        # Without a GPU's device node there is no need to load torch for the answer.
        return ["cpu" if setting == "auto" else setting]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service.worker", "--list-devices", stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await process.communicate()
    return answer.decode().strip().split(",") if process.returncode == 0 else [setting]


async def _stop(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


class Pool:
    """Keeps one worker process per device alive. No torch here: devices are the workers' business."""

    def __init__(self, settings: Settings, socket: Path) -> None:
        self._settings, self._socket = settings, socket
        self._devices: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self.restarts = 0
        self.unusable = False
        """Whether a worker could not even start for the first time; trying again would not help."""

    async def start(self) -> None:
        """Start the workers and keep them running."""
        self._devices = await find_devices(self._settings.device)
        self._tasks = [asyncio.create_task(self._keep(f"worker-{i}", d)) for i, d in enumerate(self._devices)]

    async def stop(self) -> None:
        """End every worker: SIGTERM, and SIGKILL for one that does not leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(_stop(p) for p in self._processes.values() if p.returncode is None))

    def _command(self, worker_id: str, device: str) -> list[str]:
        settings = self._settings
        # With one process that computes, it gets all cores; with several, each its share.
        threads = settings.threads or max(1, available_cores() // len(self._devices))
        return [
            *(sys.executable, "-m", "service.worker"),
            *("--id", worker_id),
            *("--socket", str(self._socket)),
            *("--models", str(settings.models)),
            *("--device", device),
            *("--threads", str(threads)),
            *("--batch-rows", str(settings.batch_rows)),
            *("--cohorts", str(settings.cohorts)),
            *("--log-level", settings.log_level),
        ]

    async def _keep(self, worker_id: str, device: str) -> None:
        loop = asyncio.get_running_loop()
        delay = FIRST_DELAY
        while True:
            started = loop.time()
            try:
                process = await asyncio.create_subprocess_exec(*self._command(worker_id, device))
            except OSError as error:  # the host is short of memory or processes, for now
                log.error("%s could not be started: %s", worker_id, error)
                await asyncio.sleep(LONGEST_DELAY)
                continue
            self._processes[worker_id] = process
            status = await process.wait()
            if status == EXIT_UNUSABLE and self.restarts == 0:
                self.unusable = True
                return
            if loop.time() - started > STABLE_SECONDS:
                delay = FIRST_DELAY
            log.error("%s ended with status %s; a new one starts in %.1f s", worker_id, status, delay)
            await asyncio.sleep(delay)
            delay = min(LONGEST_DELAY, 2 * delay)
            self.restarts += 1
