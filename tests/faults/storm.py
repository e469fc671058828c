"""Mixed work without end: requests to all replicas, and detached jobs beside them, while a test does its harm."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from model.config import SamplingDefaults, SolverOptions
from service.api.running import new_job
from service.broker.base import Broker, Terms
from service.broker.redis.api import RedisBroker
from service.errors import Overloaded, Unavailable
from service.jobs import FINAL, Job, JobResult, JobState, ModelInfo, Op
from tests.faults.cluster import LIMITS, Cluster
from tests.service.pictures import file, pixels
from tests.service.processes import PATIENCE, ApiProcess, WorkerProcess

MODEL, SIZE = "tiny-cond", 16
OPS = (Op.SCORE, Op.SAMPLE, Op.CLASSIFY, Op.ENCODE)
ROWS = 4
PAUSE = 0.2
"""Until something that was refused is asked for again: impatiently, not as Retry-After says."""
KEEP_SECONDS = 3600.0


def detached_job(model: ModelInfo, number: int, rows: int = ROWS) -> Job:
    """The numbered job as an API process would make it."""
    op = OPS[number % len(OPS)]
    images = np.stack([pixels(SIZE, 3, seed=number + row).transpose(2, 0, 1) for row in range(rows)])
    if model.flow.channels == 1:
        images = images[:, :1]
    payload: dict[str, Any] = {"pixels": images, "label": None, "draws": 2, "seed": number}
    if op is Op.SAMPLE:
        options = SamplingDefaults(guidance_scale=1.0, denoise=True)
        seeds = list(range(number, number + rows))
        solver = SolverOptions(solver="sequential")
        payload = {"seeds": seeds, "label": 1, "options": options.to_dict(), "solver": vars(solver)}
        payload |= {"trajectory": False}
    elif op is Op.ENCODE:
        payload = {"pixels": images, "label": None, "add_noise": True, "seed": number}
    return new_job(model, op, payload, rows)


def terms(number: int) -> Terms:
    """Three callers; a repetition of the submission is the same job."""
    return Terms(
        caller=f"caller-{number % 3}",
        timeout=KEEP_SECONDS,
        keep_seconds=KEEP_SECONDS,
        detached=True,
        idempotency_key=f"storm-{number}",
        fingerprint=str(number),
    )


def arrays_of(job: Job) -> str:
    """The array that a result of the job must have."""
    return {Op.SCORE: "log_likelihood", Op.SAMPLE: "pixels", Op.CLASSIFY: "log_likelihood", Op.ENCODE: "latents"}[
        job.op
    ]


async def submitted(broker: Broker, job: Job, how: Terms, patience: float = PATIENCE) -> str:
    """Submit until it is accepted; returns the job's id."""
    async with asyncio.timeout(patience):
        while True:
            try:
                return (await broker.submit(job, how)).job_id
            except (Overloaded, Unavailable):
                await asyncio.sleep(PAUSE)


