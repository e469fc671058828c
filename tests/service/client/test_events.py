"""Streams of events: complete and in order, whatever becomes of connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing, closing
from typing import Any

import httpx
import pytest

from service.client import ApiError, AsyncClient, Canceled, Client, ConnectionFailed, UnexpectedAnswer
from service.client.events import Parser
from tests.faults.proxy import Proxy, proxied
from tests.service.client.fronts import Act, Front, Held, answer, begin, swallow
from tests.service.events import told
from tests.service.pictures import pixels
from tests.service.processes import PATIENCE, ServerProcess

GREY = pixels(12)
LONG: dict[str, Any] = {"model": "fashion-mnist", "num_images": 16, "seed": 3, "solver": "sequential", "previews": 3}
"""Seconds of work, so that there is time to cut connections."""


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    """A proxy before the session's server."""
    with proxied(httpx.URL(server.url).port or 80) as proxy:
        yield proxy


def replayed(client: httpx.Client, job: str) -> list[tuple[str, str]]:
    """Id and kind of all events of a job that has ended."""
    return [(event.id, event.kind) for event in told(client.get(f"/v1/jobs/{job}/events"))]


def test_a_stream_that_is_cut_is_put_together(client: httpx.Client, proxy: Proxy) -> None:
    heard, cut_at = [], ["queued", "started", "preview", "progress"]
    with Client(f"http://127.0.0.1:{proxy.port}") as through:
        for event in through.sample.stream(**LONG):
            heard.append(event)
            if event.kind in cut_at:
                cut_at.remove(event.kind)
                proxy.cut()
        assert [(event.id, event.kind) for event in heard] == replayed(client, heard[0].job)
        assert not {"queued", "started", "preview"} & set(cut_at)
        assert proxy.cuts >= 1
        assert heard[-1].result().images == through.sample(**{**LONG, "previews": 0}).images


@pytest.mark.anyio
async def test_so_is_one_with_waiting(client: httpx.Client, proxy: Proxy) -> None:
    heard, cut_at = [], ["queued", "started", "preview"]
    async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as through:
        job = await through.sample.submit(**LONG)
        async for event in job.events():
            heard.append(event)
            if event.kind in cut_at:
                cut_at.remove(event.kind)
                proxy.cut()
        assert heard[-1].result() == await job.result()
    assert [(event.id, event.kind) for event in heard] == replayed(client, job.id)
    assert proxy.cuts >= 1


def test_events_say_what_they_are(tarflow: Client) -> None:
    events = list(tarflow.sample.stream(model="tiny-cond", class_="fox", num_images=3, previews=2))
    previews = [event for event in events if event.kind == "preview"]
    assert [event.data["block"] for event in previews] == [1, 2]
    assert [[image.array().shape for image in event.images] for event in previews] == [[(3, 16, 16)] * 3] * 2
    assert all(event.fraction is not None for event in events if event.kind == "progress")
    assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
    with pytest.raises(ValueError, match="'queued'"):
        events[0].result()
    job = tarflow.jobs.get(events[0].job)
    assert [event.id for event in job.events()] == [event.id for event in events]
    assert [event.id for event in job.events(after=events[1].id)] == [event.id for event in events[2:]]
    assert list(job.events(after=events[-1].id)) == []


def test_a_canceled_job_is_told_as_such(tarflow: Client) -> None:
    job = tarflow.sample.submit(num_images=64)
    assert job.cancel().state == "canceled"
    last = list(job.events())[-1]
    assert last.kind == "canceled"
    for raises in (last.result, job.result, lambda: tarflow.jobs.result(job.id)):
        with pytest.raises(Canceled) as caught:
            raises()
        assert caught.value.status == 499


@pytest.mark.anyio
async def test_who_leaves_a_stream_cancels_it(tarflow: Client, waiting: AsyncClient) -> None:
    for event in tarflow.sample.stream(num_images=64):
        if event.kind == "started":
            break
    assert tarflow.jobs.wait(event.job).state == "canceled"
    async with aclosing(waiting.sample.stream(num_images=64)) as events:
        other = await anext(events)
    assert tarflow.jobs.wait(other.job).state == "canceled"


async def canceled_while(held: Held, client: AsyncClient) -> None:
    """Begin a stream, and cancel the task that waits for its first event while its request is held."""
    first = asyncio.ensure_future(anext(client.sample.stream(num_images=64)))
    try:
        assert await asyncio.to_thread(held.is_done.wait, PATIENCE)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    finally:
        held.let_go.set()


@pytest.mark.anyio
async def test_who_leaves_before_the_answer_begins_cancels_it(tarflow: Client, front: Front) -> None:
    """The service has the job, but the client has not heard of it."""
    held = Held(begin)
    front.script = [held, begin]
    async with AsyncClient(front.url) as client:
        await canceled_while(held, client)
    assert [request.method for request in front.requests] == ["POST", "POST", "DELETE"]
    assert front.keys()[0] == front.keys()[1] is not None
    first = front.requests[0].answer
    assert first is not None
    assert tarflow.jobs.wait(first.headers["x-tarflow-job"]).state == "canceled"


