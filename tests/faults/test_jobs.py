"""Jobs over several API replicas: accepted by one, followed, read and canceled through another, whoever dies."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.faults.cluster import Cluster
from tests.service.api.test_jobs import PNG, accepted, ended, kinds, without_chance
from tests.service.events import EVENTS, Heard, parsed, told
from tests.service.pictures import b64, file, normal, opened
from tests.service.processes import ApiProcess, stopped, wait_until

PATIENT = ("--ready-seconds", "3600", "--lease-seconds", "3600")
SAMPLE: dict[str, Any] = {"model": "tiny-cond", "class": 2, "seed": 3, "num_images": 2}
UNCOND = {"model": "tiny-uncond"}
WAVES = [b64(file(image)) for image in normal(2, 12, seed=3)]


class Follower:
    """Events of a stream that is still open."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200
        self.heard: list[Heard] = []
        self._events = parsed(response.iter_lines())

    def until(self, kind: str) -> Heard:
        """The next event of a kind; all before it are noted."""
        for event in self._events:
            self.heard.append(event)
            if event.kind == kind:
                return event
        pytest.fail(f"no {kind} after {self.heard}")

    def rest(self) -> list[Heard]:
        """All that comes, as far as the connection goes."""
        with suppress(httpx.TransportError):
            self.heard += self._events
        return self.heard


def calibrate(client: httpx.Client) -> None:
    files = [("files", (f"{i}.png", file(image))) for i, image in enumerate(normal(40, 12))]
    data = {"name": "waves", **UNCOND}
    assert client.post("/v1/calibrations", files=files, data=data).status_code == 202
    wait_until(
        lambda: client.get("/v1/calibrations/waves", params=UNCOND).json()["status"] == "ready", "it is calibrated"
    )


