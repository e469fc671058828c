"""Streams of a job's events within the process: what they do in silence, and with results that are no part of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import Request

from model.bundle import read_bundle
from service.access.caller import ANYONE
from service.api.context import Context
from service.api.jobs import streaming
from service.api.jobs.keeping import keep
from service.api.jobs.streaming import EventStream
from service.api.jobs.wishes import Mode, Wishes
from service.api.sampling import prepare_sample
from service.api.schemas import SampleRequest
from service.app import create_app
from service.broker.base import Terms
from service.broker.memory import MemoryBroker
from service.jobs import Job, JobResult, ModelInfo, WorkerInfo
from service.settings import Settings
from service.stores.directory import state_in
from tests.service.broker.conftest import AMPLE, LocalWorker, job
from tests.service.events import parsed
from tests.service.processes import PATIENCE

pytestmark = pytest.mark.anyio
NAME = "tiny-cond"
BODY = SampleRequest(model=NAME, seed=1)
RESULT = JobResult(
    arrays={
        "pixels": np.zeros((1, 1, 16, 16), np.uint8),
        "finite": np.ones(1, np.uint8),
        "backward_error": np.full(1, np.nan, np.float32),
        "redone": np.zeros(1, np.uint8),
    },
    inference_seconds=0.5,
)


class Bench:
    """A context of a request whose client stays until it is told to go, and a worker that the test moves."""

    def __init__(self, models: Path, state: Path) -> None:
        info = ModelInfo.of(read_bundle(models / NAME))
        self.broker = MemoryBroker(replace(AMPLE, max_queue_cost=1_000_000))
        self.broker.announce([info])
        self.broker.register(WorkerInfo(id="w", device="cpu", models=(info,)))
        self.worker = LocalWorker(self.broker, "w")
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.app = create_app(Settings(), self.broker, state_in(state))
        deadline = asyncio.get_running_loop().time() + 600
        self.scope = {
            **{"type": "http", "app": self.app, "method": "POST", "path": "/v1/sample", "headers": []},
            "state": {"caller": ANYONE, "deadline": deadline},
        }
        self.context = Context(Request(self.scope, self.receive))

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def text(self) -> str:
        """What was sent of a body."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def claimed(self) -> Job:
        [claimed] = await self.worker.claim(timeout=PATIENCE)
        return claimed

    async def until(self, what: str) -> None:
        """Return when a text was sent."""
        async with asyncio.timeout(PATIENCE):
            while what not in self.text:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def bench(models: Path, tmp_path: Path) -> Bench:
    return Bench(models, tmp_path)


async def test_a_silent_stream_shows_that_it_lives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.001)
    await bench.broker.submit(job("a", model=NAME), Terms(detached=True))
    answering = asyncio.ensure_future(EventStream(bench.context, "a")(bench.scope, bench.receive, bench.send))
    await bench.until(": ping\n\n: ping\n\n")
    await bench.broker.cancel("a")
    await answering
    assert bench.text.count("event: ") == 2
    assert bench.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize("most", [100, 10_000])
async def test_a_large_result_is_left_where_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(streaming, "MOST_RESULT_BYTES", most)
    prepared = await prepare_sample(bench.context, BODY)
    accepted = await keep(bench.context, prepared, Wishes(mode=Mode.ASYNC, asynchronous=True))
    await bench.worker.complete(await bench.claimed(), RESULT)
    await EventStream(bench.context, accepted.job_id)(bench.scope, bench.receive, bench.send)
    last = list(parsed(bench.text.split("\n")))[-1]
    assert (last.kind, last.data["result"] is None) == ("completed", most == 100)
    assert last.data["links"]["self"] == f"/v1/jobs/{accepted.job_id}"


async def test_a_job_of_another_version_says_so(bench: Bench) -> None:
    await bench.broker.submit(job("a", model=NAME), Terms(detached=True, recipe=b"what nobody can read"))
    await bench.worker.complete(await bench.claimed(), RESULT)
    await EventStream(bench.context, "a")(bench.scope, bench.receive, bench.send)
    last = list(parsed(bench.text.split("\n")))[-1]
    assert (last.kind, last.data["result"]) == ("completed", None)
    assert "another version" in last.data["error"]["message"]
