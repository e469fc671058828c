"""Asynchronous jobs: whatever is answered later is what would have been answered at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.service.events import EVENTS, Heard, told
from tests.service.pictures import Pixels, answered, b64, file, normal, opened, pixels

ASYNC = {"Prefer": "respond-async"}
PNG = {"Accept": "image/png"}
GREY = b64(file(pixels(12)))
WAVES = [b64(file(image)) for image in normal(2, 12, seed=3)]
LATENTS = [{"shape": [9, 16], "b64": b64(bytes(4 * 9 * 16))}]
SAMPLE = {"model": "tiny-cond", "class": "fox", "seed": 3}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sample": ("sample", {**SAMPLE, "num_images": 2, "guidance_window": [0, 2]}),
    "trajectory": ("sample", {**SAMPLE, "trajectory": True, "output_format": "npy"}),
    "likelihood model": ("sample", {"model": "tiny-uniform", "seed": 1, "output_format": "webp"}),
    "decode": ("decode", {"model": "tiny-uncond", "latents": []}),
    "denoise": ("denoise", {"model": "tiny-cond", "images": [GREY], "add_noise": True, "seed": 4}),
    "score": ("score", {"model": "tiny-cond", "class": "dog", "images": [GREY, GREY], "draws": 2}),
    "verdict": ("score", {"model": "tiny-uncond", "images": WAVES, "alpha": 0.05, "maps": "overlay"}),
    "correction": ("score", {"model": "tiny-uncond", "images": WAVES, "correction": "benjamini_hochberg"}),
    "threshold": ("score", {"model": "tiny-uncond", "images": WAVES, "threshold": 1.5, "maps": "array"}),
    "encode": ("encode", {"model": "tiny-cond", "images": [b64(file(pixels(20, 3)))], "add_noise": True}),
    "classify": ("classify", {"model": "tiny-cond", "images": [GREY], "draws": 2}),
}
PICTURES = ("sample", "likelihood model", "denoise", "verdict")


def request(client: httpx.Client, name: str) -> tuple[str, dict[str, Any]]:
    """Path and body; a latent has the model's shape."""
    path, body = REQUESTS[name]
    if path == "decode":
        encoded = client.post("/v1/encode", json={"model": body["model"], "images": [GREY]})
        body = {**body, "latents": [image["latent"] for image in encoded.json()["images"]]}
    return f"/v1/{path}", body


