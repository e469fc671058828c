"""Tasks end, whatever becomes of the first cancellation."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.drain import Drain
from service.ending import ended

pytestmark = pytest.mark.anyio

Work = Callable[[], Coroutine[Any, Any, None]]


async def obeys() -> None:
    await asyncio.Event().wait()


async def loses_one() -> None:
    """As ``asyncio.wait_for`` does in Python 3.11 when it ends in that moment."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await asyncio.Event().wait()


async def tidies_up() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.05)


async def fails_on_the_way_out() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        raise ValueError("broken")


async def holds_another() -> None:
    inner = asyncio.ensure_future(loses_one())
    try:
        await asyncio.Event().wait()
    finally:
        await ended(inner)
        assert inner.done()


@pytest.mark.parametrize("work", [obeys, loses_one, tidies_up, fails_on_the_way_out, holds_another])
async def test_every_task_ends(work: Work) -> None:
    tasks = [asyncio.ensure_future(work()) for _ in range(3)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await ended(*tasks)
    assert all(task.done() for task in tasks)


async def test_what_has_ended_by_itself_is_left_alone_and_its_failure_reported_nowhere() -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reports.append(context))

    async def fails() -> None:
        raise ValueError("broken")

    done, failed = asyncio.ensure_future(asyncio.sleep(0, "result")), asyncio.ensure_future(fails())
    await asyncio.wait((done, failed))
    await ended(done, failed)
    assert done.result() == "result"
    del failed
    gc.collect()
    assert not reports


async def test_who_is_canceled_while_tasks_end_leaves_after_them() -> None:
    task = asyncio.ensure_future(tidies_up())
    await asyncio.sleep(0)
    ending = asyncio.ensure_future(ended(task))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert task.done()


async def test_work_that_loses_its_cancellation_is_abandoned_all_the_same() -> None:
    drain = Drain()
    work = asyncio.ensure_future(loses_one())
    waits = asyncio.ensure_future(drain.run(work))
    await asyncio.sleep(0)
    drain.abandon()
    async with asyncio.timeout(5):
        assert not await waits
    assert work.cancelled()
