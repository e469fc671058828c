"""Keys as people write them, and the keyring that follows their file."""

from __future__ import annotations

import asyncio
import logging
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.access import keyring as keyring_module
from service.access.caller import Scope
from service.access.keyring import Keyring, append
from service.access.keys import PREFIX, InvalidKeys, KeyEntry, digest, made, new_secret, parse, written
from service.errors import Unauthorized
from service.jobs import Priority
from tests.service.processes import PATIENCE

HASH = "0123456789abcdef" * 4
SECRET_LIKE = "tarflow_pasted-by-mistake"  # noqa: S105

names = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)
moments = st.dates(date(1970, 1, 2), date(2200, 1, 1)) | st.datetimes(
    datetime(1970, 1, 2),
    datetime(2200, 1, 1),
    timezones=st.just(UTC) | st.none(),
)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
entries = st.builds(
    KeyEntry,
    sha256=digests | st.lists(digests, min_size=1, max_size=3, unique=True),
    scopes=st.lists(st.sampled_from(Scope), min_size=1, unique=True),
    priority=st.sampled_from(Priority),
    rate=st.none()
    | st.builds("{}/{}".format, st.integers(1, 10**6), st.sampled_from(["second", "minute", "hour", "day"])),
    concurrent_cost=st.none() | st.integers(1, 2**53),
    expires=st.none() | moments,
)


@given(names, entries)
def test_what_is_written_is_read(name: str, entry: KeyEntry) -> None:
    assert parse(written(name, entry)) == {name: entry}


def entry(secret: str, **more: object) -> KeyEntry:
    """A key's table with the scope infer."""
    return made(sha256=digest(secret).hex(), scopes=[Scope.INFER], **more)


def text(**secrets: str) -> str:
    return "\n".join(written(name, entry(secret)) for name, secret in secrets.items())


