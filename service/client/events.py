"""What happens to a job: server-sent events, read as the HTML standard says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from service.client import errors
from service.client.answers import Image
from service.jobs import FINAL

T = TypeVar("T")
RECONNECT = "reconnect"
"""What a service that leaves says last; the client hears it, and connects again."""


@dataclass(frozen=True, kw_only=True)
class Event(Generic[T]):
    """Something that happened to a job: ``queued``, ``started``, ``progress``, ``preview``, ``requeued``, and at last
    ``completed``, ``failed`` or ``canceled``."""

    kind: str
    id: str
    """For ``after``, to be told of later ones only."""
    data: Mapping[str, Any]
    """As it came."""
    read: Callable[[Any], T] = field(repr=False)

    @property
    def job(self) -> str:
        """Id of the job."""
        return str(self.data["job"])

    @property
    def final(self) -> bool:
        """Whether it is the job's last."""
        return self.kind in FINAL

    @property
    def fraction(self) -> float | None:
        """Share of the work that is done, of ``progress``."""
        return self.data.get("fraction")

    @property
    def images(self) -> list[Image]:
        """Images on the way, of ``preview``: after ``data["block"]`` of ``data["blocks"]``."""
        return [Image.model_validate(image) for image in self.data.get("images", ())]

    def result(self) -> T:
        """The answer, of ``completed``; raises the job's error of ``failed`` and ``canceled``, ``ValueError`` of
        others."""
        if not self.final:
            raise ValueError(f"only the last event has a result, this is {self.kind!r}")
        if self.data.get("error") is not None:
            raise errors.of_body(self.data["error"])
        return self.read(self.data["result"])


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One event of a stream, before anybody knows what it means."""

    kind: str
    id: str
    data: str
    retry: float | None
    """Seconds after which to connect again."""


class Parser:
    """Makes events of lines."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}
        self._data: list[str] = []

    def feed(self, line: str) -> Heard | None:
        """Take one line; returns an event where it ends one."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name:  # without a name it is a comment
                self._fields[name] = value
            return None
        fields, data = self._fields, self._data
        self._fields, self._data = {}, []
        if not data:
            return None
        retry = fields.get("retry", "")
        return Heard(
            kind=fields.get("event", "message"),
            id=fields.get("id", ""),
            data="\n".join(data),
            retry=int(retry) / 1000 if retry.isascii() and retry.isdecimal() else None,
        )


def event_of(heard: Heard, read: Callable[[Any], T]) -> Event[T]:
    """What an event means; raises ``UnexpectedAnswer`` where that is nothing."""
    try:
        data = json.loads(heard.data)
    except ValueError as error:
        raise errors.UnexpectedAnswer(f"an event is not JSON: {error}") from error
    return Event(kind=heard.kind, id=heard.id, data=data, read=read)
