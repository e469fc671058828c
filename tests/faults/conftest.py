"""Tiny models, which make storms cheap, and clusters of processes that serve them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from model.config import NoiseProtocol
from service.local import import_checkpoint
from tests.faults.cluster import Cluster

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture
def anyio_backend() -> str:
    """Tests of coroutines run on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles of 16x16 and 12x12 pixels: tiny-cond, with five classes, and tiny-uncond."""
    directory = tmp_path_factory.mktemp("tiny")
    noise = NoiseProtocol(kind="gaussian", std=0.05)
    for name, checkpoint in (("tiny-cond", "tiny_cond"), ("tiny-uncond", "tiny_uncond")):
        import_checkpoint(REFERENCE / f"{checkpoint}.pth", directory / name, noise, name=name, class_names=None)
    return directory


@pytest.fixture
def cluster(tmp_path: Path, tiny: Path) -> Iterator[Cluster]:
    """A Redis, and whatever a test starts around it."""
    cluster = Cluster(tmp_path, tiny)
    yield cluster
    cluster.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of all logs with a failure."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and report.when == "call" and isinstance(cluster, Cluster):
        report.sections += [(path.name, path.read_text(errors="replace")[-3000:]) for path in cluster.log_files()]
    return report
