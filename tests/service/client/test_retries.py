"""Requests that are repeated, over real sockets: what is safe comes through, and nothing is done twice."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import httpx
import pytest

from service import errors as theirs
from service.api.envelope import STATUS, body
from service.client import (
    ApiError,
    AsyncClient,
    Client,
    Conflict,
    ConnectionFailed,
    InvalidRequest,
    NoAnswerInTime,
    Overloaded,
    TarflowError,
    Unavailable,
    UnexpectedAnswer,
    WorkerLost,
    errors,
)
from service.client.retries import IN_FLIGHT, JITTER, Patience
from tests.service.client.fronts import Act, Front, answer, break_at_once, lose_the_answer, swallow
from tests.service.pictures import file, normal, pixels

GREY = pixels(12)


def refusal(error: theirs.ServiceError, **headers: str) -> Act:
    """What the service answers to say this; to try again at once, where nothing else is said."""
    told = {"retry_after": "0", **headers}
    return answer(STATUS[type(error)], json.dumps(body(error)).encode(), content_type="application/json", **told)


BUSY = refusal(theirs.Overloaded("full"))
AWAY = refusal(theirs.Unavailable("nobody works"))


@pytest.fixture
def patient(front: Front) -> Client:
    """A client of the front."""
    return Client(front.url, max_retries=2)


@pytest.mark.anyio
@pytest.mark.parametrize("script", [[BUSY, AWAY], [swallow, BUSY], [lose_the_answer, AWAY], [swallow, swallow]])
async def test_what_is_refused_twice_comes_through(front: Front, script: list[Act]) -> None:
    front.script = list(script)
    with Client(front.url, max_retries=2) as client:
        first = client.sample(model="tiny-cond", seed=3)
    assert len(front.requests) == 3
    front.script = list(script)
    async with AsyncClient(front.url, max_retries=2) as waiting:
        second = await waiting.sample(model="tiny-cond", seed=3)
    assert second.images == first.images
    assert second.id != first.id
    assert len(front.requests) == 6
    # The service would keep the answers.
    assert set(front.keys()) == {None}


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (refusal(theirs.Overloaded("full"), x_should_retry="false"), Overloaded),
        (refusal(theirs.Overloaded("full"), retry_after="100000"), Overloaded),
        (refusal(theirs.Unavailable("full"), retry_after="Fri, 31 Dec 9999 23:59:59 GMT"), Unavailable),
        (refusal(theirs.WorkerLost("it kills them")), WorkerLost),
        (refusal(theirs.InvalidRequest("no")), InvalidRequest),
        (refusal(theirs.InternalError("no")), ApiError),
    ],
)
def test_what_is_not_to_be_repeated_is_not(front: Front, patient: Client, act: Act, kind: type[TarflowError]) -> None:
    front.script = [act]
    with patient, pytest.raises(kind):
        patient.sample(model="tiny-cond", seed=3)
    assert len(front.requests) == 1


def test_the_service_may_ask_for_a_repetition(front: Front, patient: Client) -> None:
    front.script = [refusal(theirs.InternalError("once"), x_should_retry="true")]
    with patient:
        assert patient.sample(model="tiny-cond", seed=3).images
    assert len(front.requests) == 2


@pytest.mark.parametrize("retry_after", ["0", "soon", "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_patience_has_an_end(front: Front, patient: Client, retry_after: str) -> None:
    front.script = [refusal(theirs.Overloaded("full"), retry_after=retry_after)] * 9
    with patient:
        with pytest.raises(Overloaded) as caught:
            patient.sample(model="tiny-cond")
        assert len(front.requests) == 3
        assert caught.value.retry_after == (None if retry_after == "soon" else 0)
        with pytest.raises(Overloaded):
            patient.with_options(max_retries=0).sample(model="tiny-cond")
        assert len(front.requests) == 4


@pytest.mark.parametrize("breaks", [lose_the_answer, break_at_once])
def test_a_repeated_job_is_the_same_job(front: Front, patient: Client, breaks: Act) -> None:
    """By its idempotency key: the seed is drawn, so that another job would have other images."""
    front.script = [breaks]
    with patient:
        job = patient.sample.submit(model="tiny-cond")
        result = job.result()
        for thread in front.behind:
            thread.join()
        first = front.requests[0].answer
        assert first is not None
        assert first.json()["id"] == job.id
        assert [each.id for each in patient.jobs.list(100)].count(job.id) == 1
        assert result.id == job.id
        assert front.keys()[0] == front.keys()[1] is not None


@pytest.mark.parametrize("breaks", [lose_the_answer, break_at_once])
def test_a_repeated_call_is_answered_as_the_first(front: Front, patient: Client, breaks: Act) -> None:
    """Also while the first is still being worked on."""
    front.script = [breaks]
    key = f"a-call-with-{breaks.__name__}"
    with patient:
        found = patient.with_options(idempotency_key=key).sample(num_images=8)
    for thread in front.behind:
        thread.join()
    assert {found.id} == {request.answer.json()["id"] for request in front.requests if is_good(request.answer)}
    assert set(front.keys()) == {key}


def in_flight(retry_after: str = "0") -> Act:
    return refusal(theirs.Conflict("still worked on", code=IN_FLIGHT), retry_after=retry_after)


@pytest.mark.parametrize(
    ("act", "options"),
    [
        (in_flight(), {"max_retries": 0}),
        (in_flight("100"), {"request_timeout": 99}),
        (in_flight("1000"), {}),
        (in_flight(), {"request_timeout": 0.1}),
    ],
)
def test_a_first_attempt_is_not_waited_for_in_vain(front: Front, act: Act, options: dict[str, Any]) -> None:
    front.script = [act] * 9
    with Client(front.url, **options) as client, pytest.raises(Conflict, match="still"):
        client.sample()
    assert len(front.requests) == 1


def waits(patience: Patience, error: TarflowError) -> Iterator[float]:
    """Seconds between attempts that all fail like this."""
    with suppress(type(error)):
        while True:
            yield patience.after(error, repeatable=True)


@pytest.mark.parametrize("retry_after", [None, 0.0, 2.0])
@pytest.mark.parametrize(("given", "most"), [(20.0, 20.0), (None, 600.0)])
def test_waits_for_a_first_attempt_have_a_sum(retry_after: float | None, given: float | None, most: float) -> None:
    error = Conflict("still worked on", code=IN_FLIGHT, retry_after=retry_after)
    patience = Patience(1, given)
    waited = sum(islice(waits(patience, error), 10_000))
    assert most - 2 * (1 + JITTER) <= waited <= most
    # Other repetitions are counted for themselves.
    assert patience.after(Overloaded("full"), repeatable=True) > 0


def is_good(response: httpx.Response | None) -> bool:
    return response is not None and response.status_code == 200


def test_a_repeated_stream_is_the_same_job(front: Front, patient: Client) -> None:
    front.script = [lose_the_answer]
    with patient:
        events = list(patient.sample.stream(model="tiny-cond"))
    first = front.requests[0].answer
    assert first is not None
    assert {event.job for event in events} == {first.headers["x-tarflow-job"]}


def test_a_key_of_one_s_own_is_used(front: Front, patient: Client) -> None:
    with patient:
        keyed = patient.with_options(idempotency_key="mine")
        assert keyed.sample(model="tiny-cond") == keyed.sample(model="tiny-cond")
    assert front.keys() == ["mine", "mine"]


def test_calibrations_are_not_made_twice(front: Front, patient: Client) -> None:
    front.script = [BUSY, lose_the_answer]
    images = [file(image) for image in normal(24, 12)]
    with patient:
        with pytest.raises(ConnectionFailed):
            patient.calibrations.create("twice", images, model="tiny-uncond")
        assert [request.answer is not None for request in front.requests] == [False, True]
        patient.calibrations.delete("twice", "tiny-uncond")


@pytest.mark.anyio
async def test_nobody_there_is_said(anyio_backend: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url, max_retries=1) as client, pytest.raises(ConnectionFailed, match="cannot connect") as caught:
            client.models.list()
        assert isinstance(caught.value.__cause__, httpx.ConnectError)
        async with AsyncClient(url, max_retries=0) as waiting:
            with pytest.raises(ConnectionFailed, match="cannot connect"):
                await waiting.models.list()


def test_timeouts_are_httpx_own() -> None:
    """A service that accepts and is silent."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.05) as client, pytest.raises(NoAnswerInTime) as caught:
            client.sample()
        assert isinstance(caught.value.__cause__, httpx.ReadTimeout)
        with httpx.Client(timeout=0.05) as http, Client(url, http=http) as client, pytest.raises(NoAnswerInTime):
            client.sample()


