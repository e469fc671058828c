"""Every error comes in the envelope, with the status that fits."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from service import errors
from service.api.envelope import STATUS
from service.errors import ServiceError

JSON = {"content-type": "application/json"}


def envelope(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/nothing", "/v1/sample/more", "/v1/models/a/b", "/v1/%ED%A0%80"]
)
def test_404(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    error = envelope(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/sample", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/readyz", "GET, HEAD"),
        ("PUT", "/v1/calibrations", "GET, POST"),
        ("POST", "/v1/calibrations/own", "GET, DELETE"),
    ],
)
def test_405_says_what_is_allowed(client: httpx.Client, method: str, path: str, allow: str) -> None:
    response = client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    assert envelope(response)["code"] == "method_not_allowed"


def test_413_at_the_door(client: httpx.Client) -> None:
    """Before the body is sent: a client that waits for "continue" never sends it."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999\r\n\r\n")
        connection.settimeout(60)
        answer = b""
        # Head and body may come in pieces; the body is what ends with the envelope's braces.
        while not answer.endswith(b"}}") and (part := connection.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"body_too_large"' in answer


@pytest.mark.parametrize("content", [b"{", b"", b"{'a': 1}", b'{"a": 1,}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
@pytest.mark.parametrize("path", ["/v1/sample", "/v1/decode"])
def test_malformed_json_is_400(client: httpx.Client, content: bytes, path: str) -> None:
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code == 400, response.text
    assert envelope(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b"null"])
def test_json_that_is_no_object_is_refused(client: httpx.Client, content: bytes) -> None:
    response = client.post("/v1/sample", content=content, headers=JSON)
    assert response.status_code in (400, 422)
    envelope(response)


def test_json_under_another_type_is_400(client: httpx.Client) -> None:
    response = client.post("/v1/sample", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in envelope(response)["message"]


def test_422_names_what_is_missing(client: httpx.Client) -> None:
    response = client.post("/v1/decode", json={})
    assert response.status_code == 422
    error = envelope(response)
    assert (error["param"], error["code"]) == ("latents", "missing_field")


@pytest.mark.parametrize("text", ["\ud800", "\0", "a" * 100_000, "../../etc/passwd", "\u202e"])
@pytest.mark.parametrize("field", ["class", "model", "output_format", "\u202e"])
def test_strange_text_is_refused(client: httpx.Client, field: str, text: str) -> None:
    response = client.post("/v1/sample", content=json.dumps({field: text}), headers=JSON)
    assert response.status_code in (404, 422)
    envelope(response)


def test_a_request_id_is_given_or_kept(client: httpx.Client) -> None:
    first, second = (client.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert first != second
    assert client.get("/healthz", headers={"x-request-id": "mine-1.2_3"}).headers["x-request-id"] == "mine-1.2_3"
    for strange in ("a b", "x" * 101, "ä".encode().decode("latin-1")):
        kept = client.get("/healthz", headers=[(b"x-request-id", strange.encode("latin-1"))]).headers["x-request-id"]
        assert kept != strange


def _leaves(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [leaf for child in kind.__subclasses__() for leaf in (child, *_leaves(child))]


@pytest.mark.parametrize("kind", _leaves(ServiceError))
def test_every_error_has_a_status_and_travels(kind: type[ServiceError]) -> None:
    assert kind in STATUS
    assert kind.__name__ in (errors.__doc__ or "")
    error = ServiceError.from_wire(kind("message", code="c", param="p").to_wire())
    assert (type(error), error.message, error.code, error.param) == (kind, "message", "c", "p")


def test_an_unknown_error_is_internal() -> None:
    error = ServiceError.from_wire({"error": "FromTheFuture", "message": "m"})
    assert (type(error), error.code) == (errors.InternalError, "internal_error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/decode", {"latents": [[[""] * 200_000]]}),
        ("/v1/decode", {"latents": [[0] * 200_000]}),
        ("/v1/score", {"images": [1] * 4000}),
        ("/v1/score", {"images": ["x"] * 5000}),
    ],
)
def test_many_wrong_values_are_one_short_error(client: httpx.Client, path: str, body: dict[str, object]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert len(answer.content) < 1000
    assert answer.json()["error"]["param"].split(".")[0] in body
