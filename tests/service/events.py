"""Server-sent events as clients read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

EVENTS = {"Accept": "text/event-stream"}


@dataclass
class Heard:
    """One event."""

    kind: str = "message"
    id: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    retry: str = ""


def parsed(lines: Iterable[str]) -> Iterator[Heard]:
    """Events of a stream's lines, as the HTML standard reads them; comments are nothing."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and "data" in fields:
            yield Heard(
                kind=fields.get("event", "message"),
                id=fields.get("id", ""),
                data=json.loads(fields["data"]),
                retry=fields.get("retry", ""),
            )
        if not line:
            fields = {}
            continue
        name, _, value = line.partition(":")
        if name == "data" and "data" in fields:
            fields["data"] += "\n" + value.removeprefix(" ")
        elif name:
            fields[name] = value.removeprefix(" ")


def told(response: httpx.Response) -> list[Heard]:
    """All events of an answer that has ended."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(parsed(response.text.split("\n")))
