"""Streams of partial images, as OpenAI's own client reads them."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent

from tests.service.pictures import answered, opened
from tests.service.processes import PATIENCE, ServerProcess

CLOTHES = {"model": "fashion-mnist", "class": "Coat", "seed": 3}


def test_without_partial_images_there_is_one_event(library: openai.OpenAI, client: httpx.Client) -> None:
    [event] = library.images.generate(prompt="coats", stream=True, extra_body={"seed": 3})
    assert isinstance(event, ImageGenCompletedEvent)
    [expected] = answered(client.post("/v1/sample", json=CLOTHES))
    np.testing.assert_array_equal(opened(event.b64_json), expected)
    assert (event.size, event.output_format, event.background, event.quality) == ("28x28", "png", "opaque", "auto")
    assert (event.usage.input_tokens, event.usage.output_tokens, event.usage.total_tokens) == (1, 49, 50)
    assert event.usage.input_tokens_details.text_tokens == 1
    assert event.created_at > 1_700_000_000
    extra = event.model_extra or {}
    assert (extra["seed"], extra["class"], extra["model"]) == (3, "Coat", "fashion-mnist")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_partial_images_are_states_of_the_trajectory(library: openai.OpenAI, client: httpx.Client, count: int) -> None:
    *partial, last = library.images.generate(prompt="coat", stream=True, partial_images=count, extra_body={"seed": 3})
    native = client.post("/v1/sample", json={**CLOTHES, "trajectory": True}).json()["images"][0]
    blocks = []
    for index, event in enumerate(partial):
        assert isinstance(event, ImageGenPartialImageEvent)
        assert event.partial_image_index == index
        assert (event.size, event.output_format) == ("28x28", "png")
        extra = event.model_extra or {}
        assert extra["blocks"] == len(native["trajectory"])
        blocks.append(extra["block"])
        np.testing.assert_array_equal(opened(event.b64_json), opened(native["trajectory"][extra["block"] - 1]))
    assert len(blocks) == count
    assert blocks == sorted(set(blocks))
    assert blocks[-1] < len(native["trajectory"])
    assert isinstance(last, ImageGenCompletedEvent)
    np.testing.assert_array_equal(opened(last.b64_json), opened(native["b64"]))


def test_every_event_is_in_the_format_that_was_asked_for(library: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"output_format": "jpeg", "output_compression": 30, "partial_images": 1}
    events = list(library.images.generate(prompt="fox", model="tiny-cond", stream=True, **asked))
    assert [event.output_format for event in events] == ["jpeg"] * 2
    assert [opened(event.b64_json).shape for event in events] == [(16, 16, 3)] * 2


def test_what_is_refused_is_refused_before_the_stream(library: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'Coat'"):
        library.images.generate(prompt="coot", stream=True, partial_images=1)
    with pytest.raises(openai.NotFoundError):
        library.images.generate(prompt="coat", model="nobody", stream=True)


def test_the_events_on_the_wire(client: httpx.Client) -> None:
    """Each has its name and one line of data: what any reader of events expects."""
    asked = {"prompt": "dog", "model": "tiny-cond", "stream": True, "partial_images": 1}
    answer = client.post("/v1/images/generations", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    assert [lines[0] for lines in events] == [
        "event: image_generation.partial_image",
        "event: image_generation.completed",
    ]
    assert all(len(lines) == 2 and lines[1].startswith('data: {"') for lines in events)


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "stream"}, {"Prefer": "respond-async"}])
def test_what_a_stream_cannot_give_is_refused(library: openai.OpenAI, headers: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        library.images.generate(prompt="dog", model="tiny-cond", stream=True, extra_headers=headers)
    assert caught.value.param == "stream"
    assert next(iter(headers)) in caught.value.message


def test_the_job_of_a_stream_can_be_read(client: httpx.Client) -> None:
    asked = {"prompt": "dog", "model": "tiny-cond", "stream": True}
    answer = client.post("/v1/images/generations", json=asked)
    job = client.get(f"/v1/jobs/{answer.headers['x-tarflow-job']}").json()
    assert job["state"] == "completed"
    assert job["result"]["images"][0]["b64"] in answer.text


@pytest.mark.anyio
async def test_the_asynchronous_client_streams(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE) as library:
        stream = await library.images.generate(prompt="owl", model="tiny-cond", stream=True, partial_images=2)
        kinds = [event.type async for event in stream]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.partial_image"}
