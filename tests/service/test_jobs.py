"""Whom jobs outlive: connections that end, results that expire, services that leave."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.service.api.test_jobs import accepted, ended, kinds
from tests.service.conftest import Start
from tests.service.events import EVENTS, Heard, parsed, told
from tests.service.pictures import answered
from tests.service.processes import ServerProcess, stopped, wait_until

PATIENT = ("--ready-seconds", "3600", "--lease-seconds", "3600", "--slice-limit-seconds", "3600")
"""A worker that is stopped counts as there, so that jobs wait for it."""
BODY: dict[str, Any] = {"class": "Bag", "seed": 1}
ASYNC = {"Prefer": "respond-async"}
KEY = "Idempotency-Key"


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of this file's own."""
    process = ServerProcess(tmp_path_factory.mktemp("patient") / "log", *PATIENT)
    yield process.wait_ready()
    process.kill()
    print(process.log)


class Caller:
    """A request whose connection may be cut at any time."""

    def __init__(self, server: ServerProcess, **headers: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=180)
        self._connection.request(
            "POST", "/v1/sample", json.dumps(BODY), {"Content-Type": "application/json", **headers}
        )

    def first_event(self) -> Heard:
        """Of an answer that is a stream."""
        response = self._connection.getresponse()
        assert response.status == 200
        return next(parsed(line.decode().rstrip("\n") for line in response))

    def leave(self) -> None:
        """Cut the connection."""
        assert self._connection.sock is not None
        self._connection.sock.close()
        self._connection.close()


def listed(client: httpx.Client) -> list[str]:
    """Ids of the jobs that are kept."""
    return [job["id"] for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]]


def new_one(client: httpx.Client, before: list[str]) -> str:
    """The id of a job that has just been accepted."""
    wait_until(lambda: len(listed(client)) > len(before), "the job is accepted")
    [job_id] = set(listed(client)) - set(before)
    return job_id


def state(client: httpx.Client, job_id: str) -> str:
    """Where a job stands."""
    return str(client.get(f"/v1/jobs/{job_id}").json()["state"])