def without_chance(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer less what no two answers have in common."""
    return {name: value for name, value in answer.items() if name not in ("id", "timing")}


def accepted(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    """The document of a job that was accepted for later."""
    response = client.post(path, json=body, headers={**ASYNC, **headers})
    assert response.status_code == 202, response.text
    document: dict[str, Any] = response.json()
    assert response.headers["location"] == document["links"]["self"] == f"/v1/jobs/{document['id']}"
    assert response.headers["preference-applied"] == "respond-async"
    return document


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The document of a job when it has ended."""
    response = client.get(f"/v1/jobs/{job_id}", params={"wait": 120})
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    assert document["state"] in ("completed", "failed", "canceled")
    return document


@pytest.mark.parametrize("name", REQUESTS)
def test_the_result_is_what_the_synchronous_call_answers(client: httpx.Client, name: str) -> None:
    path, body = request(client, name)
    at_once = client.post(path, json=body)
    assert at_once.status_code == 200, at_once.text
    job = accepted(client, path, body)
    assert (job["object"], job["op"], job["model"]) == ("job", path.removeprefix("/v1/"), body["model"])
    assert job["result"] is None
    assert job["error"] is None
    document = ended(client, job["id"])
    assert (document["state"], document["progress"], document["error"]) == ("completed", 1.0, None)
    assert without_chance(document["result"]) == without_chance(at_once.json())
    assert document["result"]["id"] == job["id"]
    assert document["created"] <= document["started"] <= document["ended"] < document["expires"]
    # It may be read again, and its stream ends with it too.
    assert client.get(job["links"]["self"]).json()["result"] == document["result"]
    last = told(client.get(job["links"]["events"]))[-1]
    assert (last.kind, last.data["result"]) == ("completed", document["result"])
    assert last.data["expires"] == document["expires"]


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_what_the_synchronous_call_answers(client: httpx.Client, name: str) -> None:
    path, body = request(client, name)
    at_once = client.post(path, json=body, headers=PNG)
    job = accepted(client, path, body, **PNG)
    later = client.get(job["links"]["self"], params={"wait": 120}, headers=PNG)
    assert later.status_code == 200, later.text
    assert later.headers["content-type"] == "image/png"
    assert later.content == at_once.content
    ours = {key: value for key, value in at_once.headers.items() if key.startswith("x-tarflow-")}
    assert {**ours, "x-tarflow-job": job["id"]} == {
        key: value for key, value in later.headers.items() if key.startswith("x-tarflow-")
    }


def test_who_waits_long_enough_is_answered_at_once(client: httpx.Client) -> None:
    response = client.post("/v1/sample", json=SAMPLE, headers={"Prefer": "respond-async, wait=100"})
    assert len(answered(response)) == 1
    assert client.get(f"/v1/jobs/{response.json()['id']}").json()["result"] == response.json()
    picture = client.post("/v1/sample", json=SAMPLE, headers={"Prefer": 'Respond-Async;x, wait="100"', **PNG})
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")


@pytest.mark.parametrize("prefer", ["wait=5", "return=minimal", "", "respond-asynchronously", "x;respond-async"])
def test_other_preferences_change_nothing(client: httpx.Client, prefer: str) -> None:
    assert len(answered(client.post("/v1/sample", json=SAMPLE, headers={"Prefer": prefer}))) == 1


@pytest.mark.parametrize("wait", ["wait=x", "wait=-1", "wait=", "wait=0", "wait=1e9", "wait=0.5"])
def test_a_wait_that_cannot_be_understood_is_ignored(client: httpx.Client, wait: str) -> None:
    response = client.post("/v1/sample", json=SAMPLE, headers={"Prefer": f"respond-async, {wait}"})
    assert response.status_code == 202


def test_a_form_is_accepted_too(client: httpx.Client) -> None:
    files = [("files", ("a.png", file(pixels(12)))), ("files", ("b.png", file(pixels(12, seed=1))))]
    response = client.post("/v1/score", files=files, data={"model": "tiny-cond"}, headers=ASYNC)
    assert response.status_code == 202
    document = ended(client, response.json()["id"])
    assert [image["filename"] for image in document["result"]["images"]] == ["a.png", "b.png"]


def test_what_is_wrong_is_said_at_once(client: httpx.Client) -> None:
    for path, body in (("sample", {"class": "ox"}), ("score", {"images": ["-"]}), ("classify", {"model": "none"})):
        at_once = client.post(f"/v1/{path}", json=body)
        for headers in (ASYNC, EVENTS):
            later = client.post(f"/v1/{path}", json=body, headers=headers)
            assert (later.status_code, later.json()) == (at_once.status_code, at_once.json())


def test_jobs_are_listed_with_the_newest_first(client: httpx.Client) -> None:
    ids = [accepted(client, "/v1/sample", SAMPLE)["id"] for _ in range(3)]
    listed = client.get("/v1/jobs", params={"limit": 3}).json()
    assert (listed["object"], [job["id"] for job in listed["data"]]) == ("list", ids[::-1])
    ended(client, ids[0])
    shown = {job["id"]: job for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]}
    assert shown[ids[0]]["state"] == "completed"
    assert shown[ids[0]]["result"] is None
    answered_at_once = client.post("/v1/sample", json=SAMPLE).json()["id"]
    assert answered_at_once not in shown
    for limit in (0, 101, "x"):
        refused = client.get("/v1/jobs", params={"limit": limit})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "limit")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_unknown_jobs_are_not_found(client: httpx.Client, method: str) -> None:
    for path in ("/v1/jobs/sample_0", "/v1/jobs/%00", "/v1/jobs/" + "x" * 3000):
        response = client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")
    response = client.get("/v1/jobs/sample_0/events")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")


def test_deleting_what_has_ended_changes_nothing(client: httpx.Client) -> None:
    document = ended(client, accepted(client, "/v1/sample", SAMPLE)["id"])
    for _ in range(2):
        response = client.delete(document["links"]["self"])
        assert (response.status_code, response.json()["state"]) == (200, "completed")
    assert client.get(document["links"]["self"]).json() == document


@pytest.mark.parametrize("wait", [-1, "nan", "inf", "x"])
def test_how_long_one_may_wait_is_said(client: httpx.Client, wait: object) -> None:
    job = accepted(client, "/v1/sample", SAMPLE)
    response = client.get(job["links"]["self"], params={"wait": str(wait)})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "wait")


# Events.


def kinds(events: list[Heard]) -> list[str]:
    """What happened, progress aside: how often it is told depends on the time."""
    return [event.kind for event in events if event.kind != "progress"]


def test_a_stream_ends_with_the_answer(client: httpx.Client) -> None:
    at_once = client.post("/v1/sample", json=SAMPLE).json()
    response = client.post("/v1/sample", json=SAMPLE, headers=EVENTS)
    events = told(response)
    assert kinds(events) == ["queued", "started", "completed"]
    assert {event.data["job"] for event in events} == {response.headers["x-tarflow-job"]}
    assert [event.data["time"] for event in events] == sorted(event.data["time"] for event in events)
    assert events[0].data["links"]["self"] == f"/v1/jobs/{response.headers['x-tarflow-job']}"
    assert events[1].data["attempt"] == 1
    assert without_chance(events[-1].data["result"]) == without_chance(at_once)
    assert (response.headers["cache-control"], "content-length" in response.headers) == ("no-cache", False)


