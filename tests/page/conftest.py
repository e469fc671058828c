"""A browser for a file's tests, on a service of two models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from model.bundle import BUNDLED
from model.config import NoiseProtocol
from service.local import import_checkpoint
from tests.page.visitor import WIDE, Visitor, chromium
from tests.service.conftest import REFERENCE, anyio_backend, client, pytest_runtest_makereport, server
from tests.service.processes import ServerProcess

__all__ = ["anyio_backend", "client", "pytest_runtest_makereport", "server"]

Visit = Callable[..., Visitor]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: fashion-mnist, which has all, and tiny, which has neither classes nor a calibration."""
    directory = tmp_path_factory.mktemp("models")
    shutil.copytree(BUNDLED / "fashion-mnist", directory / "fashion-mnist")
    noise = NoiseProtocol(kind="gaussian", std=0.05)
    import_checkpoint(REFERENCE / "tiny_uncond.pth", directory / "tiny", noise, name="tiny", class_names=None)
    return directory


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
