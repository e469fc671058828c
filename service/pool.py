"""The worker processes of this host: started, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from service.jobs import EXIT_STUCK, EXIT_UNUSABLE
from service.settings import ComputeSettings

log = logging.getLogger(__name__)

FIRST_DELAY = 0.2
LONGEST_DELAY = 5.0
LONGEST_UNUSABLE_DELAY = 30.0
"""Loading is expensive, and what keeps a worker from starting is seldom mended by itself."""
STABLE_SECONDS = 60.0
"""A worker that lived this long starts its successor without the delay that failures have built up."""
STOP_SECONDS = 10.0
"""What a worker that was asked to leave gets beyond its grace period."""
WORKER: tuple[str, ...] = ("service.worker",)
"""Module of the worker process."""
ALL_DEVICES = ("auto", "cuda", "all")
SPINS = "1000"
"""How often a worker's threads look for work before they sleep. They share the cores with whoever answers requests: one
that looks for milliseconds, as is usual, keeps a core from the very thread that it waits for."""
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
    """The devices that the setting names, one worker each; ``auto``, ``all`` and ``cuda`` mean every GPU there is.

    Without any GPU, ``auto`` and ``all`` mean the CPU.
    """
    if setting not in ALL_DEVICES:
        return [name.strip() for name in setting.split(",")]
    if not _has_gpu_node():
        # Without a GPU's device node there is no need to load torch for the answer.
        return [setting if setting == "cuda" else "cpu"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service.worker", "--list-devices", stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await process.communicate()
    return answer.decode().strip().split(",") if process.returncode == 0 else [setting]


def reason_of(status: int) -> str:
    """What a worker's exit status means."""
    if status < 0:
        return f"was killed by signal {-status}"
    known = {EXIT_UNUSABLE: "could not start", EXIT_STUCK: "ended itself, because its inference loop was stuck"}
    return known.get(status, f"ended with status {status}")


class Pool:
    """Keeps one worker process per device alive. No torch here: devices are the workers' business."""

    def __init__(
        self,
        settings: ComputeSettings,
        connection: Sequence[str],
        *,
        name: str = "worker",
        environment: Mapping[str, str] | None = None,
        grace_seconds: float = 0.0,
        metrics_port: int = 0,
        buried: Callable[[str], None] = lambda _worker_id: None,
    ) -> None:
        """``connection`` are the flags by which a worker finds its broker; ``environment`` is added to its own.

        Of several workers, each has the next ``metrics_port``. Ids are ``name`` with a number; ``buried`` is called in
        a thread with that of a worker that has ended, before another takes its place.
        """
        self._settings, self._connection, self._name = settings, tuple(connection), name
        self._environment = dict(environment or {})
        self._grace_seconds, self._metrics_port, self._buried = grace_seconds, metrics_port, buried
        self._devices: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._unusable: set[int] = set()
        self._served: set[int] = set()
        self._hopeless = asyncio.Event()
        self.restarts = 0

    @property
    def unusable(self) -> bool:
        """Whether no worker could even start for the first time; trying again would not help."""
        return self._hopeless.is_set()

    async def wait_unusable(self) -> None:
        """Return when :attr:`unusable` is true."""
        await self._hopeless.wait()

    async def start(self) -> None:
        """Start the workers and keep them running."""
        self._devices = await find_devices(self._settings.device)
        self._tasks = [asyncio.create_task(self._keep(i, device)) for i, device in enumerate(self._devices)]

    async def stop(self) -> None:
        """End every worker: SIGTERM, and SIGKILL for one that does not leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._stop(p) for p in self._processes.values() if p.returncode is None))

    def kill(self) -> None:
        """End every worker at once; :meth:`stop`, which waits for them, returns."""
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):  # it has just left by itself
            process.terminate()
        try:
            async with asyncio.timeout(self._grace_seconds + STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    @property
    def _threads(self) -> int:
        """With one process that computes, it gets all cores; with several, each its share."""
        return self._settings.threads or max(1, available_cores() // len(self._devices))

    def _command(self, index: int, worker_id: str, device: str) -> list[str]:
        settings = self._settings
        return [
            *(sys.executable, "-m", *WORKER),
            *("--id", worker_id),
            *self._connection,
            *("--models", str(settings.models)),
            *("--model-memory", str(settings.model_memory)),
            *("--device", device),
            *("--threads", str(self._threads)),
            *("--batch-rows", str(settings.batch_rows)),
            *("--batch-wait-ms", str(settings.batch_wait_ms)),
            *("--cohorts", str(settings.cohorts)),
            *("--slice-limit-seconds", str(settings.slice_limit_seconds)),
            *("--grace-seconds", str(self._grace_seconds)),
            *("--metrics-port", str(self._metrics_port and self._metrics_port + index)),
            *("--log-level", settings.log_level),
            *("--log-format", settings.log_format),
            "--supervised",
        ]

    async def _start(self, index: int, worker_id: str, device: str) -> asyncio.subprocess.Process:
        # Torch's pool of threads is as large as this says before anybody can tell it otherwise.
        threads = {"OMP_NUM_THREADS": str(self._threads), "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS)}
        return await asyncio.create_subprocess_exec(
            *self._command(index, worker_id, device),
            env={**os.environ, **self._environment, **threads},
            # Closed by our end, however we end: by it the worker knows.
            stdin=asyncio.subprocess.PIPE,
        )

    async def _keep(self, index: int, device: str) -> None:
        loop = asyncio.get_running_loop()
        worker_id, delay = f"{self._name}-{index}", FIRST_DELAY
        while True:
            started = loop.time()
            try:
                process = await self._start(index, worker_id, device)
            except OSError as error:  # the host is short of memory or processes, for now
                log.error("%s could not be started: %s", worker_id, error, extra={"worker": worker_id})
                await asyncio.sleep(LONGEST_DELAY)
                continue
            self._processes[index] = process
            status = await process.wait()
            if status == EXIT_UNUSABLE and index not in self._served:
                self._unusable.add(index)
                if len(self._unusable) == len(self._devices):
                    self._hopeless.set()
                    return
            if status != EXIT_UNUSABLE:
                self._served.add(index)
                self._unusable.discard(index)
            # One that could not start has just loaded for long.
            if loop.time() - started > STABLE_SECONDS and status != EXIT_UNUSABLE:
                delay = FIRST_DELAY
            message, about = "%s on %s %s; a new one starts in %.1f s", {"worker": worker_id, "device": device}
            log.error(message, worker_id, device, reason_of(status), delay, extra=about)
            await asyncio.gather(asyncio.sleep(delay), asyncio.to_thread(self._buried, worker_id))
            longest = LONGEST_UNUSABLE_DELAY if status == EXIT_UNUSABLE else LONGEST_DELAY
            delay = min(longest, 2 * delay)
            self.restarts += 1
