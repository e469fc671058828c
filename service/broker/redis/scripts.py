"""The Lua scripts: each is the common beginning and one file of an operation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_BEGINNING = ("common", "fairness", "lifecycle")
_ADMITTING = frozenset({"check", "submit"})


@dataclass(frozen=True)
class Script:
    """One operation, atomic in Redis."""

    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The operation's script; a Redis that does not know its digest is sent the source."""
    return composed("service.broker.redis", *_BEGINNING, *(("admission",) if name in _ADMITTING else ()), name)


@cache
def composed(package: str, *parts: str) -> Script:
    """The files of a package's folder ``lua``, one after the other."""
    source = "\n".join((files(package) / "lua" / f"{part}.lua").read_text("utf-8") for part in parts)
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
