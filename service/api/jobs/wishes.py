"""How a request wants to be answered: at once, later, or as a stream; and whether it may be a repetition."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from enum import StrEnum

from fastapi import Request

from service.api.recipes.base import Prepared
from service.api.rendering import qualities
from service.errors import InvalidRequest

EVENT_STREAM = "text/event-stream"
LONGEST_KEY = 255
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Mode(StrEnum):
    """In which form the answer comes."""

    SYNC = "sync"
    ASYNC = "async"
    STREAM = "stream"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the headers of a request ask for."""

    mode: Mode = Mode.SYNC
    asynchronous: bool = False
    """Whether ``respond-async`` is preferred."""
    wait: int | None = None
    """Seconds that an asynchronous request waits for the answer itself."""
    idempotency_key: str | None = None

    @property
    def outlives(self) -> bool:
        """Whether the job goes on when the connection ends: who has a key may come back, and is to find it."""
        return self.asynchronous or self.idempotency_key is not None

    @property
    def applied(self) -> str:
        """The header Preference-Applied of a 202 (RFC 7240)."""
        return "respond-async" if self.wait is None else f"respond-async, wait={self.wait}"


USUAL = Wishes()


def wishes_of(request: Request) -> Wishes:
    """Read Prefer, Accept and Idempotency-Key; raises ``InvalidRequest`` for a key that cannot be one."""
    headers = request.headers
    accept = headers.get("accept", "")
    streams = EVENT_STREAM in accept.lower() and _prefers_events(accept)
    prefer, keys = headers.getlist("prefer"), headers.getlist("idempotency-key")
    preferences = _preferences(prefer)
    asynchronous = "respond-async" in preferences
    if not (streams or asynchronous or keys):
        return USUAL
    # Preferences that cannot be understood are to be ignored.
    wait = preferences.get("wait", "")
    return Wishes(
        mode=Mode.STREAM if streams else Mode.ASYNC if asynchronous else Mode.SYNC,
        asynchronous=asynchronous,
        wait=int(wait) if wait.isascii() and wait.isdecimal() and len(wait) < 10 else None,
        idempotency_key=_checked(keys),
    )


def _prefers_events(accept: str) -> bool:
    found = qualities(accept)
    events = found.get(EVENT_STREAM, 0.0)
    return events > 0 and all(events >= quality for quality in found.values())


def _preferences(headers: list[str]) -> dict[str, str]:
    """Preferences by name, the first of each; their parameters are none of ours."""
    found: dict[str, str] = {}
    for part in ",".join(headers).split(","):
        name, _, value = part.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def _checked(keys: list[str]) -> str | None:
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequest(f"Idempotency-Key: got {len(keys)} of them, allowed is one", param="Idempotency-Key")
    [key] = keys
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"Idempotency-Key: got {len(key)} characters ({key[:40]!r}), allowed are 1 to {LONGEST_KEY} visible ASCII "
            "characters",
            param="Idempotency-Key",
        )
    return key


def fingerprint(request: Request, prepared: Prepared, mode: Mode) -> str:
    """Digest of what a request asks for; boundaries of forms, spaces and the order of fields are no part of it."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)

    for text in (request.method, request.url.path, mode):
        add(text.encode())
    # Only what was sent: a field that says what would be taken anyhow may mean more than none. Images are beside it,
    # and what nobody knows is ignored here, too.
    ignored = {"images", *(prepared.body.model_extra or ())}
    fields = prepared.body.model_dump(exclude_unset=True, exclude=ignored)
    # Pydantic's own writer refuses half a surrogate pair, which a text may have.
    add(json.dumps(fields).encode())
    for upload in prepared.uploads:
        add((upload.filename or "").encode())
        add(upload.data)
    return digest.hexdigest()