@pytest.mark.long
def test_what_one_replica_accepts_another_answers(cluster: Cluster) -> None:
    one, other, worker = cluster.api(*PATIENT), cluster.api(*PATIENT), cluster.worker(*PATIENT)
    for api in (one, other):
        api.wait_ready()
    with one.client() as a, other.client() as b:
        calibrate(a)
        requests = {
            "sample": {**SAMPLE, "trajectory": True, "previews": 2},
            "score": {**UNCOND, "images": WAVES, "calibration": "waves", "alpha": 0.1, "maps": "overlay"},
            "classify": {"model": "tiny-cond", "images": WAVES},
            "encode": {**UNCOND, "images": WAVES},
        }
        with stopped(worker.children()[0]):
            jobs = {op: accepted(a, f"/v1/{op}", body) for op, body in requests.items()}
            assert [job["id"] for job in b.get("/v1/jobs").json()["data"]] == [job["id"] for job in jobs.values()][::-1]
            shown = b.get(jobs["sample"]["links"]["self"]).json()
            assert (shown["id"], shown["op"]) == (jobs["sample"]["id"], "sample")
        for op, job in jobs.items():
            document = ended(b, job["id"])
            body = {name: value for name, value in requests[op].items() if name != "previews"}
            at_once = a.post(f"/v1/{op}", json=body)
            assert without_chance(document["result"]) == without_chance(at_once.json())
            assert told(b.get(job["links"]["events"])) == told(a.get(job["links"]["events"]))
        # Pictures are drawn where they are asked for.
        picture = b.get(jobs["score"]["links"]["self"], headers=PNG)
        assert picture.headers["content-type"] == "image/png"
        assert picture.content == a.post("/v1/score", json=requests["score"], headers=PNG).content
        # So are previews: arrays went through Redis.
        events = told(b.get(jobs["sample"]["links"]["events"]))
        assert kinds(events) == ["queued", "started", "preview", "preview", "completed"]
        for event in events:
            for image in event.data.get("images", ()):
                state = jobs_state(ended(b, jobs["sample"]["id"]), image["index"], event.data["block"])
                assert abs(opened(image["b64"]).astype(int) - state).max() <= 1
        # Deleted through one, a calibration is gone for what the other accepted.
        assert a.delete("/v1/calibrations/waves", params=UNCOND).status_code == 204
        refused = b.get(jobs["score"]["links"]["self"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "calibration_changed")


def jobs_state(document: dict[str, Any], image: int, block: int) -> Any:
    """What the result says the image was after a block."""
    return opened(document["result"]["images"][image]["trajectory"][block - 1]).astype(int)


@pytest.mark.long
def test_a_key_is_known_to_every_replica(cluster: Cluster) -> None:
    one, other, worker = cluster.api(*PATIENT), cluster.api(*PATIENT), cluster.worker(*PATIENT)
    for api in (one, other):
        api.wait_ready()
    body, key = {"model": "tiny-cond"}, {"Idempotency-Key": "k"}
    with one.client() as a, other.client() as b, ThreadPoolExecutor(1) as pool:
        with stopped(worker.children()[0]):
            first = pool.submit(a.post, "/v1/sample", json=body, headers=key)
            wait_until(lambda: len(b.get("/v1/jobs").json()["data"]) == 1, "it is accepted")
            refused = b.post("/v1/sample", json=body, headers=key)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_in_flight")
        answer = first.result()
        assert answer.status_code == 200, answer.text
        again = b.post("/v1/sample", json=body, headers=key)
        assert again.json() == answer.json()
        reused = b.post("/v1/sample", json=SAMPLE, headers=key)
        assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_job_outlives_the_replica_that_accepted_it(cluster: Cluster) -> None:
    one, other, worker = cluster.api(*PATIENT), cluster.api(*PATIENT), cluster.worker(*PATIENT)
    for api in (one, other):
        api.wait_ready()
    with one.client() as a, other.client() as b:
        with stopped(worker.children()[0]):
            with a.stream("POST", "/v1/sample", json=SAMPLE, headers=EVENTS) as response:
                follower = Follower(response)
                first = follower.until("queued")
                address = first.data["links"]["events"]
                one.process.kill()
                one.wait()
                assert "completed" not in [event.kind for event in follower.rest()]
            last = follower.heard[-1].id
        # Who was told less than all goes on where it was, with whoever answers now.
        rest = told(b.get(address, headers={"Last-Event-ID": last}))
        every = told(b.get(address))
        assert follower.heard + rest == every
        assert every[-1].kind == "completed"
        assert every[-1].data["result"]["parameters"]["seed"] == 3


def test_cancelling_and_expiry_are_seen_everywhere(cluster: Cluster) -> None:
    one, hasty, worker = cluster.api(*PATIENT), cluster.api(*PATIENT, "--result-seconds", "1"), cluster.worker(*PATIENT)
    for api in (one, hasty):
        api.wait_ready()
    with one.client() as a, hasty.client() as b:
        with stopped(worker.children()[0]):
            kept, brief = accepted(a, "/v1/sample", SAMPLE), accepted(b, "/v1/sample", SAMPLE)
            for job, client in ((kept, b), (brief, a)):
                assert client.delete(job["links"]["self"]).json()["state"] == "canceled"
        wait_until(lambda: a.get(brief["links"]["self"]).status_code == 404, "the job has expired")
        assert b.get(kept["links"]["self"]).json()["state"] == "canceled"
        assert [job["id"] for job in b.get("/v1/jobs").json()["data"]] == [kept["id"]]
        # Whoever goes away from a stream cancels its job, whichever replica is asked about it.
        with stopped(worker.children()[0]), b.stream("POST", "/v1/sample", json=SAMPLE, headers=EVENTS) as response:
            follower = Follower(response)  # its end would be the connection's
            streamed = follower.until("queued").data["links"]["self"]
            assert a.get(streamed).json()["state"] in ("queued", "running")
        wait_until(
            lambda: a.get(streamed).status_code == 404 or a.get(streamed).json()["state"] == "canceled", "it ends"
        )


def test_a_replica_that_leaves_sends_its_followers_to_others(cluster: Cluster) -> None:
    one, other, worker = cluster.api(*PATIENT), cluster.api(*PATIENT), cluster.worker(*PATIENT)
    for api in (one, other):
        api.wait_ready()
    with one.client() as a, other.client() as b:
        with stopped(worker.children()[0]):
            job = accepted(a, "/v1/sample", SAMPLE)
            with a.stream("GET", job["links"]["events"]) as response:
                follower = Follower(response)
                seen = follower.until("queued")
                one.process.send_signal(signal.SIGTERM)
                told_to_leave = follower.until("reconnect")
                assert told_to_leave.data["links"] == job["links"]
            assert one.wait() == 0, one.log
        heard = told(b.get(job["links"]["events"], headers={"Last-Event-ID": seen.id}))
        assert kinds(heard) == ["started", "completed"]
    assert_quiet(one, other)


def assert_quiet(*apis: ApiProcess) -> None:
    for api in apis:
        assert "Traceback" not in api.log