def test_the_service_is_told_how_long_to_work(tarflow: Client, front: Front) -> None:
    with Client(front.url, request_timeout=1e-3, max_retries=0) as client:
        # Whichever the service notices first.
        with pytest.raises((errors.TimedOut, errors.SlowBody)):
            client.score(GREY, model="tiny-cond")
        client.with_options(request_timeout=30).score(GREY, model="tiny-cond")
    assert [request.headers["x-request-timeout"] for request in front.requests] == ["0.001", "30"]
    with pytest.raises(InvalidRequest, match="X-Request-Timeout"):
        tarflow.with_options(request_timeout=0).score(GREY)


# Errors.


@pytest.mark.parametrize("kind", STATUS)
def test_every_error_of_the_service_is_one_here(front: Front, patient: Client, kind: type[theirs.ServiceError]) -> None:
    error = kind("what is wrong", param="field", retry_after=1000)
    front.script = [refusal(error, retry_after="1000", x_request_id="r-1")]
    with patient, pytest.raises(ApiError) as caught:
        patient.sample()
    mine = caught.value
    assert type(mine).__name__ == kind.__name__
    assert (mine.message, mine.code, mine.param) == ("what is wrong", error.code, "field")
    assert (mine.status, mine.request_id, mine.retry_after) == (STATUS[kind], "r-1", 1000)
    assert mine.usual_status == mine.status
    assert str(mine) == "what is wrong"


