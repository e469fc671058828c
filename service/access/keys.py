"""API keys as they are written down: a TOML table for each, with the hash of its secret.

::

    [acme]
    sha256 = "8d5f…"               # or a list, while a secret is being replaced
    scopes = ["infer"]
    priority = "high"              # high, normal or low
    rate = "600/minute"            # requests; second, minute, hour or day
    concurrent_cost = 200000       # images × patches × passes of jobs that have not ended
    expires = 2027-01-31           # refused from then on; UTC where no zone is given

Secrets are 256 random bits, not words that people think of: nobody can try them out, so one plain SHA-256 keeps a
stolen file as useless as a slow hash would, and costs a request a microsecond rather than a tenth of a second of CPU
that anybody could ask for.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from model.bundle import NAMES, is_name
from service.access.caller import Caller, Scope
from service.jobs import Priority

PREFIX = "tarflow_"
"""What every secret begins with: scanners for leaked secrets find it."""
MOST_COST = 2**53
"""Up to here everything that counts, Redis included, counts exactly."""
RATE = r"[1-9][0-9]{0,8}/(second|minute|hour|day)"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class InvalidKeys(ValueError):
    """A text that says no keys; the message names the key and the field, and shows no value: it may be a secret."""


@dataclass(frozen=True)
class Key:
    """A caller, and until when it is one."""

    caller: Caller
    expires: float | None = None
    """Unix time from which on it is refused."""


class KeyEntry(BaseModel):
    """A key's table."""

    model_config = ConfigDict(extra="forbid")

    sha256: Digest | Annotated[list[Digest], Field(min_length=1)]
    scopes: Annotated[list[Scope], Field(min_length=1)]
    priority: Priority = Priority.NORMAL
    rate: Annotated[str, Field(pattern=rf"^{RATE}$")] | None = None
    concurrent_cost: Annotated[int, Field(ge=1, le=MOST_COST, strict=True)] | None = None
    expires: Annotated[datetime, Strict()] | Annotated[date, Strict()] | None = None

    @property
    def digests(self) -> list[bytes]:
        """The hashes of its secrets."""
        return [bytes.fromhex(text) for text in ([self.sha256] if isinstance(self.sha256, str) else self.sha256)]

    @property
    def expires_at(self) -> float | None:
        """Unix time."""
        if self.expires is None:
            return None
        moment = self.expires
        if not isinstance(moment, datetime):
            moment = datetime(moment.year, moment.month, moment.day)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    def key(self, name: str) -> Key:
        """As it is used."""
        caller = Caller(
            name=name,
            priority=self.priority,
            scopes=frozenset(self.scopes),
            rate=self.rate,
            concurrent_cost=self.concurrent_cost or 0,
        )
        return Key(caller, self.expires_at)


_ALLOWED = {
    "sha256": "allowed are the 64 hexadecimal digits of a SHA-256, or a list of such",
    "scopes": f"allowed is a list of {', '.join(Scope)}",
    "priority": f"allowed are {', '.join(Priority)}",
    "rate": "allowed is a number of requests in a window, like '600/minute' (second, minute, hour or day)",
    "concurrent_cost": f"allowed is a whole number from 1 on, up to {MOST_COST}",
    "expires": "allowed is a date like 2027-01-31, or one with a time",
}
"""What each field may be."""


def new_secret() -> str:
    """A secret that was never there before."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def parse(text: str) -> dict[str, KeyEntry]:
    """The keys of a text, by name; raises :class:`InvalidKeys`."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Not only its own kind of error: an integer of thousands of digits and deep nesting raise others.
        raise InvalidKeys(f"not TOML: {error}") from None
    if not tables:
        raise InvalidKeys("there is no key in it; 'tarflow keys new NAME --scope infer' makes one")
    entries = {}
    for name, table in tables.items():
        if not is_name(name):
            raise InvalidKeys(f"{name[:100]!r} is no name of a key, allowed is {NAMES}")
        if not isinstance(table, dict):
            raise InvalidKeys(f"{name}: it must be a table: [{name}], and its fields below")
        try:
            entries[name] = made(**table)
        except InvalidKeys as error:
            raise InvalidKeys(f"{name}.{error}") from None
    by_digest(entries)
    return entries


def made(**fields: Any) -> KeyEntry:
    """A key's table of these fields; raises :class:`InvalidKeys` beginning with the one that is wrong."""
    try:
        return KeyEntry(**fields)
    except ValidationError as error:
        field = str(error.errors(include_input=False)[0]["loc"][0])[:100]
        allowed = _ALLOWED.get(field, f"there is no such field, allowed are {', '.join(_ALLOWED)}")
        raise InvalidKeys(f"{field}: {allowed}") from None


def by_digest(entries: Mapping[str, KeyEntry]) -> dict[bytes, Key]:
    """The keys by the hash of each secret; raises :class:`InvalidKeys` where two have the same."""
    keys: dict[bytes, Key] = {}
    for name, entry in entries.items():
        for hashed in entry.digests:
            if hashed in keys:
                raise InvalidKeys(f"{name}.sha256: {keys[hashed].caller.name!r} has the same secret")
            keys[hashed] = entry.key(name)
    return keys


def written(name: str, entry: KeyEntry) -> str:
    """A key's table as text."""
    header = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    lines = [f"[{header}]", f"sha256 = {json.dumps(entry.sha256)}"]
    lines.append(f"scopes = {json.dumps([str(scope) for scope in entry.scopes])}")
    if entry.priority is not Priority.NORMAL:
        lines.append(f'priority = "{entry.priority}"')
    if entry.rate is not None:
        lines.append(f'rate = "{entry.rate}"')
    if entry.concurrent_cost is not None:
        lines.append(f"concurrent_cost = {entry.concurrent_cost}")
    if entry.expires is not None:
        lines.append(f"expires = {entry.expires.isoformat()}")
    return "\n".join(lines) + "\n"