def test_a_repetition_in_flight_is_refused_and_later_answered(patient: ServerProcess) -> None:
    with patient.client() as client, patient.client() as second, ThreadPoolExecutor(1) as pool:
        headers, before = {KEY: "in-flight"}, listed(client)
        with stopped(patient.worker()):
            first = pool.submit(second.post, "/v1/sample", json={"class": "Bag"}, headers=headers)
            new_one(client, before)
            refused = client.post("/v1/sample", json={"class": "Bag"}, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_in_flight")
            assert int(refused.headers["retry-after"]) > 0
            # Whoever asks for a job gets the same one, whether it is in flight or not.
            headers = {KEY: "job-in-flight"}
            job = accepted(client, "/v1/sample", {"class": "Bag"}, **headers)
            assert accepted(client, "/v1/sample", {"class": "Bag"}, **headers)["id"] == job["id"]
        assert answered(first.result())
        again = client.post("/v1/sample", json={"class": "Bag"}, headers={KEY: "in-flight"})
        assert again.json() == first.result().json()


def test_who_has_a_key_may_come_back_for_the_answer(patient: ServerProcess) -> None:
    with patient.client() as client:
        for name, headers in (("sync", {}), ("stream", EVENTS), ("async", {"Prefer": "respond-async, wait=100"})):
            headers, before = {**headers, KEY: f"back-{name}"}, listed(client)
            with stopped(patient.worker()):
                caller = Caller(patient, **headers)
                job_id = new_one(client, before)
                caller.leave()
            assert ended(client, job_id)["state"] == "completed"
            again = client.post("/v1/sample", json=BODY, headers=headers)
            assert again.status_code == 200
            assert again.headers.get("x-tarflow-job", job_id) == job_id
            assert job_id in again.text


def test_who_leaves_a_stream_takes_its_job_along(patient: ServerProcess) -> None:
    with patient.client() as client, stopped(patient.worker()):
        caller = Caller(patient, **EVENTS)
        first = caller.first_event()
        assert first.kind == "queued"
        assert state(client, first.data["job"]) in ("queued", "running")
        caller.leave()
        wait_until(lambda: state(client, first.data["job"]) == "canceled", "the job is canceled")


@pytest.mark.parametrize("headers", [{**EVENTS, **ASYNC}, {**ASYNC, "Prefer": "respond-async, wait=100"}])
def test_who_asked_for_an_asynchronous_job_may_leave(patient: ServerProcess, headers: dict[str, str]) -> None:
    with patient.client() as client:
        before = listed(client)
        with stopped(patient.worker()):
            caller = Caller(patient, **headers)
            job_id = new_one(client, before)
            caller.leave()
        assert ended(client, job_id)["state"] == "completed"


def test_a_reader_that_leaves_changes_nothing(patient: ServerProcess) -> None:
    with patient.client() as client:
        with stopped(patient.worker()):
            job = accepted(client, "/v1/sample", BODY)
            for address in (job["links"]["events"], job["links"]["self"] + "?wait=100"):
                connection = http.client.HTTPConnection(urlsplit(patient.url).netloc, timeout=180)
                connection.request("GET", address)
                connection.close()
        assert ended(client, job["id"])["state"] == "completed"


def test_jobs_that_wait_can_be_canceled(patient: ServerProcess) -> None:
    with patient.client() as client, ThreadPoolExecutor(1) as pool:
        with stopped(patient.worker()):
            jobs = [accepted(client, "/v1/sample", BODY) for _ in range(4)]
            # The worker may have asked for the first before it was stopped.
            shown = [client.get(job["links"]["self"]).json() for job in jobs[1:]]
            assert [job["state"] for job in shown] == ["queued"] * 3
            assert [job["position"] - shown[0]["position"] for job in shown] == [0, 1, 2]
            follower = pool.submit(client.get, jobs[2]["links"]["events"])
            for _ in range(2):
                canceled = client.delete(jobs[2]["links"]["self"]).json()
                assert (canceled["state"], canceled["error"]["code"]) == ("canceled", "canceled")
            events = list(parsed(follower.result().text.split("\n")))
            assert kinds(events) == ["queued", "canceled"]
            assert events[-1].data["error"]["code"] == "canceled"
            assert client.get(jobs[3]["links"]["self"]).json()["position"] == shown[1]["position"]
            picture = client.get(jobs[2]["links"]["self"], headers={"Accept": "image/png"})
            assert (picture.status_code, picture.json()["error"]["code"]) == (499, "canceled")
            waits = client.get(jobs[3]["links"]["self"], headers={"Accept": "image/png"})
            assert (waits.status_code, waits.json()["error"]["code"]) == (409, "job_not_completed")
        for job in (jobs[0], jobs[1], jobs[3]):
            assert ended(client, job["id"])["state"] == "completed"


def test_a_canceled_job_frees_its_key(patient: ServerProcess) -> None:
    with patient.client() as client, stopped(patient.worker()):
        first = accepted(client, "/v1/sample", BODY, **{KEY: "canceled"})
        client.delete(first["links"]["self"])
        again = accepted(client, "/v1/sample", BODY, **{KEY: "canceled"})
        assert again["id"] != first["id"]
        client.delete(again["links"]["self"])


def test_a_stream_ends_with_the_time_for_its_request(patient: ServerProcess) -> None:
    with patient.client() as client, stopped(patient.worker()):
        headers = {**EVENTS, "X-Request-Timeout": "4"}
        last = told(client.post("/v1/sample", json=BODY, headers=headers))[-1]
        assert (last.kind, last.data["error"]["code"]) == ("failed", "timeout")


def test_with_a_key_work_goes_on_when_the_time_is_over(patient: ServerProcess) -> None:
    with patient.client() as client:
        before = listed(client)
        with stopped(patient.worker()):
            late = client.post("/v1/sample", json=BODY, headers={KEY: "late", "X-Request-Timeout": "4"})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            assert "the same Idempotency-Key" in late.json()["error"]["message"]
        [job_id] = set(listed(client)) - set(before)
        assert ended(client, job_id)["state"] == "completed"
        again = client.post("/v1/sample", json=BODY, headers={KEY: "late"})
        assert again.json()["id"] == job_id


def test_who_follows_hears_that_a_worker_was_lost(patient: ServerProcess) -> None:
    with patient.client() as client:
        job = accepted(client, "/v1/sample", {**BODY, "num_images": 64, "guidance_scale": 2.0, "previews": 1})
        wait_until(lambda: client.get(job["links"]["self"]).json()["progress"] > 0, "it has begun")
        os.kill(patient.worker(), signal.SIGKILL)
        assert ended(client, job["id"])["state"] == "completed"
        events = [event for event in told(client.get(job["links"]["events"])) if event.kind != "progress"]
        assert [event.kind for event in events if event.kind != "preview"] == [
            *("queued", "started", "requeued", "started", "completed")
        ]
        assert [event.data["attempt"] for event in events if event.kind == "started"] == [1, 2]
    patient.wait_ready()


def test_time_is_not_endless(start: Start) -> None:
    server = start(*PATIENT, "--job-timeout", "0.5", "--result-seconds", "2").wait_ready()
    with server.client() as client:
        with stopped(server.worker()):
            jobs = [accepted(client, "/v1/sample", BODY) for _ in range(2)]
            failed = ended(client, jobs[1]["id"])
            assert (failed["state"], failed["error"]["code"]) == ("failed", "timeout")
            assert failed["expires"] == pytest.approx(failed["ended"] + 2)
        # What has ended is forgotten, and with it what happened.
        for path in (jobs[1]["links"]["self"], jobs[1]["links"]["events"]):
            wait_until(lambda: client.get(path).status_code == 404, "the job has expired")  # noqa: B023
        wait_until(lambda: listed(client) == [], "no job is left")


def test_what_was_accepted_is_finished_before_the_service_leaves(start: Start) -> None:
    server = start("--drain-seconds", "600").wait_ready()
    large = {**BODY, "num_images": 32}
    with server.client() as client, server.client() as other, ThreadPoolExecutor(2) as pool:
        job = accepted(client, "/v1/sample", large)
        follower = pool.submit(client.get, job["links"]["events"])
        waiting = pool.submit(other.get, job["links"]["self"], params={"wait": 500})
        wait_until(lambda: server.metric("tarflow_jobs_running") == 1, "the job runs")
        server.process.send_signal(signal.SIGTERM)
        assert list(parsed(follower.result().text.split("\n")))[-1].kind == "completed"
        assert waiting.result().json()["state"] == "completed"
    assert server.wait() == 0, server.log
    assert "Traceback" not in server.log


def test_who_follows_is_told_when_the_service_leaves(start: Start) -> None:
    server = start(*PATIENT, "--drain-seconds", "1").wait_ready()
    with ExitStack() as stack:
        client, other, third = (stack.enter_context(server.client()) for _ in range(3))
        pool = stack.enter_context(ThreadPoolExecutor(3))
        stack.enter_context(stopped(server.worker()))
        job = accepted(client, "/v1/sample", BODY)
        follower = pool.submit(client.get, job["links"]["events"])
        before = listed(third)
        streamer = pool.submit(other.post, "/v1/sample", json=BODY, headers=EVENTS)
        new_one(third, before)
        waiting = pool.submit(third.get, job["links"]["self"], params={"wait": 500})
        server.process.send_signal(signal.SIGTERM)
        for response in (follower.result(), streamer.result()):
            last = list(parsed(response.text.split("\n")))[-1]
            assert (last.kind, last.retry) == ("reconnect", "1000")
            assert last.data["links"]["events"].endswith(f"{last.data['job']}/events")
        assert waiting.result().json()["state"] in ("queued", "running")
        assert server.wait() == 0, server.log
    assert "Traceback" not in server.log