async def known(broker: Broker) -> ModelInfo:
    """The tiny model, as soon as a worker serves it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for model in await broker.models():
                if model.name == MODEL:
                    return model
            await asyncio.sleep(PAUSE)


@dataclass
class Ended:
    """What became of the detached jobs, by their final state."""

    states: Counter[JobState] = field(default_factory=Counter)
    requeued: int = 0
    """Attempts beyond the first."""


async def check_ended(broker: Broker, jobs: dict[str, Job]) -> Ended:
    """Each job has ended, with one final event that is its last, and with what that says.

    Whoever asks later sees what whoever listened has seen: one result, none twice.
    """
    ended = Ended()
    for job_id, job in jobs.items():
        async with asyncio.timeout(PATIENCE):
            events = [event async for event in broker.events(job_id)]
        assert [event.final for event in events] == [False] * (len(events) - 1) + [True], events
        status = await broker.status(job_id)
        assert status.state in FINAL
        assert status.state == events[-1].kind
        ended.states[status.state] += 1
        ended.requeued += status.attempt - 1
        if status.state is JobState.COMPLETED:
            first, second = await broker.result(job_id), await broker.result(job_id)
            assert isinstance(first, JobResult)
            assert isinstance(second, JobResult)
            name = arrays_of(job)
            assert len(first.arrays[name]) == job.rows, (job.op, {k: v.shape for k, v in first.arrays.items()})
            np.testing.assert_array_equal(first.arrays[name], second.arrays[name])
        else:
            assert status.error is not None
            assert status.error.code == "worker_lost", status.error
    return ended


class Storm:
    """Clients that insist on their results."""

    def __init__(
        self,
        cluster: Cluster,
        apis: Sequence[ApiProcess],
        allowed: Collection[tuple[int, str]],
        patience: float = PATIENCE,
    ) -> None:
        """``allowed`` are the status and code of every refusal that a client may get; it insists for ``patience``."""
        self.apis, self.allowed, self._patience = apis, set(allowed), patience
        self.broker = RedisBroker(cluster.url, LIMITS)
        self.told: Counter[tuple[int, str]] = Counter()
        self.detached: dict[str, Job] = {}
        self.over = asyncio.Event()
        """Set when the harm is done; before that, there is always more work."""
        self._numbers = itertools.count()
        self._model: ModelInfo | None = None

    async def __aenter__(self) -> Storm:
        await self.broker.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.close()

    async def run(self, jobs: int, clients: int = 8) -> None:
        """Work until so many jobs have been done, and :attr:`over` is set."""
        self._model = await known(self.broker)
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(jobs))

    async def _client(self, jobs: int) -> None:
        async with httpx.AsyncClient(timeout=self._patience) as client:
            while (number := next(self._numbers)) < jobs or not self.over.is_set():
                # Pairs, so that every op comes both ways.
                if number // len(OPS) % 2:
                    await self._detached(number)
                else:
                    await self._answered(client, number)

    async def _detached(self, number: int) -> None:
        assert self._model is not None
        job = detached_job(self._model, number)
        job_id = await submitted(self.broker, job, terms(number), self._patience)
        self.detached[job_id] = job
        async with asyncio.timeout(self._patience):
            async for _ in self.broker.events(job_id):
                pass

    async def _answered(self, client: httpx.AsyncClient, number: int) -> None:
        async with asyncio.timeout(self._patience):
            while True:
                if await self._asked(client, number):
                    return
                await asyncio.sleep(PAUSE)

    async def _asked(self, client: httpx.AsyncClient, number: int) -> bool:
        op = OPS[number % len(OPS)]
        url = f"{self.apis[number % len(self.apis)].url}/v1/{op}"
        if op is Op.SAMPLE:
            body = {"model": MODEL, "class": 1, "seed": number, "num_images": ROWS, "guidance_scale": 1.0}
            answer = await client.post(url, json=body)
        else:
            image = file(pixels(SIZE, 3, seed=number))
            files = [("files", (f"{i}.png", image, "image/png")) for i in range(ROWS)]
            answer = await client.post(url, files=files, data={"model": MODEL, "seed": str(number)})
        code = answer.json()["error"]["code"] if answer.status_code != httpx.codes.OK else ""
        self.told[answer.status_code, code] += 1
        if answer.status_code != httpx.codes.OK:
            assert (answer.status_code, code) in self.allowed, answer.text
            # What was refused at the door may be asked for again; what failed after many attempts has its answer.
            return code == "worker_lost"
        assert len(answer.json()["images"]) == ROWS
        return True


def ready_workers(api: ApiProcess, workers: Sequence[WorkerProcess]) -> dict[str, int]:
    """Process ids of the workers that are ready now, by name."""
    names = {worker["id"] for worker in api.get("/readyz").json().get("workers", [])}
    found: dict[str, int] = {}
    for pid in itertools.chain.from_iterable(worker.children() for worker in workers):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except FileNotFoundError:
            continue
        if "--id" in arguments and (name := arguments[arguments.index("--id") + 1]) in names:
            found[name] = pid
    return found


async def victim(api: ApiProcess, workers: Sequence[WorkerProcess], chance: random.Random) -> int:
    """Any worker that is ready, while there is work."""
    async with asyncio.timeout(PATIENCE):
        while True:
            ready = await asyncio.to_thread(ready_workers, api, workers)
            if ready and await asyncio.to_thread(api.metric, "tarflow_jobs_running"):
                return ready[chance.choice(sorted(ready))]
            await asyncio.sleep(0.1)
