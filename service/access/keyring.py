"""The keys that are in force: of a text, or of a file that may be edited while the service runs."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from pathlib import Path

import anyio.to_thread

from service.access.caller import Caller
from service.access.keys import InvalidKeys, Key, KeyEntry, by_digest, digest, parse, written
from service.errors import Unauthorized
from service.settings import Settings

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MOST_SECRET = 512
"""Characters of a secret; what is longer was never one."""


class Keyring:
    """Tells whose a secret is."""

    def __init__(self, text: str, path: Path | None = None) -> None:
        """Raises :class:`InvalidKeys`; ``path`` is where the text was read and is looked for changes."""
        self.entries = parse(text)
        """By name."""
        self._keys: dict[bytes, Key] = by_digest(self.entries)
        self._path, self._text = path, text

    @classmethod
    def of_file(cls, path: Path) -> Keyring:
        """The keys of a file; raises :class:`InvalidKeys`."""
        text, reason = _look(path)
        try:
            if text is None:
                raise InvalidKeys(reason)
            return cls(text, path)
        except InvalidKeys as error:
            raise InvalidKeys(f"keys: {path}: {error}") from None

    def find(self, secret: str) -> Caller:
        """Whose secret it is; raises :class:`~service.errors.Unauthorized`.

        Found by its hash, in a table whose own hash is keyed: how long that takes tells nothing about the hashes that
        are in it, and a caller cannot choose what a guess hashes to.
        """
        key = self._keys.get(digest(secret)) if len(secret) <= MOST_SECRET else None
        if key is None:
            raise Unauthorized("the key is not known here")
        if key.expires is not None and key.expires <= time.time():
            raise Unauthorized(f"the key of {key.caller.name!r} has expired")
        return key.caller

    async def watch(self) -> None:
        """Take over what is edited, for as long as it runs; a bad edit is logged, and the old keys stay."""
        if self._path is None:
            return
        considered: tuple[str | None, str] = (self._text, "")
        seen = considered
        while True:
            await asyncio.sleep(POLL_SECONDS)
            found = await anyio.to_thread.run_sync(_look, self._path)
            # Only what has stayed the same for a while: an editor may be in the middle of writing.
            if found == seen and found != considered:
                considered = found
                try:
                    self._take(*found)
                except InvalidKeys as error:
                    log.error("keys: %s: %s; the keys that were there before stay in force", self._path, error)
            seen = found

    def _take(self, text: str | None, reason: str) -> None:
        if text is None:
            raise InvalidKeys(reason)
        self.entries = parse(text)
        self._keys = by_digest(self.entries)
        log.info("keys: %s was read again: %s", self._path, ", ".join(self.entries))


def keyring_of(settings: Settings) -> Keyring | None:
    """The keys that the settings name; None where none are configured. Raises :class:`InvalidKeys`."""
    if settings.keys is not None:
        return Keyring.of_file(settings.keys)
    if settings.keys_inline is None:
        return None
    try:
        return Keyring(settings.keys_inline)
    except InvalidKeys as error:
        raise InvalidKeys(f"keys_inline: {error}") from None


def _look(path: Path) -> tuple[str | None, str]:
    """A file's text, or None and why there is none."""
    try:
        return path.read_text("utf-8"), ""
    except OSError as error:
        return None, f"it cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        return None, "it is not text in UTF-8"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def append(path: Path, name: str, entry: KeyEntry) -> None:
    """Add a key to a file, which is made where there is none; raises :class:`InvalidKeys`.

    What is in the file stays as it was written, comments and all.
    """
    with open(path, "a+", encoding="utf-8", opener=_private) as file:
        # Two who add a key at once: one after the other.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        try:
            if text.strip() and name in parse(text):
                raise InvalidKeys(f"there is a key {name!r} already; for another secret of it make its sha256 a list")
        except InvalidKeys as error:
            raise InvalidKeys(f"{path}: {error}") from None
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        addition = gap + written(name, entry)
        parse(text + addition)
        file.write(addition)
