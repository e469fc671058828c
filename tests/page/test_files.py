"""The page's files: who is answered with them, how they are kept, and that nothing of them is inline."""

from __future__ import annotations

import gzip
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.broker.memory import MemoryBroker
from service.page.files import file_names
from service.settings import Settings
from service.stores.directory import state_in
from tests.service.broker.conftest import AMPLE

pytestmark = pytest.mark.anyio
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"}
STATIC = Path(__file__).parents[2] / "service" / "page" / "static"


@asynccontextmanager
async def service(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(**settings), MemoryBroker(AMPLE), state_in(Path("/nonexistent")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


def addresses(page: str) -> set[str]:
    """All that the index names, but other documents."""
    return {each for each in re.findall(r'(?:src|href)="([^"#]+)"', page) if each.startswith("page/")}


async def test_browsers_get_the_page_and_others_a_few_lines() -> None:
    async with service() as client:
        page = await client.get("/", headers=BROWSER)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for accept in ("*/*", "application/json", "text/plain, text/html;q=0.5", ""):
            lines = await client.get("/", headers={"accept": accept})
            assert lines.status_code == 200
            assert lines.headers["content-type"] == "text/plain; charset=utf-8", accept
            assert "/docs" in lines.text
        assert "Accept" in page.headers["vary"]
        assert "Accept" in lines.headers["vary"]
        assert (await client.head("/", headers=BROWSER)).status_code == 200
        assert (await client.post("/", headers=BROWSER)).status_code == 405


async def test_the_policy_allows_nothing_inline_and_no_other_origin() -> None:
    async with service() as client:
        page = await client.get("/", headers=BROWSER)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:", policy + re.sub(r"xmlns=\"[^\"]*\"", "", page.text))
    assert not re.search(r"<style|style=|\son\w+=|<script>|javascript:", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_the_index_leads_to_every_file_and_each_is_kept_forever() -> None:
    async with service() as client:
        page = await client.get("/", headers=BROWSER)
        found = addresses(page.text)
        assert {each.rpartition("/")[2] for each in found} == set(file_names())
        for address in found:
            file = await client.get("/" + address)
            assert file.status_code == 200, address
            assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert file.content == (STATIC / address.rpartition("/")[2]).read_bytes()
            # Of another version it is what there is now, and asked for again next time.
            other = await client.get(f"/page/other/{address.rpartition('/')[2]}")
            assert (other.content, other.headers["cache-control"]) == (file.content, "no-cache")
        assert (await client.get("/page/other/settings.py")).status_code == 404
        assert (await client.get("/page/other/..%2ffiles.py")).status_code == 404


async def test_the_index_is_asked_for_again_and_sent_only_when_it_is_new() -> None:
    async with service() as client:
        page = await client.get("/", headers=BROWSER)
        assert page.headers["cache-control"] == "no-cache"
        again = await client.get("/", headers={**BROWSER, "if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        changed = await client.get("/", headers={**BROWSER, "if-none-match": 'W/"other"'})
        assert changed.content == page.content


async def test_files_are_packed_for_who_can_unpack_them() -> None:
    async with service() as client:
        page = await client.get("/", headers={**BROWSER, "accept-encoding": "identity"})
        address = next(each for each in addresses(page.text) if each.endswith("draw.js"))
        plain = await client.get("/" + address, headers={"accept-encoding": "gzip;q=0"})
        assert "content-encoding" not in plain.headers
        async with client.stream("GET", "/" + address, headers={"accept-encoding": "br, gzip"}) as packed:
            sent = b"".join([part async for part in packed.aiter_raw()])
        assert packed.headers["content-encoding"] == "gzip"
        assert len(sent) < len(plain.content) / 2
        assert gzip.decompress(sent) == plain.content


async def test_the_page_can_be_turned_off() -> None:
    async with service(page=False) as client:
        for path in ("/", "/page/x/main.js"):
            assert (await client.get(path, headers=BROWSER)).status_code == 404


async def test_a_page_of_keys_is_open_and_tells_nothing() -> None:
    async with service(keys_inline='[a]\nsha256 = "' + "0" * 64 + '"\nscopes = ["infer"]') as client:
        page = await client.get("/", headers=BROWSER)
        assert page.status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
    async with service() as bare:
        assert (await bare.get("/", headers=BROWSER)).text == page.text
