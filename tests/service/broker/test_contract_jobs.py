"""What every broker tells of its jobs: where they stand, what came of them, what happened on the way."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from service.broker.base import Event, Terms
from service.errors import Canceled, InternalError, NotFound
from service.jobs import JobState, Op
from tests.service.broker.conftest import Bench, held, job, result

pytestmark = pytest.mark.anyio
LONG_ENOUGH = 60.0
DETACHED = Terms(caller="a", detached=True, keep_seconds=60)


async def told(bench: Bench, job_id: str, after: str | None = None) -> list[Event]:
    """All events of a job that has ended."""
    async with asyncio.timeout(LONG_ENOUGH):
        return [event async for event in bench.broker.events(job_id, after)]


async def gone(bench: Bench, job_id: str) -> None:
    """Waits until a job is forgotten."""
    async with asyncio.timeout(LONG_ENOUGH):
        while True:
            await bench.sweep()
            try:
                await bench.broker.status(job_id)
            except NotFound:
                return
            await asyncio.sleep(0.005)


async def test_a_job_can_be_followed_from_afar(bench: Bench) -> None:
    worker, broker = await bench.worker(), bench.broker
    for name in "ab":
        await broker.submit(job(name, rows=3), DETACHED)
    waits = await broker.status("b")
    assert (waits.id, waits.op, waits.model, waits.caller, waits.rows) == ("b", Op.SAMPLE, "m", "a", 3)
    assert (waits.state, waits.attempt, waits.progress, waits.position) == (JobState.QUEUED, 1, 0.0, 1)
    assert abs(waits.created - time.time()) < LONG_ENOUGH
    assert (waits.started, waits.ended, waits.expires, waits.error) == (None, None, None, None)
    assert await broker.result("b") is None
    [got] = await worker.claim(max_rows=1)
    await worker.heartbeat(held(got, fraction=0.25, block=1))
    runs = await broker.status("a")
    assert (runs.state, runs.progress, runs.position) == (JobState.RUNNING, 0.25, None)
    assert runs.started is not None
    assert runs.created <= runs.started
    assert (await broker.status("b")).position == 0
    await worker.complete(got, result(7.0))
    ended = await broker.status("a")
    assert (ended.state, ended.progress, ended.error) == (JobState.COMPLETED, 1.0, None)
    assert ended.ended is not None
    assert ended.expires == pytest.approx(ended.ended + 60, abs=0.01)
    for _ in range(2):
        done = await broker.result("a")
        assert done is not None
        assert (done.arrays["value"][0], done.inference_seconds) == (7.0, 0.5)
        assert done.queue_seconds >= 0


async def test_failures_are_told(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"), DETACHED)
    await bench.broker.submit(job("b"), DETACHED)
    [got] = await worker.claim(max_rows=1)
    await worker.fail(got, InternalError("too bad", code="bad", param="p"))
    assert await bench.broker.cancel("b")
    for name, kind, state in (("a", InternalError, JobState.FAILED), ("b", Canceled, JobState.CANCELED)):
        status = await bench.broker.status(name)
        assert (status.state, type(status.error)) == (state, kind)
        with pytest.raises(kind):
            await bench.broker.result(name)
        assert not await bench.broker.cancel(name)
    error = (await bench.broker.status("a")).error
    assert error is not None
    assert (error.message, error.code, error.param) == ("too bad", "bad", "p")


async def test_unknown_jobs_are_not_found(bench: Bench) -> None:
    for ask in (bench.broker.status("x"), bench.broker.result("x"), bench.broker.wait("x", 1), told(bench, "x")):
        with pytest.raises(NotFound, match="'x'"):
            await ask
    assert not await bench.broker.cancel("x")


async def test_only_detached_jobs_have_events(bench: Bench) -> None:
    await bench.worker()
    await bench.broker.submit(job("a"))
    with pytest.raises(NotFound, match="'a'"):
        await told(bench, "a")
    with pytest.raises(NotFound):
        await bench.broker.status("")


@pytest.mark.parametrize("after", ["", "x", "-1", "9" * 30, "9" * 30 + "-0", "\u0661", "\u0661-\u0661", "1" * 5000])
async def test_an_id_that_no_event_can_have_hides_none(bench: Bench, after: str) -> None:
    await bench.worker()
    await bench.broker.submit(job("a"), Terms(detached=True))
    await bench.broker.cancel("a")
    assert [event.kind async for event in bench.broker.events("a", after)] == ["queued", "canceled"]


async def test_results_are_forgotten_in_time(bench: Bench) -> None:
    worker = await bench.worker()
    terms = Terms(detached=True, keep_seconds=0.2, idempotency_key="k", caller="a")
    await bench.broker.submit(job("a"), terms)
    [got] = await worker.claim()
    await worker.complete(got, result())
    assert await bench.broker.result("a") is not None
    await asyncio.sleep(0.3)
    await bench.sweep()
    with pytest.raises(NotFound):
        await bench.broker.status("a")
    assert await bench.broker.jobs("a") == []
    assert not (await bench.broker.submit(job("b"), terms)).repeated


async def test_an_answered_job_is_forgotten(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"))
    [got] = await worker.claim()
    await worker.complete(got, result())
    await bench.broker.wait("a", LONG_ENOUGH)
    with pytest.raises(NotFound):
        await bench.broker.wait("a", LONG_ENOUGH)


async def test_callers_see_their_own_detached_jobs(bench: Bench) -> None:
    await bench.worker()
    for name in ("1", "2", "3"):
        await bench.broker.submit(job(name), DETACHED)
        await asyncio.sleep(0.005)
    await bench.broker.submit(job("other"), Terms(caller="b", detached=True))
    await bench.broker.submit(job("attached"), Terms(caller="a"))
    assert [status.id for status in await bench.broker.jobs("a")] == ["3", "2", "1"]
    assert [status.id for status in await bench.broker.jobs("a", limit=2)] == ["3", "2"]
    assert [status.id for status in await bench.broker.jobs("b")] == ["other"]
    assert await bench.broker.jobs("nobody") == []


async def test_jobs_that_are_gone_hide_none_that_live(bench: Bench) -> None:
    await bench.worker()
    await bench.broker.submit(job("oldest"), DETACHED)
    for number in range(150):
        if number == 75:
            await bench.broker.submit(job("middle"), DETACHED)
        await bench.broker.submit(job(f"short-{number}"), replace(DETACHED, keep_seconds=0.01))
        await bench.broker.cancel(f"short-{number}")
    await gone(bench, "short-149")
    assert [status.id for status in await bench.broker.jobs("a", limit=1)] == ["middle"]
    assert [status.id for status in await bench.broker.jobs("a", limit=3)] == ["middle", "oldest"]


async def test_each_job_is_forgotten_in_its_own_time(bench: Bench) -> None:
    worker, broker = await bench.worker(), bench.broker
    for name, keep in (("long", 3600), ("short", 0.01), ("waits", 0.01)):
        await broker.submit(job(name), replace(DETACHED, keep_seconds=keep))
    for got in await worker.claim(max_rows=2):
        await worker.complete(got, result())
    await gone(bench, "short")
    # Neither what is kept for longer nor what has not ended goes along.
    assert [status.id for status in await broker.jobs("a")] == ["waits", "long"]
    stats = await broker.stats()
    assert (stats.waiting.get(Op.SAMPLE, 0), stats.running.get(Op.SAMPLE, 0)) == (1, 0)
    await worker.claim()
    stats = await broker.stats()
    assert (stats.waiting.get(Op.SAMPLE, 0), stats.running.get(Op.SAMPLE, 0)) == (0, 1)


async def test_events_tell_the_whole_story(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"), DETACHED)
    [got] = await worker.claim()
    for fraction, block in ((0.1, 0), (0.2, 0), (0.5, 1)):
        await worker.heartbeat(held(got, fraction=fraction, block=block))
    await worker.publish(got, "preview", {"block": 1, "pixels": np.arange(4, dtype=np.uint8)})
    await worker.release(got)
    [got] = await worker.claim()
    await worker.complete(got, result())
    events = await told(bench, "a")
    assert [event.kind for event in events] == [
        *("queued", "started", "progress", "progress", "preview", "requeued", "started", "completed")
    ]
    assert dict(events[2].data) == {"fraction": 0.1, "block": 0}
    assert events[4].data["pixels"].tolist() == [0, 1, 2, 3]
    assert [event.final for event in events] == [False] * 7 + [True]
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert abs(events[0].time - time.time()) < LONG_ENOUGH
    # What was seen is not told again.
    for number, event in enumerate(events):
        assert [e.id for e in await told(bench, "a", event.id)] == [e.id for e in events[number + 1 :]]


async def test_the_last_event_says_what_went_wrong(bench: Bench) -> None:
    worker = await bench.worker()
    for name in "ab":
        await bench.broker.submit(job(name), DETACHED)
    [got] = await worker.claim(max_rows=1)
    await worker.fail(got, InternalError("too bad", code="bad"))
    await bench.broker.cancel("b")
    last = (await told(bench, "a"))[-1]
    assert (last.kind, last.data["message"], last.data["code"]) == ("failed", "too bad", "bad")
    assert (await told(bench, "b"))[-1].kind == "canceled"


async def test_events_arrive_while_they_happen(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"), DETACHED)
    followers = [asyncio.create_task(told(bench, "a")) for _ in range(2)]
    await asyncio.sleep(0.05)
    [got] = await worker.claim()
    await asyncio.sleep(0.05)
    assert not any(follower.done() for follower in followers)
    await worker.complete(got, result())
    for events in await asyncio.gather(*followers):
        assert [event.kind for event in events] == ["queued", "started", "completed"]


async def test_only_the_owner_adds_events(bench: Bench) -> None:
    broker = await bench.open(lease_seconds=0.05)
    stale, fresh = await bench.worker("w1"), await bench.worker("w2")
    await broker.submit(job("a"), DETACHED)
    [lost] = await stale.claim()
    await asyncio.sleep(0.1)
    await bench.sweep()
    [got] = await fresh.claim()
    await stale.publish(lost, "preview", {"block": 1})
    await fresh.complete(got, result())
    await fresh.publish(got, "preview", {"block": 1})
    events = await told(bench, "a")
    assert [event.kind for event in events] == ["queued", "started", "requeued", "started", "completed"]
    assert events[2].data["attempt"] == 2


async def test_a_detached_job_can_be_waited_for(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"), DETACHED)
    waiting = [asyncio.create_task(bench.broker.wait("a", LONG_ENOUGH)) for _ in range(2)]
    await asyncio.sleep(0.02)
    [got] = await worker.claim()
    await worker.complete(got, result(5.0))
    for done in await asyncio.gather(*waiting):
        assert done.arrays["value"][0] == 5.0
    assert (await bench.broker.wait("a", LONG_ENOUGH)).arrays["value"][0] == 5.0


async def test_what_an_answer_is_made_of_is_kept_with_its_job(bench: Bench) -> None:
    worker, broker = await bench.worker(), bench.broker
    recipe = bytes(range(256)) * 5000
    terms = Terms(caller="a", detached=True, keep_seconds=60, recipe=recipe, idempotency_key="k", fingerprint="f")
    await broker.submit(job("a"), terms)
    assert await broker.recipe("a") == recipe
    # A repetition's own recipe is no concern of the first one's job.
    assert (await broker.submit(job("b"), replace(terms, recipe=b"other"))).job_id == "a"
    [got] = await worker.claim()
    await worker.release(got)
    [got] = await worker.claim()
    await worker.complete(got, result())
    assert await broker.recipe("a") == recipe
    await broker.submit(job("plain"), DETACHED)
    assert await broker.recipe("plain") == b""
    with pytest.raises(NotFound, match="'x'"):
        await broker.recipe("x")


async def test_a_recipe_is_forgotten_with_its_job(bench: Bench) -> None:
    await bench.worker()
    await bench.broker.submit(job("a"), Terms(detached=True, keep_seconds=0.05, recipe=b"r"))
    await bench.broker.cancel("a")
    await gone(bench, "a")
    with pytest.raises(NotFound):
        await bench.broker.recipe("a")


async def test_who_follows_may_stop_at_any_event(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"), DETACHED)
    async with aclosing(bench.broker.events("a")) as events:
        assert (await anext(events)).kind == "queued"
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    [got] = await worker.claim()
    await worker.complete(got, result())
    assert [event.kind for event in await told(bench, "a")] == ["queued", "started", "completed"]
