"""Following a job within the process: what adapters of other APIs build on, and what streams do in silence."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
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
from service.api.jobs.following import Completed, follow
from service.api.jobs.keeping import keep
from service.api.jobs.streaming import EventStream
from service.api.jobs.wishes import Mode, Wishes
from service.api.sampling import prepare_sample
from service.api.schemas import SampleRequest
from service.app import create_app
from service.broker.base import Event, Terms
from service.broker.memory import MemoryBroker
from service.errors import Canceled, InternalError, InvalidRequest, Overloaded
from service.jobs import Job, JobResult, JobState, ModelInfo, WorkerInfo
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


async def test_a_job_is_followed_to_its_result(bench: Bench) -> None:
    prepared = await prepare_sample(bench.context, BODY)
    told: list[Event | Completed] = []
    async with aclosing(follow(bench.context, prepared.job, previews=2)) as events:
        told.append(await anext(events))
        claimed = await bench.claimed()
        assert (claimed.id, claimed.payload["previews"]) == (prepared.job.id, 2)
        pixels = np.ones((1, 1, 16, 16), np.uint8)
        await bench.worker.publish(claimed, "preview", {"block": 1, "blocks": 3, "start": 0, "pixels": pixels})
        await bench.worker.complete(claimed, RESULT)
        told += [event async for event in events]
    assert [event.kind for event in told if isinstance(event, Event)] == ["queued", "started", "preview"]
    preview, last = told[-2], told[-1]
    assert isinstance(preview, Event)
    assert (preview.data["pixels"] == pixels).all()
    assert isinstance(last, Completed)
    assert (last.job_id, last.timing.inference_ms) == (prepared.job.id, 500)
    assert last.result.arrays.keys() == RESULT.arrays.keys()


async def test_without_previews_none_are_asked_for(bench: Bench) -> None:
    prepared = await prepare_sample(bench.context, BODY)
    async with aclosing(follow(bench.context, prepared.job)) as events:
        await anext(events)
        assert "previews" not in (await bench.claimed()).payload


async def test_whoever_stops_following_cancels(bench: Bench) -> None:
    prepared = await prepare_sample(bench.context, BODY)
    async with aclosing(follow(bench.context, prepared.job)) as events:
        await anext(events)
    assert (await bench.broker.status(prepared.job.id)).state is JobState.CANCELED

    async def followed(job: Job) -> None:
        async with aclosing(follow(bench.context, job)) as events:
            async for _ in events:
                pass

    again = (await prepare_sample(bench.context, BODY)).job
    task = asyncio.ensure_future(followed(again))
    claimed = await bench.claimed()
    assert claimed.id == again.id
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert (await bench.broker.status(again.id)).state is JobState.CANCELED


async def test_errors_are_raised(bench: Bench) -> None:
    for error in (InternalError("too bad", code="bad"), Canceled("enough")):
        prepared = await prepare_sample(bench.context, BODY)
        async with aclosing(follow(bench.context, prepared.job)) as events:
            await anext(events)
            await bench.worker.fail(await bench.claimed(), error)
            with pytest.raises(type(error), match=error.message):
                [event async for event in events]
    with pytest.raises(InvalidRequest):
        await prepare_sample(bench.context, SampleRequest(model=NAME, num_images=1000))


async def test_a_refusal_comes_before_the_first_event(bench: Bench) -> None:
    await bench.broker.submit(job("first", cost=1_000_000, model=NAME))
    prepared = await prepare_sample(bench.context, BODY)
    with pytest.raises(Overloaded):
        await anext(follow(bench.context, prepared.job))


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
