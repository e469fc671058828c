"""Uploads that cannot be used: refused clearly, never a 500."""

from __future__ import annotations

import io
from typing import Any

import httpx
import pytest
from PIL import Image

from service.api.uploads import SMALL_BYTES
from tests.service.pictures import b64, bomb, file, pixels

GOOD = file(pixels(28))


def _animated() -> bytes:
    frames = [Image.fromarray(pixels(28, 1, seed)) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BAD = {
    "text": (b"this is no image", "invalid_image"),
    "html": (b"<html></html>" * 100, "invalid_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "invalid_image"),
    "empty": (b"", "empty_image"),
    "truncated png": (GOOD[: len(GOOD) // 2], "invalid_image"),
    "header only": (GOOD[:30], "invalid_image"),
    "truncated jpeg": (file(pixels(200), "JPEG")[:3000], "invalid_image"),
    "animated gif": (_animated(), "animated_image"),
    "bomb": (bomb(7072), "image_too_large"),
    "floating point": (file(Image.new("F", (28, 28)), "TIFF"), "unsupported_image"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("endpoint", ["score", "classify", "encode", "denoise"])
def test_a_bad_image_is_refused_by_name(client: httpx.Client, what: str, endpoint: str) -> None:
    data, code = BAD[what]
    files = [("files", ("good.png", GOOD)), ("files", ("bad.dat", data))]
    response = client.post(f"/v1/{endpoint}", files=files)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("files.1", code)
    assert "bad.dat" in error["message"]
    response = client.post(f"/v1/{endpoint}", json={"images": [b64(GOOD), b64(data)]})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "images.1")
    assert response.json()["error"]["code"] == code


def _post(client: httpx.Client, **request: Any) -> tuple[int, str | None, str]:
    response = client.post("/v1/score", **request)
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def test_no_files(client: httpx.Client) -> None:
    boundary = "multipart/form-data; boundary=x"
    content = b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n3\r\n--x--\r\n'
    got = _post(client, content=content, headers={"content-type": boundary})
    assert got == (422, "files", "missing_field")
    assert _post(client, content=b"--x--\r\n", headers={"content-type": boundary})[0] == 422


def test_too_many_files(client: httpx.Client) -> None:
    for count in (65, 100):
        status, _, code = _post(client, files=[("files", (f"{i}.png", GOOD)) for i in range(count)])
        assert (status, code) in [(422, "invalid_value"), (400, "malformed_body")]


PART = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n1\r\n'


@pytest.mark.parametrize("endpoint", ["score", "calibrations"])
@pytest.mark.parametrize(
    "parts",
    {
        "fields": [PART % (b"a%d" % i, b"") for i in range(101)],
        "headers of a part": [PART % (b"seed", b"X-More: a\r\n" * 100)],
        "a long header": [PART % (b"seed", b"X-More: " + b"a" * 10_000 + b"\r\n")],
    }.values(),
)
def test_forms_have_an_end(client: httpx.Client, endpoint: str, parts: list[bytes]) -> None:
    content = b"".join(parts) + b"--x--\r\n"
    response = client.post(
        f"/v1/{endpoint}", content=content, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body"), response.text


def test_text_instead_of_a_file(client: httpx.Client) -> None:
    boundary = "multipart/form-data; boundary=x"
    content = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\n@image.png\r\n--x--\r\n'
    assert _post(client, content=content, headers={"content-type": boundary}) == (422, "files", "invalid_value")


def test_a_file_in_another_field(client: httpx.Client) -> None:
    assert _post(client, files={"picture": ("a.png", GOOD)}) == (422, "picture", "unknown_field")


@pytest.mark.parametrize("value", ["[" * 60_000, "{}", "NaN", "1e400", "-1", "\ud800".encode("utf-8", "replace")])
def test_a_strange_form_value(client: httpx.Client, value: str) -> None:
    assert _post(client, files={"files": ("a.png", GOOD)}, data={"seed": value})[:2] == (422, "seed")


def test_a_form_value_without_end(client: httpx.Client) -> None:
    got = _post(client, files={"files": ("a.png", GOOD)}, data={"seed": "1" * 100_000})
    assert got == (400, None, "malformed_body")


@pytest.mark.parametrize("endpoint", ["score", "classify", "encode", "denoise"])
def test_a_form_that_was_cut_off(client: httpx.Client, endpoint: str) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + GOOD + b"\r\n--x"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(f"/v1/{endpoint}", content=content + b"--\r\n", headers=headers).status_code == 200
    response = client.post(f"/v1/{endpoint}", content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")


def test_few_bytes_of_many_pixels(client: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("L", (600, 600), 7).save(buffer, "PNG")
    assert len(buffer.getvalue()) < SMALL_BYTES
    [result] = client.post("/v1/score", files={"files": ("a.png", buffer.getvalue())}).json()["images"]
    assert [notice["code"] for notice in result["warnings"]] == ["resized"]


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=other"]
)
def test_a_broken_form(client: httpx.Client, content_type: str) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n3\r\n--x--\r\n'
    assert _post(client, content=content, headers={"content-type": content_type})[0] in (400, 422)


@pytest.mark.parametrize("content_type", ["image/png", "text/plain", "application/x-www-form-urlencoded", None])
def test_another_content_type(client: httpx.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert _post(client, content=GOOD, headers=headers) == (400, None, "unsupported_content_type")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"images": ["\xff"]}', b"{'a': 1}"])
def test_malformed_json(client: httpx.Client, content: bytes) -> None:
    got = _post(client, content=content, headers={"content-type": "application/json"})
    assert got == (400, None, "malformed_body")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"3"])
def test_json_that_is_no_object(client: httpx.Client, content: bytes) -> None:
    assert _post(client, content=content, headers={"content-type": "application/json"})[0] in (400, 422)