@pytest.mark.parametrize("name", REQUESTS)
def test_every_operation_can_be_streamed(client: httpx.Client, name: str) -> None:
    path, body = request(client, name)
    last = told(client.post(path, json=body, headers=EVENTS))[-1]
    assert last.kind == "completed"
    assert without_chance(last.data["result"]) == without_chance(client.post(path, json=body).json())


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream, application/json;q=0.5", True),
        ("application/json, text/event-stream", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0, */*", False),
        ("*/*", False),
    ],
)
def test_a_stream_comes_where_it_is_preferred(client: httpx.Client, accept: str, streams: bool) -> None:
    response = client.post("/v1/sample", json=SAMPLE, headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream") is streams


def test_events_are_replayed_behind_the_last_one_seen(client: httpx.Client) -> None:
    job = accepted(client, "/v1/sample", {**SAMPLE, "previews": 2})
    ended(client, job["id"])
    address = job["links"]["events"]
    events = told(client.get(address))
    assert kinds(events) == ["queued", "started", "preview", "preview", "completed"]
    for number, event in enumerate(events[:-1]):
        assert told(client.get(address, headers={"Last-Event-ID": event.id})) == events[number + 1 :]
    # Nothing more comes: browsers are told not to ask again.
    assert client.get(address, headers={"Last-Event-ID": events[-1].id}).status_code == 204
    assert told(client.get(address, headers={"Last-Event-ID": "never given"})) == events


def states(client: httpx.Client, body: dict[str, Any]) -> list[list[Pixels]]:
    answer = client.post("/v1/sample", json={**body, "trajectory": True}).json()
    return [[opened(state) for state in image["trajectory"]] for image in answer["images"]]


@pytest.mark.parametrize(
    ("previews", "blocks"),
    [(1, {"tiny-cond": [2], "fashion-mnist": [2]}), (2, {"tiny-cond": [1, 2]}), (100, {"tiny-cond": [1, 2]})],
)
def test_previews_are_states_of_the_trajectory(
    client: httpx.Client, previews: int, blocks: dict[str, list[int]]
) -> None:
    for model, expected in blocks.items():
        body = {"model": model, "class": 3, "seed": 5, "num_images": 3, "solver": "sequential"}
        found = told(client.post("/v1/sample", json={**body, "previews": previews}, headers=EVENTS))
        shown = [event.data for event in found if event.kind == "preview"]
        assert [data["block"] for data in shown] == expected
        trajectory = states(client, body)
        for data in shown:
            assert data["blocks"] == len(trajectory[0])
            assert [image["index"] for image in data["images"]] == [0, 1, 2]
            for image in data["images"]:
                state = trajectory[image["index"]][data["block"] - 1].astype(int)
                # Both are rounded from floats that agree but for their last digits.
                assert abs(opened(image["b64"]) - state).max() <= 1


def test_previews_need_someone_who_can_see_them(client: httpx.Client) -> None:
    for headers in ({}, {"Idempotency-Key": "previews"}):
        response = client.post("/v1/sample", json={**SAMPLE, "previews": 1}, headers=headers)
        assert (response.status_code, response.json()["error"]["param"]) == (422, "previews")


# Repetitions.


def test_a_repetition_is_answered_as_the_first_was(client: httpx.Client) -> None:
    body = {"model": "tiny-cond", "num_images": 2}  # its seed is drawn
    first, again = (client.post("/v1/sample", json=body, headers={"Idempotency-Key": "again"}) for _ in range(2))
    assert first.status_code == 200, first.text
    assert again.json() == first.json()
    other = client.post("/v1/sample", json=body, headers={"Idempotency-Key": "other"})
    assert other.json()["parameters"]["seed"] != first.json()["parameters"]["seed"]


def test_a_picture_is_repeated_too(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "picture", **PNG}
    first, again = (client.post("/v1/sample", json={"model": "tiny-cond"}, headers=headers) for _ in range(2))
    assert (first.headers["content-type"], first.content) == ("image/png", again.content)
    assert first.headers["x-tarflow-job"] == again.headers["x-tarflow-job"]


def test_a_repeated_job_is_one_job(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "job"}
    first = accepted(client, "/v1/sample", {"model": "tiny-cond"}, **headers)
    assert accepted(client, "/v1/sample", {"model": "tiny-cond"}, **headers)["id"] == first["id"]
    ended(client, first["id"])
    assert accepted(client, "/v1/sample", {"model": "tiny-cond"}, **headers)["state"] == "completed"


def test_a_repeated_stream_is_told_again(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "stream", **EVENTS}
    first, again = (told(client.post("/v1/sample", json={"model": "tiny-cond"}, headers=headers)) for _ in range(2))
    assert again == first


def test_a_form_is_known_by_its_content(client: httpx.Client) -> None:
    def post(content: bytes, **data: str) -> httpx.Response:
        fields = {"model": "tiny-cond", **data}
        # httpx draws another boundary every time.
        files = {"files": ("a.png", content)}
        return client.post("/v1/score", files=files, data=fields, headers={"Idempotency-Key": "form"})

    first, other = file(pixels(12, seed=1)), file(pixels(12, seed=2))
    answer = post(first)
    assert answer.status_code == 200, answer.text
    assert post(first).json() == answer.json()
    for refused in (post(other), post(first, draws="2"), post(first, seed="0")):
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_key_is_for_one_request(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "one"}
    assert client.post("/v1/sample", json=SAMPLE, headers=headers).status_code == 200
    again: list[Callable[[], httpx.Response]] = [
        lambda: client.post("/v1/sample", json={**SAMPLE, "seed": 4}, headers=headers),
        lambda: client.post("/v1/sample", json=SAMPLE, headers={**headers, **ASYNC}),
        lambda: client.post("/v1/sample", json=SAMPLE, headers={**headers, **EVENTS}),
        lambda: client.post("/v1/score", json={"model": "tiny-cond", "images": [GREY]}, headers=headers),
    ]
    for post in again:
        refused = post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert refused.json()["error"]["param"] == "Idempotency-Key"


def test_two_keys_are_one_too_many(client: httpx.Client) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    refused = client.post("/v1/sample", json=SAMPLE, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "Idempotency-Key")


def test_names_of_media_types_have_no_case(client: httpx.Client) -> None:
    answer = client.post("/v1/sample", json=SAMPLE, headers={"Accept": "Text/Event-Stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("key", ["", "x" * 256, "two words"])
def test_a_key_that_cannot_be_one_is_refused(client: httpx.Client, key: str) -> None:
    response = client.post("/v1/sample", json=SAMPLE, headers={"Idempotency-Key": key})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "Idempotency-Key")


def test_what_was_refused_does_not_use_up_a_key(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "refused"}
    assert client.post("/v1/sample", json={**SAMPLE, "class": "ox"}, headers=headers).status_code == 422
    assert client.post("/v1/sample", json=SAMPLE, headers=headers).status_code == 200


# Calibrations.


def test_verdicts_are_not_given_by_another_calibration(client: httpx.Client) -> None:
    def calibrate(seed: int, replace: str = "false") -> None:
        files = [("files", (f"{i}.png", file(image))) for i, image in enumerate(normal(24, 12, seed))]
        data = {"name": "shifting", "model": "tiny-uncond", "replace": replace}
        answer = client.post("/v1/calibrations", files=files, data=data)
        assert answer.status_code == 202, answer.text
        address = "/v1/calibrations/shifting"
        while (found := client.get(address, params={"model": "tiny-uncond"}).json())["status"] != "ready":
            assert found["status"] in ("queued", "running"), json.dumps(found)

    calibrate(1)
    body = {"model": "tiny-uncond", "images": WAVES, "calibration": "shifting", "alpha": 0.2}
    job = accepted(client, "/v1/score", body)
    assert ended(client, job["id"])["result"]["calibration"]["name"] == "shifting"
    for change, word in ((lambda: calibrate(2, "true"), "replaced"), (delete(client), "gone")):
        change()
        refused = client.get(job["links"]["self"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "calibration_changed")
        assert word in refused.json()["error"]["message"]
        last = told(client.get(job["links"]["events"]))[-1]
        assert (last.kind, last.data["result"]) == ("completed", None)
        assert last.data["error"]["code"] == "calibration_changed"


def delete(client: httpx.Client) -> Callable[[], None]:
    def deleted() -> None:
        answer = client.delete("/v1/calibrations/shifting", params={"model": "tiny-uncond"})
        assert answer.status_code == 204, answer.text

    return deleted


def test_the_same_verdicts_are_watched_once(client: httpx.Client) -> None:
    def judged() -> float:
        lines = client.get("/metrics").text.splitlines()
        names = [line for line in lines if line.startswith("tarflow_anomaly_images_total{") and '"default"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in names)

    before = judged()
    job = accepted(client, "/v1/score", {"model": "tiny-uncond", "images": WAVES, "alpha": 0.2})
    for _ in range(3):
        assert ended(client, job["id"])["state"] == "completed"
    assert judged() == before + len(WAVES)
