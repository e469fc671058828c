"""POST /v1/images/generations, as OpenAI's own client asks and reads."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.service.conftest import CLASSES
from tests.service.pictures import answered, opened
from tests.service.processes import PATIENCE, ServerProcess

TINY = "tiny-cond"


def test_an_image_comes_without_further_ado(library: openai.OpenAI, server: ServerProcess) -> None:
    made = library.images.generate(prompt="a sneaker")
    assert made.data is not None
    assert made.usage is not None
    [image] = made.data
    assert opened(image.b64_json or "").shape == (28, 28)
    assert base64.b64decode(image.b64_json or "").startswith(b"\x89PNG")
    assert (made.size, made.output_format, made.background) == ("28x28", "png", "opaque")
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (1, 49, 50)
    assert made.created > 1_700_000_000
    assert made._request_id
    assert server.metric("tarflow_requests_total", op="sample", model="fashion-mnist", outcome="ok") >= 1


def test_it_is_the_image_of_the_native_api(library: openai.OpenAI, client: httpx.Client) -> None:
    more = {"seed": 5, "guidance_scale": 1.5, "guidance_schedule": "linear", "denoise": False, "certify": True}
    made = library.images.generate(prompt="foxes", model=TINY, n=3, extra_body=more)
    native = client.post("/v1/sample", json={"model": TINY, "class": "fox", "num_images": 3, **more})
    assert made.data is not None
    for image, expected, pixels in zip(made.data, native.json()["images"], answered(native), strict=True):
        extra = image.model_extra or {}
        np.testing.assert_array_equal(opened(image.b64_json or ""), pixels)
        assert (extra["seed"], extra["class"]) == (expected["seed"], "fox")
        assert (extra["certified"], extra["redone"]) == (True, None)
        assert extra["backward_error"] == expected["backward_error"]
    ours = made.model_extra or {}
    assert ours["model"] == TINY
    assert ours["parameters"]["guidance_scale"] == 1.5
    assert ours["warnings"] == []


def test_a_model_without_classes_draws_anything(library: openai.OpenAI) -> None:
    made = library.images.generate(prompt="anything", model="tiny-uncond", size="12x12", n=2)
    assert [opened(image.b64_json or "").shape for image in made.data or []] == [(12, 12)] * 2
    assert made.usage is not None
    assert made.usage.input_tokens == 0


@pytest.mark.parametrize(("file_format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_every_format(library: openai.OpenAI, file_format: Any, magic: bytes) -> None:
    made = library.images.generate(prompt="dog", model=TINY, output_format=file_format, response_format="b64_json")
    [image] = made.data or []
    assert base64.b64decode(image.b64_json or "").startswith(magic)
    assert made.output_format == file_format


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_compression_makes_files_smaller(library: openai.OpenAI, file_format: Any) -> None:
    sizes = []
    for compression in (100, 50, 0):
        made = library.images.generate(
            prompt="Bag", output_format=file_format, output_compression=compression, extra_body={"seed": 1}
        )
        [image] = made.data or []
        sizes.append(len(image.b64_json or ""))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]


def test_what_changes_nothing_is_accepted(library: openai.OpenAI) -> None:
    made = library.images.generate(
        prompt="cat",
        model=TINY,
        size="auto",
        quality="high",
        style="vivid",
        moderation="low",
        background="auto",
        complexity="low",
        user="somebody",
        safety_identifier="somebody",
        stream=False,
        partial_images=0,
        extra_body={"negative_prompt": "dogs", "another": None},
    )
    assert len(made.data or []) == 1
    [warning] = (made.model_extra or {})["warnings"]
    assert warning["code"] == "unknown_field"
    assert "negative_prompt" in warning["message"]


def test_nothing_is_the_same_as_null(library: openai.OpenAI) -> None:
    names = ("n", "size", "response_format", "output_format", "output_compression", "background", "stream")
    names += ("partial_images", "quality", "style", "moderation", "frame_count", "svg")
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert len(library.images.generate(prompt="cat", model=TINY, **nulls).data or []) == 1


REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"prompt": "kat"}, "prompt", "class_not_found", "did you mean 'cat'?"),
    ({"prompt": ""}, "prompt", "class_not_found", "'cat', 'dog'"),
    ({"prompt": 3}, "prompt", "invalid_value", "string"),
    ({"n": 0}, "n", "invalid_value", "1"),
    ({"n": 11}, "n", "invalid_value", "10"),
    ({"size": "1024x1024"}, "size", "unsupported_value", "'16x16'"),
    ({"response_format": "url"}, "response_format", "unsupported_value", "'b64_json'"),
    ({"output_format": "gif"}, "output_format", "invalid_value", "'png'"),
    ({"output_format": "npy"}, "output_format", "invalid_value", "'png'"),
    ({"output_compression": 50}, "output_compression", "unsupported_value", "jpeg and webp"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "invalid_value", "100"),
    ({"background": "transparent"}, "background", "unsupported_value", "alpha"),
    ({"quality": "best"}, "quality", "invalid_value", "'auto'"),
    ({"frame_count": 3}, "frame_count", "unsupported_value", "animations"),
    ({"svg": {"model": "x"}}, "svg", "unsupported_value", "drawings"),
    ({"partial_images": 2}, "partial_images", "unsupported_value", "stream"),
    ({"stream": True, "partial_images": 4}, "partial_images", "invalid_value", "3"),
    ({"stream": True, "n": 2}, "n", "unsupported_value", "1 in a stream"),
    ({"extra_body": {"seed": -1}}, "seed", "invalid_value", "0"),
    ({"extra_body": {"seed": 2**53 - 1}, "n": 2}, "seed", "invalid_value", "2 images"),
    ({"extra_body": {"tolerance": 7}}, "tolerance", "invalid_value", "1"),
    ({"extra_body": {"guidance_scale": "much"}}, "guidance_scale", "invalid_value", "number"),
    ({"extra_body": {"guidance_window": [3, 1]}}, "guidance_window", "invalid_value", "start < stop"),
]


@pytest.mark.parametrize(("asked", "param", "code", "shown"), REFUSED)
def test_what_cannot_be_done_is_a_bad_request(
    library: openai.OpenAI, asked: dict[str, Any], param: str, code: str, shown: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        library.images.generate(**{"prompt": "cat", "model": TINY, **asked})
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert str(error.body["message"]).startswith(f"{param}: ") if isinstance(error.body, dict) else False
    assert shown in error.message
    assert error.request_id


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"prompt": "\xff"}'])
def test_what_is_no_request_at_all(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_field_of_any_name_is_tolerated(client: httpx.Client) -> None:
    content = b'{"prompt": "cat", "model": "tiny-cond", "\\u2028": 1, "\\u0000": [], "class": "dog"}'
    answer = client.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["warnings"]) == 3
    assert answer.json()["data"][0]["class"] == "cat"


def test_an_unknown_model_is_not_found(library: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-image-1', served are 'fashion-mnist'") as caught:
        library.images.generate(prompt="cat", model="gpt-image-1")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_an_unknown_path_is_not_found(library: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        library.images.edit(image=b"x", prompt="a cat")
    with pytest.raises(openai.NotFoundError):
        library.models.retrieve("nobody")


def test_models_are_listed_and_described(library: openai.OpenAI) -> None:
    listed = list(library.models.list())
    assert [model.id for model in listed][:2] == ["fashion-mnist", TINY]
    for model in listed:
        assert (model.object, model.owned_by) == ("model", "tarflow")
        described = library.models.retrieve(model.id)
        assert (described.id, described.created, described.object) == (model.id, model.created, "model")
    described = library.models.retrieve(TINY)
    assert (described.model_extra or {})["class_names"] == list(CLASSES)


def test_raw_responses(library: openai.OpenAI) -> None:
    raw = library.images.with_raw_response.generate(prompt="cat", model=TINY, extra_headers={"x-request-id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.http_response.status_code == 200
    assert raw.parse()._request_id == "mine-1"


@pytest.mark.anyio
async def test_the_asynchronous_client(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE) as library:
        made = await library.images.generate(prompt="owls", model=TINY)
        assert opened((made.data or [])[0].b64_json or "").shape == (16, 16, 3)
        assert {model.id async for model in library.models.list()} >= {"fashion-mnist", TINY}
        with pytest.raises(openai.NotFoundError):
            await library.images.generate(prompt="owls", model="nobody")


@pytest.mark.parametrize("odd", ["\ud800", "deep"])
def test_what_is_ignored_is_no_part_of_a_repetition(client: httpx.Client, odd: str) -> None:
    """Whatever it is: JSON's own readers and writers do not agree on all of it."""
    value = "[" * 900 + "]" * 900 if odd == "deep" else json.dumps(odd)
    headers = {"Idempotency-Key": f"ignored-{odd == 'deep'}", "Content-Type": "application/json"}
    body = '{"prompt": "cat", "model": "tiny-cond", "seed": 1%s}'
    first = client.post("/v1/images/generations", content=body % f', "odd": {value}', headers=headers)
    assert first.status_code == 200, first.text
    again = client.post("/v1/images/generations", content=body % "", headers=headers)
    assert (again.json()["id"], again.json()["data"]) == (first.json()["id"], first.json()["data"])
