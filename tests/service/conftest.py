"""One real server for the whole session, with the bundled model and four tiny ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from model.anomaly.calibration import calibrate
from model.anomaly.statistics import image_statistics
from model.bundle import BUNDLED, CALIBRATION, MANIFEST, read_bundle, sha256
from model.config import FlowConfig, NoiseProtocol
from model.sampling.plan import BlockConvergence, ConvergenceProfile, segment_lengths
from model.weights import load_flow, update_bundle, write_bundle
from service.local import import_checkpoint
from tests.service.pictures import normal
from tests.service.processes import ServerProcess

REFERENCE = Path(__file__).parents[1] / "reference"
CLASSES = ("cat", "dog", "0", "fox", "owl")
"""Names of tiny-cond; one of them looks like the index of another."""

PRIOR = (0.4, 0.3, 0.15, 0.1, 0.05)
"""p(y) of tiny-uniform's classes."""

NORMALS = 200
"""Images of tiny-uncond's calibration: half of them make p-values."""

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


def calibrated(directory: Path, name: str = "own", seed: int = 0) -> bytes:
    """A calibration of a bundle of grey images, made from normal pictures."""
    bundle = read_bundle(directory)
    pixels = normal(NORMALS, bundle.config.flow.image_size, seed)[:, None]
    noise = bundle.config.noise
    statistics = image_statistics(load_flow(bundle), noise, torch.from_numpy(pixels), None, seed=0, gradient=True)
    about = {"name": name, "model": bundle.name, "model_id": bundle.model_id, "noise": noise.to_dict()}
    return calibrate(statistics, pixels, {**about, "seed": 0, "created": 0}).to_bytes()


def set_calibration(directory: Path, data: bytes) -> None:
    """Make a calibration a bundle's own."""
    (directory / CALIBRATION).write_bytes(data)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["sha256"][CALIBRATION] = sha256(data)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: fashion-mnist, tiny-cond, tiny-uncond, tiny-uniform and tiny-vp; the first and the last are tuned.

    tiny-uniform has a class prior that is not uniform, tiny-uncond a calibration of its own.
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
    set_calibration(directory / "tiny-uncond", calibrated(directory / "tiny-uncond"))
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
