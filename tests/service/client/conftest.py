"""The session's server as the client sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from service.client import AsyncClient, Client
from tests.service.client.fronts import Front, fronting
from tests.service.processes import ServerProcess


@pytest.fixture(scope="session")
def tarflow(server: ServerProcess) -> Iterator[Client]:
    """A client of the session's server."""
    with Client(server.url) as client:
        yield client


@pytest.fixture
async def waiting(server: ServerProcess, anyio_backend: str) -> AsyncIterator[AsyncClient]:
    """The asynchronous one."""
    async with AsyncClient(server.url) as client:
        yield client


@pytest.fixture
def front(server: ServerProcess) -> Iterator[Front]:
    """A front before the session's server."""
    with fronting(server.url) as front:
        yield front