def test_secrets_are_long_and_told_by_their_beginning() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    for secret in secrets:
        assert secret.startswith(PREFIX)
        assert len(secret) >= len(PREFIX) + 43


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no key"]),
        ("# only a comment", ["no key"]),
        ("[a", ["not TOML"]),
        (f'[a]\nsha256 = "{HASH}"\n[a]\nsha256 = "{HASH}"', ["not TOML"]),
        ("a = 1", ["a:", "table"]),
        (f'["../a"]\nsha256 = "{HASH}"', ["../a", "allowed is 1 to 100"]),
        ("[a]", ["a.sha256"]),
        (f'[a]\nsha256 = "{SECRET_LIKE}"\nscopes = ["infer"]', ["a.sha256", "64 hexadecimal"]),
        (f'[a]\nsha256 = ["{SECRET_LIKE}"]\nscopes = ["infer"]', ["a.sha256", "64 hexadecimal"]),
        (f'[a]\nsha256 = "{HASH}\\n"\nscopes = ["infer"]', ["a.sha256"]),
        ('[a]\nsha256 = []\nscopes = ["infer"]', ["a.sha256"]),
        (f'[a]\nsha256 = "{HASH}"', ["a.scopes", "infer, admin, metrics"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = []', ["a.scopes"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["all"]', ["a.scopes", "infer, admin, metrics"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nrate = "fast"', ["a.rate", "600/minute"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nrate = "0/minute"', ["a.rate"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nrate = "6/minute; 7/hour"', ["a.rate"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nconcurrent_cost = 0', ["a.concurrent_cost", "from 1 on"]),
        (
            f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nconcurrent_cost = {2**53 + 1}',
            ["a.concurrent_cost", f"up to {2**53}"],
        ),
        ("a = " + "1" * 5000, ["not TOML"]),
        ("a = " + "[" * 10_000, ["not TOML"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\npriority = "first"', ["a.priority", "high, normal, low"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nexpires = "soon"', ["a.expires", "2027-01-31"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nexpires = 3', ["a.expires", "2027-01-31"]),
        (f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nsecret = "{SECRET_LIKE}"', ["a.secret", "no such field"]),
        (
            f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\n[b]\nsha256 = "{HASH}"\nscopes = ["infer"]',
            ["b.sha256", "'a' has the same"],
        ),
    ],
)
def test_a_wrong_text_is_refused_by_key_and_field_and_shows_no_value(content: str, words: list[str]) -> None:
    with pytest.raises(InvalidKeys) as caught:
        Keyring(content)
    for word in words:
        assert word in str(caught.value)
    assert SECRET_LIKE not in str(caught.value)


def test_a_secret_is_found_by_its_hash_alone() -> None:
    ring = Keyring(
        text(a="first", b="second")
        + f'[c]\nsha256 = ["{digest("old").hex()}", "{digest("new").hex()}"]\nscopes = ["admin"]'
    )
    assert ring.find("first").name == "a"
    assert ring.find("old") == ring.find("new")
    assert ring.find("new").scopes == {Scope.ADMIN}
    for wrong in ("", "a", "firs", "first ", "FIRST", digest("first").hex(), "x" * 100_000, "\ud800", "\x00"):
        with pytest.raises(Unauthorized) as caught:
            ring.find(wrong)
        assert caught.value.code == "invalid_key"


def test_a_key_has_an_end() -> None:
    for expires in (date(2020, 1, 1), datetime(2020, 1, 1), datetime(2020, 1, 1, tzinfo=UTC)):
        assert entry("s", expires=expires).expires_at == 1577836800
        with pytest.raises(Unauthorized, match="the key of 'a' has expired"):
            Keyring(written("a", entry("s", expires=expires))).find("s")
    later = datetime.fromtimestamp(time.time() + 3600, UTC)
    assert Keyring(written("a", entry("s", expires=later))).find("s").name == "a"


# Files.


def test_appending_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    append(path, "a", entry("first"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# Mine.\n" + path.read_text() + "# The end, without a newline.")
    before = path.read_text()
    append(path, "b.c", entry("second", rate="5/day"))
    assert path.read_text().startswith(before)
    ring = Keyring.of_file(path)
    assert ring.find("first").name == "a"
    assert (ring.find("second").name, ring.find("second").rate) == ("b.c", "5/day")
    for name, secret, words in (("a", "third", "already"), ("../a", "third", "no name"), ("d", "first", "same secret")):
        written_before = path.read_text()
        with pytest.raises(InvalidKeys, match=words):
            append(path, name, entry(secret))
        assert path.read_text() == written_before
    path.write_text("[broken")
    with pytest.raises(InvalidKeys, match="not TOML"):
        append(path, "e", entry("fifth"))
    assert path.read_text() == "[broken"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[a]"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidKeys, match=r"^keys: .*keys\.toml: "):
        Keyring.of_file(path)
    with pytest.raises(InvalidKeys):
        Keyring.of_file(tmp_path)


@asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Keyring]:
    ring = Keyring.of_file(path)
    task = asyncio.create_task(ring.watch())
    try:
        yield ring
    finally:
        task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


def knows(ring: Keyring, secret: str) -> bool:
    try:
        ring.find(secret)
    except Unauthorized:
        return False
    return True


@pytest.mark.anyio
async def test_an_edit_is_taken_over_and_a_bad_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keyring_module, "POLL_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    path = tmp_path / "keys.toml"
    path.write_text(text(a="first"))
    async with watched(path) as ring:
        path.write_text(text(a="first", b="second"))
        await until(lambda: knows(ring, "second"))
        long, deep = b"a = " + b"1" * 5000, b"a = " + b"[" * 10_000
        large = f'[a]\nsha256 = "{HASH}"\nscopes = ["infer"]\nconcurrent_cost = {2**53 + 1}'.encode()
        for bad in (b"", b"[broken", f'[a]\nsha256 = "{SECRET_LIKE}"'.encode(), b"\xff", long, deep, large):
            caplog.clear()
            path.write_bytes(bad)
            await until(lambda: "stay in force" in caplog.text)
            assert knows(ring, "first")
            assert knows(ring, "second")
            assert SECRET_LIKE not in caplog.text
        caplog.clear()
        path.unlink()
        await until(lambda: "cannot be read" in caplog.text)
        assert knows(ring, "first")
        # Another file in its place, as orchestrators do it; what is no more in it is refused.
        (tmp_path / "new").write_text(text(b="second"))
        (tmp_path / "new").rename(path)
        await until(lambda: not knows(ring, "first"))
        assert knows(ring, "second")
