"""One real server for the whole session, with the bundled model and four tiny ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from model.bundle import BUNDLED, read_bundle
from model.config import FlowConfig, NoiseProtocol
from model.sampling.plan import BlockConvergence, ConvergenceProfile, segment_lengths
from model.weights import load_flow, update_bundle, write_bundle
from service.local import import_checkpoint
from tests.service.processes import ServerProcess

REFERENCE = Path(__file__).parents[1] / "reference"
CLASSES = ("cat", "dog", "0", "fox", "owl")
"""Names of tiny-cond; one of them looks like the index of another."""

PRIOR = (0.4, 0.3, 0.15, 0.1, 0.05)
"""p(y) of tiny-uniform's classes."""

Start = Callable[..., ServerProcess]


@pytest.fixture
def anyio_backend() -> str:
    """Tests of coroutines run on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Directory of the checkpoints in the official layout."""
    return REFERENCE


def convergence(flow: FlowConfig) -> ConvergenceProfile:
    """A profile such as tuning gives, which lets solver auto iterate where it pays."""
    active = {str(n): (1.0, 1.0, 0.5) for n in segment_lengths(flow.num_patches)}
    block = BlockConvergence(crm=1 / flow.num_blocks, igm_latent=1.0, igm_zeros=2.0, active=active)
    return ConvergenceProfile(
        blocks=(block,) * flow.num_blocks, gain=8.0, floor=2e-5, tolerance=1e-3, num_images=8, guidance={}
    )


def set_prior(directory: Path, prior: tuple[float, ...]) -> None:
    """Give an imported bundle a class prior, as training would."""
    bundle = read_bundle(directory)
    config = replace(bundle.config, class_prior=prior)
    write_bundle(directory, config, load_flow(bundle), bundle.sampling, bundle.card)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: fashion-mnist, tiny-cond, tiny-uncond, tiny-uniform and tiny-vp; the first and the last are tuned.

    tiny-uniform has a class prior that is not uniform.
    """
    directory = tmp_path_factory.mktemp("models")
    shutil.copytree(BUNDLED / "fashion-mnist", directory / "fashion-mnist")
    gaussian = NoiseProtocol(kind="gaussian", std=0.05)
    for name, checkpoint, noise, classes in (
        ("tiny-cond", "tiny_cond", gaussian, CLASSES),
        ("tiny-uncond", "tiny_uncond", gaussian, None),
        ("tiny-uniform", "tiny_cond", NoiseProtocol(kind="uniform"), None),
        ("tiny-vp", "tiny_uncond_vp", gaussian, None),
    ):
        import_checkpoint(REFERENCE / f"{checkpoint}.pth", directory / name, noise, name=name, class_names=classes)
    set_prior(directory / "tiny-uniform", PRIOR)
    for name in ("fashion-mnist", "tiny-vp"):
        bundle = read_bundle(directory / name)
        if bundle.convergence is None:
            update_bundle(bundle, convergence=convergence(bundle.config.flow))
    return directory


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The session's server; it must also leave in order."""
    process = ServerProcess(tmp_path_factory.mktemp("server") / "log", "--models", models)
    try:
        yield process.wait_ready()
        assert process.stop() == 0, process.log
    finally:
        process.kill()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of the session's server."""
    with server.client() as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start other servers, for tests that harm them: ``start(*flags, **environment)``."""
    processes: list[ServerProcess] = []

    def start(*flags: str | Path, **more: str) -> ServerProcess:
        process = ServerProcess(tmp_path / f"log-{len(processes)}", *flags, **more)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        print(process.log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log with a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, ServerProcess):
        report.sections.append(("server log", server.log[-5000:]))
    return report