@pytest.mark.anyio
async def test_who_leaves_before_the_first_event_cancels_it(front: Front) -> None:
    held = Held(swallow)
    front.script = [part(": none yet\n\n"), held]
    async with AsyncClient(front.url) as client:
        await canceled_while(held, client)
    asked = [(request.method, request.path) for request in front.requests]
    assert asked[0] == ("POST", "/v1/sample")
    assert asked[1:] == [("GET", "/v1/jobs/sample_1/events"), ("DELETE", "/v1/jobs/sample_1")]


@pytest.mark.parametrize("refused", [422, 429])
def test_what_is_refused_is_not_canceled(front: Front, refused: int) -> None:
    front.script = [answer(refused)]
    with Client(front.url, max_retries=0) as client, pytest.raises(ApiError):
        next(client.sample.stream())
    assert [request.method for request in front.requests] == ["POST"]


@pytest.mark.anyio
async def test_a_client_that_is_closed_leaves_its_streams(server: ServerProcess, tarflow: Client) -> None:
    with Client(server.url) as mine:
        events = mine.with_options(max_retries=1).sample.stream(num_images=64)
        event = next(events)
        follows = mine.jobs.events(event.job)
        assert next(follows).job == event.job
    assert tarflow.jobs.wait(event.job).state == "canceled"
    events.close()
    follows.close()
    async with AsyncClient(server.url) as theirs:
        waited = theirs.sample.stream(num_images=64)
        other = await anext(waited)
    assert tarflow.jobs.wait(other.job).state == "canceled"
    await waited.aclose()


def test_who_has_a_key_of_their_own_may_come_back(tarflow: Client) -> None:
    keyed = tarflow.with_options(idempotency_key="a-stream-of-the-client")
    with closing(keyed.sample.stream(num_images=2)) as events:
        event = next(events)
    ids = [each.id for each in keyed.sample.stream(num_images=2)]
    assert ids == [each.id for each in tarflow.jobs.events(event.job)]
    assert tarflow.jobs.wait(event.job).state == "completed"


# Streams that the service sends seldom.

HEADERS = {"content_type": "text/event-stream", "x_tarflow_job": "sample_1"}


def line(kind: str, number: int, **data: object) -> str:
    told = json.dumps({"job": "sample_1", "time": 1, **data})
    return f"event: {kind}\ndata: {told}\nid: {number}\n\n"


def part(*events: str, **more: str) -> Act:
    return answer(200, "".join(events), **HEADERS, **more)


def test_a_process_that_leaves_is_left(front: Front) -> None:
    leaving = 'event: reconnect\ndata: {"job": "sample_1"}\nretry: 1\n\n'
    failed = line("failed", 3, error={"message": "m", "type": "server_error", "param": None, "code": "worker_lost"})
    front.script = [part(line("queued", 1), leaving), swallow, part(line("started", 2), ": dull\n\n"), part(failed)]
    with Client(front.url) as client:
        events = list(client.sample.stream(class_="Bag"))
    assert [(event.id, event.kind) for event in events] == [("1", "queued"), ("2", "started"), ("3", "failed")]
    assert [request.headers.get("last-event-id") for request in front.requests] == [None, "1", "1", "2"]
    assert [request.method for request in front.requests] == ["POST", "GET", "GET", "GET"]
    assert {request.path for request in front.requests[1:]} == {"/v1/jobs/sample_1/events"}


def test_a_stream_that_only_breaks_is_given_up(front: Front) -> None:
    front.script = [part(line("queued", 1)), part(), part(), part()]
    with Client(front.url, max_retries=1) as client, pytest.raises(ConnectionFailed, match="the stream ended"):
        list(client.sample.stream())
    # The job that nobody hears of any more is given up.
    assert [request.method for request in front.requests] == ["POST", "GET", "DELETE"]


def test_a_result_that_is_too_large_is_fetched(front: Front, tarflow: Client) -> None:
    job = tarflow.score.submit(GREY, model="tiny-cond")
    expected = job.result()
    completed = line("completed", 1, result=None, expires=1.0, job=job.id)
    front.script = [answer(200, completed, content_type="text/event-stream", x_tarflow_job=job.id)]
    with Client(front.url) as client:
        [event] = client.score.stream(GREY, model="tiny-cond")
    assert event.result() == expected


@pytest.mark.parametrize("act", [answer(200, line("queued", 1)), part("data: none\n\n")])
def test_what_is_no_stream_is_said(front: Front, act: Act) -> None:
    front.script = [act]
    with Client(front.url) as client, pytest.raises(UnexpectedAnswer):
        list(client.sample.stream())


def test_lines_are_read_as_the_standard_says() -> None:
    text = ": hello\nevent: a\ndata: 1\ndata:2\nid:7\nretry: 20\n\nid: lost\n\ndata\n\ndata:  x\nretry: soon\nnone\n\n"
    parser = Parser()
    heard = [event for line in text.split("\n") if (event := parser.feed(line))]
    assert [(event.kind, event.id, event.data, event.retry) for event in heard] == [
        ("a", "7", "1\n2", 0.02),
        ("message", "", "", None),
        ("message", "", " x", None),
    ]
