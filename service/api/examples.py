"""Examples in /docs that work when tried: request bodies for endpoints that take images."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import numpy as np

from model.images import encode_image
from service.api.schemas import ImagesRequest


@cache
def picture() -> str:
    """A small trouser-like picture as a base64 PNG, for any model: it is resized to fit."""
    pixels = np.zeros((1, 28, 28), np.uint8)
    pixels[:, 2:7, 8:20] = 200
    pixels[:, 7:26, 8:13] = 180
    pixels[:, 7:26, 15:20] = 180
    return base64.b64encode(encode_image(pixels, "png")).decode()


def body(kind: type[ImagesRequest]) -> dict[str, Any]:
    """OpenAPI description of a body that may come as JSON or as multipart form."""
    schema = kind.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
    fields = {name: value for name, value in schema["properties"].items() if name != "images"}
    # An example with a class would not fit unconditional models.
    for value in fields.values():
        value.pop("examples", None)
    files = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
        "description": "Image files: PNG, JPEG, WebP, BMP, TIFF or single-frame GIF.",
    }
    document = {**schema, "properties": {"images": schema["properties"]["images"], **fields}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": document, "example": {"images": [picture()]}},
                "multipart/form-data": {
                    "schema": {"type": "object", "required": ["files"], "properties": {"files": files, **fields}}
                },
            },
        }
    }
