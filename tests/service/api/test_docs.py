"""/docs and /openapi.json: complete, and every example works when tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx

from tests.service.pictures import answered

IMAGES = "/v1/images/generations"
FORM_ONLY = "/v1/calibrations"
"""Takes dozens of files, for which JSON has no place."""
INFER = "/v2/models/{model_name}/infer"


def _examples(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All JSON bodies that the documentation offers."""
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        schema = content.get("schema", {})
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        yield from ((path, example) for example in schema.get("examples", []))
        if "example" in content:
            yield path, content["example"]


def test_every_example_works(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    examples = list(_examples(document))
    posts = {path for path, operations in document["paths"].items() if "post" in operations}
    native = {f"/v1/{op}" for op in ("sample", "score", "classify", "encode", "decode", "denoise")}
    assert posts == {*native, FORM_ONLY, IMAGES, INFER}
    assert {path for path, _ in examples} == posts - {FORM_ONLY}
    for path, body in examples:
        parameters = document["paths"][path]["post"].get("parameters", [])
        names = {each["name"]: each["schema"]["examples"][0] for each in parameters if each["in"] == "path"}
        response = client.post(path.format(**names), json=body)
        assert response.status_code == 200, (path, response.text)
        if path in ("/v1/sample", "/v1/decode", "/v1/denoise"):
            assert answered(response)


def test_every_reference_leads_somewhere(client: httpx.Client) -> None:
    response = client.get("/openapi.json")
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', response.text))
    assert names <= response.json()["components"]["schemas"].keys()


def test_the_page_is_there(client: httpx.Client) -> None:
    response = client.get("/docs")
    assert response.status_code == 200
    assert "swagger" in response.text.lower()


def test_files_are_documented_as_files(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path in ("/v1/score", "/v1/classify", "/v1/encode", "/v1/denoise"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert schema["required"] == ["files"]
        assert "seed" in schema["properties"]
    schema = document["paths"][FORM_ONLY]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["required"] == ["name", "files"]
    assert schema["properties"].keys() == {"name", "model", "seed", "replace", "files"}
