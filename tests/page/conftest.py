"""A browser for a file's tests, on the services of tests/service."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser

from tests.page.visitor import WIDE, Visitor, chromium
from tests.service.conftest import client, models, pytest_runtest_makereport, server, start
from tests.service.processes import ServerProcess

__all__ = ["client", "models", "pytest_runtest_makereport", "server", "start"]

Visit = Callable[..., Visitor]


@pytest.fixture
def anyio_backend() -> str:
    """Tests of coroutines run on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer than a module: while it runs, no test of another one may have an event loop of its own."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Visit]:
    """Open the page of a service: ``open_page(url, **options of the context)``; nothing may go wrong on it."""
    visitors: list[Visitor] = []

    def opened(url: str, **options: object) -> Visitor:
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        visitors.append(Visitor(context, url))
        return visitors[-1]

    yield opened
    for visitor in visitors:
        visitor.context.close()
    assert [problem for visitor in visitors for problem in visitor.problems] == []


@pytest.fixture
def visitor(server: ServerProcess, open_page: Visit) -> Visitor:
    """Somebody on the page of the session's server, which is ready."""
    return open_page(server.url).is_ready()
