"""What OpenAI's client does when the service cannot: it tries again where that helps, and only there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest

from tests.service.conftest import Start
from tests.service.processes import PATIENCE, ServerProcess, wait_until

Asked = TypeVar("Asked")


def standing_still(
    server: ServerProcess, ask: Callable[[], Asked], give_up: Callable[[Asked], object] = lambda asked: None
) -> tuple[int, Asked]:
    """A worker that is stopped with a job, and what was asked for.

    An idle worker asks for a job twice a second. One that is stopped has the next job if that comes before its question
    has gone stale, and else none: then it goes on, and all of it is done again.
    """
    while True:
        os.kill(worker := server.worker(), signal.SIGSTOP)
        asked = ask()
        wait_until(lambda: jobs(server) == 1, "the service has a job")
        time.sleep(0.5)
        if server.metric("tarflow_jobs_running") == 1:
            return worker, asked
        give_up(asked)
        os.kill(worker, signal.SIGCONT)
        wait_until(lambda: jobs(server) == 0, "the job is done or given up")


def jobs(server: ServerProcess) -> float:
    """Jobs that wait or that a worker has."""
    return server.metric("tarflow_queue_depth") + server.metric("tarflow_jobs_running")


def test_refusals_and_losses(start: Start, models: Path) -> None:
    """A full queue is tried again after a while, a job that its workers die of is not."""
    flags = ("--max-queue-cost", "1", "--max-attempts", "1", "--ready-seconds", "600", "--lease-seconds", "600")
    server = start("--models", models, "--default-model", "tiny-cond", *flags).wait_ready()
    library = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    stubborn = library.with_options(max_retries=2)
    with library, ThreadPoolExecutor(2) as pool:
        # The worker stands still with the one, and the other waits: nothing more is let in.
        worker, first = standing_still(server, lambda: pool.submit(stubborn.images.generate, prompt="cat"))
        done = server.metric("tarflow_requests_total", outcome="ok")
        asked = [first, pool.submit(stubborn.images.generate, prompt="dog")]
        wait_until(lambda: server.metric("tarflow_queue_depth") == 1, "a job waits")
        with pytest.raises(openai.RateLimitError) as refused:
            library.images.generate(prompt="fox")
        assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert "x-should-retry" not in refused.value.response.headers
        with pytest.raises(openai.RateLimitError):
            library.with_options(max_retries=1).images.generate(prompt="fox")
        assert server.metric("tarflow_requests_total", outcome="rate_limited") == 3
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as lost:
            asked[0].result()
        assert (lost.value.status_code, lost.value.code) == (503, "worker_lost")
        assert lost.value.response.headers["x-should-retry"] == "false"
        # Its successor does what waits, and never saw the other again.
        assert len(asked[1].result().data or []) == 1
    assert server.metric("tarflow_requests_total", outcome="worker_lost") == 1
    assert server.metric("tarflow_requests_total", outcome="ok") == done + 1


def test_streams_that_do_not_end_well(start: Start, models: Path) -> None:
    """A client that goes away takes its job with it; one that stays is told what became of it."""
    flags = ("--max-attempts", "1", "--ready-seconds", "600", "--lease-seconds", "600")
    server = start("--models", models, "--default-model", "tiny-cond", *flags).wait_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE) as library:

        def ask() -> openai.Stream[Any]:
            return library.images.generate(prompt="cat", stream=True)

        worker, stream = standing_still(server, ask, openai.Stream.close)
        stream.close()
        wait_until(lambda: server.metric("tarflow_jobs_running") == 0, "the job is given up")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: server.children() not in ([], [worker]), "it has a successor")
        wait_until(lambda: len(server.get("/readyz").json()["workers"]) == 1, "the successor is ready")
        worker, stream = standing_still(server, ask, openai.Stream.close)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(openai.APIError) as lost:
            list(stream)
        assert lost.value.code == "worker_lost"
    assert server.metric("tarflow_requests_total", outcome="worker_lost") == 1
    assert server.metric("tarflow_requests_total", outcome="ok") == 0