@pytest.mark.parametrize("kind", STATUS)
def test_the_tree_is_the_service_s(kind: type[theirs.ServiceError]) -> None:
    mine = getattr(errors, kind.__name__)
    above = [base.__name__ for base in kind.__mro__ if base not in theirs.ServiceError.__mro__]
    assert [base.__name__ for base in mine.__mro__ if base not in ApiError.__mro__] == above


@pytest.mark.parametrize(
    "kind",
    [
        *(theirs.Canceled, theirs.TimedOut, theirs.WorkerLost, theirs.InternalError, theirs.Unavailable),
        *(theirs.InvalidRequest, theirs.Overloaded, theirs.Unauthorized, theirs.Forbidden),
    ],
)
def test_errors_of_jobs_are_the_same(kind: type[theirs.ServiceError]) -> None:
    mine = errors.of_body(body(kind("gone", param="field"))["error"])
    assert (type(mine).__name__, mine.status, mine.param) == (kind.__name__, STATUS[kind], "field")


@pytest.mark.parametrize(
    ("content", "shown"),
    [("<html> Bad\n gateway </html>", "Bad gateway"), ("", "nothing more"), ('{"error": "x"}', "error"), ("[]", "[]")],
)
@pytest.mark.parametrize(("status", "kind"), [(502, "ApiError"), (404, "NotFound"), (307, "ApiError")])
def test_answers_of_others_are_shown(
    front: Front, patient: Client, content: str, shown: str, status: int, kind: str
) -> None:
    front.script = [answer(status, content)]
    with patient, pytest.raises(ApiError, match=str(status)) as caught:
        patient.models.list()
    assert type(caught.value).__name__ == kind
    assert (caught.value.status, caught.value.code) == (status, None)
    assert shown in str(caught.value)


@pytest.mark.parametrize("content", ["", "<html>", "[]", "3", '{"data": [{}]}'])
def test_an_answer_that_cannot_be_read_is_said(front: Front, patient: Client, content: str) -> None:
    front.script = [answer(200, content)]
    with patient, pytest.raises(UnexpectedAnswer, match="/v1/models"):
        patient.models.list()


def test_errors_of_the_running_service(tarflow: Client) -> None:
    wrong: list[tuple[Any, int, str, str | None]] = [
        (lambda: tarflow.sample(class_="Sneakers"), 422, "class_not_found", "class"),
        (lambda: tarflow.models.get("none"), 404, "model_not_found", "model"),
        (lambda: tarflow.jobs.get("none of these"), 404, "job_not_found", "job"),
        (lambda: list(tarflow.sample.stream(num_images=0)), 422, "invalid_value", "num_images"),
        (lambda: list(tarflow.jobs.events("sample_0")), 404, "job_not_found", "job"),
        (lambda: tarflow.score(b"none"), 422, "invalid_image", "files.0"),
        (lambda: tarflow.score(b"none", class_=3), 422, "invalid_image", "images.0"),
        (lambda: tarflow.calibrations.get("none"), 404, "calibration_not_found", "calibration"),
        (lambda: tarflow.sample(klass="Bag"), 422, "unknown_field", "klass"),
        (lambda: tarflow.with_options(idempotency_key="two words").sample(), 422, "invalid_value", "Idempotency-Key"),
    ]
    for ask, status, code, param in wrong:
        with pytest.raises(ApiError) as caught:
            ask()
        assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, param)
        assert caught.value.request_id
